"""Paged attention beside what the device can: moving bytes for decoding, multiplying for prompts.

    python -m benchmarks.gpu.attention [--shape llama-3-8b] [--kv bfloat16]

Counted is what attention has to read, write and multiply: nothing twice, and nothing that the
causal mask hides. Ceilings (benchmarks/gpu/ceilings.py) are measured in the same run. Medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from baton.types import Request, Sampling, Stopping
from benchmarks.gpu import ceilings
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import seconds
from engine.gpu.attention import attend
from engine.gpu.ragged import Ragged
from engine.model.batch import build_batch
from engine.model.pool import KvGeometry, KvPool
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence as Tokens

DECODES = ((1, 2048), (1, 8192), (8, 8192), (64, 2048), (64, 8192))  # sequences, context
PREFILLS = ((0, 4096), (0, 8192), (4096, 512))  # start, length
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "llama-3-8b": Shape(32, 8, 128),  # and Mistral-7B
    "qwen3-0.6b": Shape(16, 8, 128),
}
KV = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Case:
    """One call of attention, and what it has to do at least."""

    name: str
    call: Callable[[], Tensor]
    moved: int  # bytes
    operations: int  # a multiply-add counts as two


@dataclass(frozen=True, slots=True)
class Timed:
    """One case's median, and the shares of the ceilings that it amounts to."""

    name: str
    seconds: float
    of_bandwidth: float
    of_product: float


def case(
    name: str,
    shape: Shape,
    chunks: Sequence[tuple[int, int]],
    kv_dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """One layer over random numbers in shuffled blocks; `chunks`: (start, length) of each.
    Activations are bfloat16."""
    needed = [-(-(start + length) // BLOCK_SIZE) for start, length in chunks]
    geometry = KvGeometry.of("", 1, shape.kv_heads, shape.head_dim, kv_dtype, BLOCK_SIZE)
    pool = KvPool(geometry, sum(needed), device=device)
    _fill(pool)
    free = torch.randperm(pool.blocks, generator=torch.Generator().manual_seed(0)).tolist()
    planned = []
    for (start, length), blocks in zip(chunks, needed, strict=True):
        request = Request("r", (0,) * (start + length), Sampling(), Stopping(1))
        sequence = Tokens.start(request, 0, now=0.0)
        sequence.blocks = [free.pop() for _ in range(blocks)]
        planned.append(Chunk(sequence, start, length, sample=True))
    ragged = Ragged.of(build_batch(StepPlan(tuple(planned)), BLOCK_SIZE, device)[0])
    tokens = sum(length for _, length in chunks)
    q = torch.randn(tokens, shape.heads, shape.head_dim, device=device).bfloat16()

    def call() -> Tensor:
        return attend(q, pool, 0, ragged, scale=shape.head_dim**-0.5)

    contexts = sum(start + length for start, length in chunks)
    per_token = 2 * shape.kv_heads * (shape.head_dim * geometry.item_size + geometry.scale_size)
    pairs = sum(length * start + length * (length + 1) // 2 for start, length in chunks)
    return Case(
        name,
        call,
        moved=contexts * per_token + 2 * q.numel() * q.element_size(),
        operations=4 * pairs * shape.heads * shape.head_dim,
    )


def _fill(pool: KvPool) -> None:
    scales = pool.scales(0)
    if scales is None:
        pool.storage.normal_()
        return
    for plane, scale in zip((pool.keys(0), pool.values(0)), scales, strict=True):
        plane.copy_(torch.randint(-100, 100, plane.shape, device=plane.device).to(plane.dtype))
        scale.fill_(0.01)


def cases(shape: Shape, kv_dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Decoding, then prompts."""
    decodes = [
        case(f"decode, {count} x {context}", shape, [(context - 1, 1)] * count, kv_dtype, device)
        for count, context in DECODES
    ]
    prompts = [
        case(f"prompt, {length} after {start}", shape, [(start, length)], kv_dtype, device)
        for start, length in PREFILLS
    ]
    return decodes + prompts


def measure(found: Sequence[Case], limits: Ceilings, device: torch.device) -> list[Timed]:
    """Every case."""
    timed = []
    for each in found:
        took = seconds(each.call, device)
        bandwidth, product = each.moved / took / limits.read, each.operations / took / limits.bf16
        timed.append(Timed(each.name, took, bandwidth, product))
    return timed


@click.command()
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="llama-3-8b", show_default=True)
@click.option("--kv", type=click.Choice(sorted(KV)), default="bfloat16", show_default=True)
def main(shape: str, kv: str) -> None:
    """Measure paged attention on the GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device")
    device = torch.device("cuda")
    limits = ceilings.measure(device)
    click.echo(f"{torch.cuda.get_device_name(device)}, {shape}, KV in {kv}")
    click.echo(f"{limits.read / 1e9:.0f} GB/s, {limits.bf16 / 1e12:.0f} Tflop/s in bfloat16")
    for each in measure(cases(SHAPES[shape], KV[kv], device), limits, device):
        click.echo(
            f"{each.name:24} {each.seconds * 1e6:9.1f} us  {each.of_bandwidth:5.2f} of bandwidth"
            f"  {each.of_product:5.2f} of the product"
        )


if __name__ == "__main__":
    main()
