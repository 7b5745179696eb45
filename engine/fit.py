"""Fits the simulator's cost model to what passes and swaps cost on this machine."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from engine.bench.passes import Progress, TimedPass, sequence_of, shapes, time_passes
from engine.model.runner import TorchExecutor
from scheduling.cost import LinearCost, StepRecord
from scheduling.plan import StepPlan, Swap
from scheduling.simulator.profiles import Profile

_SWAPPED_BLOCKS = 64
_KV_DTYPES = {"int8": "int8", "float8_e4m3fn": "fp8"}  # as in WorkerConfig, by a pool's format


@dataclass(frozen=True, slots=True)
class Fit:
    """A cost model and the passes behind it; `records` holds the median of each shape."""

    profile: Profile
    records: tuple[StepRecord, ...]

    @property
    def errors(self) -> list[float]:
        """How far the model is from each shape's median, as a share of that, without sign."""
        cost = self.profile.cost
        return [abs(cost.seconds(r.work) / r.seconds - 1) for r in self.records]

    @property
    def median_error(self) -> float:
        """The median of `errors`."""
        return statistics.median(self.errors)


def fit(
    executor: TorchExecutor,
    name: str,
    *,
    repeats: int = 5,
    progress: Progress = lambda line: None,
) -> Fit:
    """Measure and fit. The executor must not be serving; its KV is overwritten."""
    executor.warm_up()
    wanted = shapes(executor.capacity)
    passes = time_passes([executor], wanted, repeats=repeats, progress=progress)[0]
    progress("swaps")
    return fit_to(passes, executor, name, repeats=repeats)


def fit_to(passes: list[TimedPass], executor: TorchExecutor, name: str, *, repeats: int = 5) -> Fit:
    """Fit to passes that were timed on this executor, and measure its swaps, if it has host
    memory."""
    records = tuple(timed.record for timed in passes)
    cost = LinearCost.fit(records)
    capacity, pool = executor.capacity, executor.pool
    profile = Profile(
        name=name,
        base=cost.base,
        per_token=cost.per_token,
        per_attention=cost.per_attention,
        per_sequence=cost.per_sequence,
        per_context=cost.per_context,
        swap_seconds_per_block=_swap_seconds(executor, repeats) if capacity.host_blocks else 0.0,
        block_size=capacity.block_size,
        block_bytes=pool.block_bytes,
        blocks=capacity.blocks,
        max_context=capacity.max_context,
        kv_dtype=_KV_DTYPES.get(pool.geometry.dtype, "auto"),
        source=f"measured on {pool.storage.device}, {torch.get_num_threads()} threads, "
        f"weights in {executor.weight_dtype}, KV in {pool.geometry.dtype}; "
        "KV transfer not measured",
    )
    return Fit(profile, records)


def _swap_seconds(executor: TorchExecutor, repeats: int) -> float:
    """Seconds per block, of the slower direction."""
    capacity = executor.capacity
    blocks = range(min(_SWAPPED_BLOCKS, capacity.blocks, capacity.host_blocks))
    sequence = sequence_of(executor, 0, 1)
    swap = Swap(0, sequence, tuple(blocks), tuple(reversed(blocks)))
    ways = (StepPlan((), swap_out=(swap,)), StepPlan((), swap_in=(swap,)))
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats + 1):  # the first takes the memory
        for way, plan in enumerate(ways):
            seconds[way].append(executor.execute(plan).seconds)
    return max(statistics.median(way[1:]) for way in seconds) / len(blocks)
