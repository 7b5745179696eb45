"""The same passes on one device and on several that share each layer, in turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu import passes
from benchmarks.gpu.models import SHAPES, RandomCheckpoint, Sizes, config_of, executor, give_back
from engine.gpu.executor import GpuExecutor
from engine.model.llama import read_shape
from engine.model.memory import OwnMemory
from engine.model.options import ModelOptions
from engine.model.pool import KvGeometry, KvPool
from engine.parallel.leading import LeadingExecutor
from engine.parallel.load import PATIENCE
from engine.parallel.model import ParallelModel
from engine.parallel.store import Room
from engine.parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class Compared:
    """Seconds of a pass: medians of each round, one after the other."""

    shape: passes.Shape
    one: list[float]
    several: list[float]

    @property
    def ratio(self) -> float:
        """Median over rounds of one device's time by that of several."""
        return median(one / other for one, other in zip(self.one, self.several, strict=True))


def compare(
    shape: str,
    degree: int,
    wanted: list[passes.Shape],
    device: torch.device,
    sizes: Sizes,
    dtype: torch.dtype,
    steps: int,
    rounds: int = 3,
) -> list[Compared]:
    """Each of the passes `wanted` on `device` alone and on `degree` devices from there on, for so
    many steps of generation per round."""
    one = executor(shape, device, sizes, dtype=dtype)
    several = shards(shape, degree, device, sizes, dtype)
    try:
        found = [Compared(each, [], []) for each in wanted]
        for each in found * rounds:
            each.one.append(passes.seconds(one, each.shape, steps))
            each.several.append(passes.seconds(several, each.shape, steps))
        return found
    finally:
        one.close()
        several.close()
        del one, several
        give_back(device)


def shards(
    shape: str, degree: int, device: torch.device, sizes: Sizes, dtype: torch.dtype
) -> GpuExecutor:
    """A warm executor over `degree` shards of a random model of one of SHAPES."""
    config = config_of(SHAPES[shape]())
    model = ParallelModel(
        config,
        read_shape(config),
        _options(degree, device, sizes),
        dtype,
        fused=True,
        threads=1,
        patience=PATIENCE,
        weights=random_shard,
    )
    geometry = KvGeometry.of(
        "random", model.layers, model.kv_heads, model.head_dim, dtype, sizes.block_size
    )
    capacity = sizes.capacity(config.max_context)
    model.start(geometry)
    try:
        memory = OwnMemory(sizes.blocks * geometry.block_bytes)
        model.open(memory, Room(capacity, 0.0))
        pool = KvPool(geometry, sizes.blocks, buffer=memory.buffer)
        made = LeadingExecutor(model, pool, capacity)
        made.warm_up()
    except BaseException:
        model.close()
        raise
    return made


def random_shard(
    path: Path, dtype: torch.dtype, device: torch.device, topology: Topology
) -> RandomCheckpoint:
    """Random weights of a rank; those of different ranks are no parts of one model."""
    return RandomCheckpoint(dtype, device)


def _options(degree: int, device: torch.device, sizes: Sizes) -> ModelOptions:
    return ModelOptions(
        attention_backend="triton",
        dtype="auto",
        device=str(device),
        quantization="none",
        kv_dtype="auto",
        instruction_set="auto",
        threads=1,
        block_size=sizes.block_size,
        max_batch_tokens=sizes.max_tokens,
        tensor_parallel=degree,
    )
