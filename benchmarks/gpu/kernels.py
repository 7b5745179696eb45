"""Every kernel of a pass but attention (benchmarks/gpu/attention.py): against copy bandwidth by the
bytes that it must move, and products against the larger of that and torch's own products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.models import RandomCheckpoint
from benchmarks.gpu.timing import seconds
from engine.gpu.kernels.activation import gated
from engine.gpu.kernels.blocks import gather, scatter
from engine.gpu.kernels.digest import digests, transfer
from engine.gpu.kernels.norm import add_rms_norm, rms_norm
from engine.gpu.kernels.rope import rotate_and_store
from engine.gpu.kernels.sample import Space, best_tokens
from engine.gpu.linear import linear
from engine.model.pool import KvGeometry, KvPool


@dataclass(frozen=True, slots=True)
class Widths:
    """Of one layer."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (queries + 2 * keys, self.hidden),
            "output": (self.hidden, queries),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


LLAMA_8B = Widths()
QWEN_06B = Widths(1024, 3072, 16, 8, 128, 151936)
TINY = Widths(64, 128, 4, 2, 16, 256)
ROWS = (64, 1024, 8192)  # tokens
PRODUCTS = (1, 8, 64, 512, 8192)  # tokens
FORMATS = ("none", "int8", "int4", "fp8")


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at one size: the call, what it reads and writes at least, and the operations."""

    name: str
    tokens: int
    call: Callable[[], object]
    moved: int
    operations: float = 0.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One kernel's median."""

    name: str
    tokens: int
    seconds: float
    share: float  # of the floor: the longer of moving its bytes and of computing

    @classmethod
    def of(cls, case: Case, ceilings: Ceilings, device: torch.device) -> Timed:
        """Measured."""
        took = seconds(case.call, device)
        floor = ceilings.floor(case.moved, case.operations)
        return cls(case.name, case.tokens, took, floor / took)


def rows(device: torch.device, tokens: int, widths: Widths = LLAMA_8B) -> Iterator[Case]:
    """What stands between the products, for so many tokens, in bfloat16; and the choice of each
    token's best."""
    hidden, heads, kv_heads, dim = widths.hidden, widths.heads, widths.kv_heads, widths.head_dim
    x, residual = _random(device, tokens, hidden), _random(device, tokens, hidden)
    weight = _random(device, hidden)
    size = x.numel() * 2
    yield Case("rms_norm", tokens, lambda: rms_norm(x, weight, 1e-5), 2 * size)
    none = torch.zeros_like(x)  # so that the sum stays what it is, however often it is added to
    yield Case("add_rms_norm", tokens, lambda: add_rms_norm(none, residual, weight, 1e-5), 4 * size)
    gate_up = _random(device, tokens, 2 * widths.intermediate)
    yield Case("gated", tokens, lambda: gated(gate_up, "silu"), gate_up.numel() * 3)
    pool = _pool(device, -(-tokens // 16), kv_heads, dim)
    qkv = _random(device, tokens, (heads + 2 * kv_heads) * dim)
    rotations = torch.rand(tokens, dim, device=device)
    places = torch.arange(tokens, device=device)

    def rotate() -> Tensor:
        return rotate_and_store(
            qkv,
            rotations,
            places,
            places,
            pool.keys(0),
            pool.values(0),
            None,
            heads=heads,
            kv_heads=kv_heads,
            q_norm=None,
            k_norm=None,
            eps=1e-5,
        )

    yield Case("rotate_and_store", tokens, rotate, 2 * qkv.numel() * 2 + rotations.numel() * 4)


def choices(device: torch.device, sequences: int, widths: Widths = LLAMA_8B) -> Iterator[Case]:
    """Greedy tokens of so many sequences."""
    logits = _random(device, sequences, widths.vocabulary)
    space = Space(sequences, widths.vocabulary, device)
    yield Case("best_tokens", sequences, lambda: best_tokens(logits, space), logits.numel() * 2)


def blocks(device: torch.device, tokens: int, widths: Widths = LLAMA_8B) -> Iterator[Case]:
    """Blocks of all layers of Llama-3-8B would be two MiB each; these have four layers."""
    count = max(1, tokens // 16)
    pool = _pool(device, 2 * count, widths.kv_heads, widths.head_dim, layers=4)
    chosen = torch.randperm(2 * count, device=device)[:count]
    held = torch.empty(count, pool.block_bytes, dtype=torch.uint8, device=device)
    size = 2 * held.numel()
    yield Case("gather blocks", tokens, lambda: gather(pool.storage, chosen, held), size)
    yield Case("scatter blocks", tokens, lambda: scatter(chosen, held, pool.storage), size)
    yield Case("digest blocks", tokens, lambda: digests(pool.storage, chosen, 0), size // 2)
    every = torch.arange(count, device=device)
    yield Case(
        "copy and digest blocks",
        tokens,
        lambda: transfer(held, every, pool.storage, chosen, 0),
        size,
    )


def products(
    device: torch.device,
    tokens: int,
    dtype: torch.dtype,
    widths: Widths = LLAMA_8B,
    formats: tuple[str, ...] = FORMATS,
) -> Iterator[Case]:
    """The gates and ups of a layer, its largest product, with weights in every format."""
    for quantization in formats:
        yield _product(device, tokens, dtype, "gate_up", widths, quantization)


def every_product(device: torch.device, tokens: int, widths: Widths) -> Iterator[Case]:
    """All products of a layer with quantized weights; those of one kernel after another."""
    for quantization in ("int8", "int4", "fp8"):
        for name in widths.products:
            yield _product(device, tokens, torch.bfloat16, name, widths, quantization)


def _product(
    device: torch.device,
    tokens: int,
    dtype: torch.dtype,
    name: str,
    widths: Widths,
    quantization: str,
) -> Case:
    out, into = widths.products[name]
    checkpoint = RandomCheckpoint(dtype, device)
    product = linear(checkpoint, (name,), (out,), into, False, quantization)
    x = torch.randn(tokens, into, device=device).to(dtype)
    form = "bfloat16" if quantization == "none" else quantization
    return Case(
        f"{name}, {form}",
        tokens,
        lambda: product(x),
        product.weight_bytes + (x.numel() + tokens * out) * x.element_size(),
        2.0 * tokens * out * into,
    )


def _pool(device: torch.device, blocks: int, kv_heads: int, dim: int, *, layers: int = 1) -> KvPool:
    geometry = KvGeometry.of("random", layers, kv_heads, dim, torch.bfloat16, 16)
    return KvPool(geometry, blocks, device=device)


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()
