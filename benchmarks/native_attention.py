"""Attention of the compiled backend beside torch's, over KV in scattered blocks.

    python -m benchmarks.native_attention [--threads 2] [--rounds 5] [--kv int8]

A model of many layers that does nearly nothing but attend, so that its pool exceeds the processor's
caches as in a real pass. Generation is limited by reading KV: gigabytes per second, and which share
that is of what the same threads read at most. Prompts are limited by products: operations per
second, of what the tokens see. Torch attends over the same pool; both take turns within a round.
Medians, in milliseconds for all layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.contract import Batch
from engine.attention.reference import TorchAttention
from engine.model.pool import KvGeometry, KvPool
from engine.native.library import (
    BatchView,
    Format,
    Isa,
    Library,
    Matrix,
    Shape,
    Times,
    Vector,
    load,
)
from engine.native.step import FORMATS, CompiledStep

MODELS = {"135M": (30, 9, 3, 64), "0.5B": (24, 14, 2, 64)}  # layers, heads, kv_heads, head_dim
PASSES = [
    (1, 2048, 1), (32, 256, 1), (64, 256, 1), (32, 1024, 1), (1, 512, 512), (1, 2048, 2048),
]  # sequences, context, tokens of each  # fmt: skip
KV = {"bfloat16": torch.bfloat16, "int8": torch.int8, "float32": torch.float32}
BLOCK = 16
HIDDEN = 64


@dataclass(frozen=True, slots=True)
class Pass:
    """Sequences of the same context, their last `tokens` each in this pass."""

    sequences: int
    context: int
    tokens: int

    @property
    def blocks(self) -> int:
        """Of the pool."""
        return self.sequences * -(-self.context // BLOCK)

    def batch(self) -> Batch:
        """Blocks in no order."""
        noise = torch.Generator().manual_seed(0)
        tables = torch.randperm(self.blocks, generator=noise).view(self.sequences, -1)
        positions = torch.arange(self.context - self.tokens, self.context)
        slots = tables[:, positions // BLOCK] * BLOCK + positions % BLOCK
        count = self.sequences * self.tokens
        return Batch(
            token_ids=torch.arange(count) % HIDDEN,
            positions=positions.repeat(self.sequences),
            slots=slots.view(-1),
            starts=(self.context - self.tokens,) * self.sequences,
            lengths=(self.tokens,) * self.sequences,
            block_tables=tables,
            prompt_lengths=(self.context,) * self.sequences,
            logit_rows=torch.empty(0, dtype=torch.int64),
            whole_rows=0,
        )

    def seen(self) -> int:
        """Pairs of a token and a position that it sees."""
        first = self.context - self.tokens + 1
        return self.sequences * self.tokens * (first + self.context) // 2


class Compiled:
    """Passes of a model whose other parts are as small as can be."""

    def __init__(
        self, library: Library, isa: Isa, model: str, kv: torch.dtype, threads: int, tokens: int
    ) -> None:
        layers, heads, kv_heads, dim = MODELS[model]
        self.step = CompiledStep(
            library,
            Shape(
                layers=layers, hidden=HIDDEN, intermediate=16, heads=heads, kv_heads=kv_heads,
                head_dim=dim, vocabulary=HIDDEN, activation=0, weights=Format.F32,
                head=Format.F32, kv=Format.INT8 if kv is torch.int8 else FORMATS[kv],
                block_size=BLOCK, max_tokens=tokens, eps=1e-6, scale=dim**-0.5,
            ),
            threads=threads,
            isa=isa,
        )  # fmt: skip
        noise = torch.Generator().manual_seed(0)
        sizes = {
            Matrix.QKV: ((heads + 2 * kv_heads) * dim, HIDDEN),
            Matrix.OUTPUT: (HIDDEN, heads * dim),
            Matrix.GATE_UP: (32, HIDDEN),
            Matrix.DOWN: (HIDDEN, 16),
        }
        for layer in range(layers):
            for matrix, size in sizes.items():
                self.step.pack(
                    layer, matrix, 0, torch.randn(size, generator=noise) / size[1] ** 0.5
                )
            for vector in (Vector.INPUT_NORM, Vector.MLP_NORM):
                self.step.vector(layer, vector, 0, torch.ones(HIDDEN))
        self.step.pack(0, Matrix.HEAD, 0, torch.eye(HIDDEN))
        self.step.vector(0, Vector.FINAL_NORM, 0, torch.ones(HIDDEN))
        self.step.embedding(torch.randn(HIDDEN, HIDDEN, generator=noise))
        self.rotation = torch.cat((torch.ones(dim // 2), torch.zeros(dim // 2)))

    def seconds(self, batch: Batch, pool: KvPool) -> float:
        """Of one pass, in attention."""
        spans = torch.tensor((batch.starts, batch.lengths), dtype=torch.int32)
        rows = torch.zeros(len(batch.token_ids), dtype=torch.int32)
        view = BatchView(
            tokens=len(batch.token_ids),
            sequences=len(batch.starts),
            rows=0,
            width=batch.block_tables.shape[1],
            token_ids=batch.token_ids.data_ptr(),
            slots=batch.slots.data_ptr(),
            starts=spans[0].data_ptr(),
            lengths=spans[1].data_ptr(),
            tables=batch.block_tables.data_ptr(),
            rotations=self.rotation.data_ptr(),
            rotation_rows=rows.data_ptr(),
            kv=pool.storage.data_ptr(),
        )
        times = Times()
        self.step.run(view, times)
        return float(times.attention)


def torch_seconds(model: str, batch: Batch, pool: KvPool) -> float:
    """The same by torch: two layers, counted as all of them."""
    layers, heads, kv_heads, dim = MODELS[model]
    noise = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(len(batch.token_ids), count, dim, generator=noise).bfloat16()
        for count in (heads, kv_heads, kv_heads)
    )
    backend = TorchAttention()
    seconds = []
    for layer in range(2):
        start = time.perf_counter()
        backend.attend(layer, q, k, v, batch, pool, scale=dim**-0.5)
        seconds.append(time.perf_counter() - start)
    return layers * min(seconds)


def make_pool(model: str, kv: torch.dtype, blocks: int) -> KvPool:
    """Of small numbers, all of it in memory."""
    layers, _, kv_heads, dim = MODELS[model]
    pool = KvPool(KvGeometry.of("", layers, kv_heads, dim, kv, BLOCK), blocks)
    values: Tensor = torch.randn(1 << 16, generator=torch.Generator().manual_seed(2))
    if kv is not torch.int8:
        flat = pool.storage.view(-1)
        for start in range(0, len(flat), len(values)):
            part = flat[start : start + len(values)]
            part.copy_(values[: len(part)])
    for layer in range(layers if kv is torch.int8 else 0):
        for scales, numbers in zip(
            pool.scales(layer) or (), (pool.keys(layer), pool.values(layer)), strict=True
        ):
            scales.fill_(0.03)
            numbers.random_(-100, 100)
    return pool


def compare(library: Library, isa: Isa, options: argparse.Namespace, which: Pass) -> str:
    """A line of the table."""
    kv, threads = KV[options.kv], options.threads
    pool = make_pool(options.model, kv, which.blocks)
    batch = which.batch()
    compiled = Compiled(
        library, isa, options.model, kv, threads, max(which.sequences * which.tokens, 1)
    )
    found: list[float] = []
    beside: list[float] = []
    for turn in range(options.rounds + 1):
        mine = [compiled.seconds(batch, pool) for _ in range(options.repeats)]
        if turn:  # the first one warms up
            found += mine
        if not options.alone:
            beside.append(torch_seconds(options.model, batch, pool))
    seconds = statistics.median(found)
    layers, heads, _, dim = MODELS[options.model]
    read = pool.geometry.plane_bytes * 2 * layers * which.blocks
    operations = 4 * layers * heads * dim * which.seen()
    ratio = f"{statistics.median(beside) / seconds:9.1f}" if beside else ""
    return (
        f"{which.sequences:>5} x {which.context:<5}{which.tokens:>6}{1e3 * seconds:>10.2f}"
        f"{read / seconds / 1e9:>8.1f}{operations / seconds / 1e9:>10.0f}{ratio}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="passes in a round")
    parser.add_argument("--model", choices=list(MODELS), default="135M")
    parser.add_argument("--kv", choices=list(KV), default="bfloat16")
    parser.add_argument("--instruction-set", default="auto")
    parser.add_argument("--alone", action="store_true", help="without torch")
    options = parser.parse_args()
    library = load()
    if library is None:
        raise SystemExit("the compiled backend was not built")
    isa = library.isa_called(options.instruction_set)
    torch.set_num_threads(options.threads)
    team = library.functions.baton_team_new(options.threads, None)
    bandwidth = library.functions.baton_read_bandwidth(team, 1 << 30, 5)
    library.functions.baton_team_free(team)
    name = library.isa_name(isa)
    print(f"{name}, {options.threads} threads; memory is read at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'batch':>5} x {'context':<7}{'new':>4}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>10}   / torch")
    for which in PASSES:
        print(compare(library, isa, options, Pass(*which)), flush=True)


if __name__ == "__main__":
    main()
