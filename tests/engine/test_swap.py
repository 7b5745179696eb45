"""Swapping KV to host memory and back, by plans made by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from baton.errors import ConfigError
from engine.executor import ExecutorBroken
from engine.load import load_executor
from engine.model.host_pool import HostPool
from engine.model.pool import KvGeometry, KvPool
from engine.model.runner import TorchExecutor
from engine.model.swap import Swapper
from scheduling.plan import Chunk, StepPlan, StepResult, Swap
from scheduling.sequence import Sequence

GEOMETRY = KvGeometry("model", 2, 1, 4, "bfloat16", 4, 2)  # 128 bytes a block
MEMORY = 2**18


def prompt(length: int, seed: int) -> list[int]:
    """A prompt of its own."""
    return [3 + (seed * 31 + i * 7) % 190 for i in range(length)]


@pytest.fixture
def drive_swapping(drive: Callable[..., Any], tiny: Callable[..., Any]) -> Iterator[Any]:
    """A driver with a host pool, and its model."""
    drivers = []

    def make(name: str = "llama", **options: Any) -> Any:
        model = tiny(name)
        drivers.append(drive(model.path, host_kv_memory=MEMORY, **options))
        return model, drivers[-1]

    yield make
    for driver in drivers:
        driver.executor.close()


class Swaps:
    """Moves a driver's sequences out and in again."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.executor: TorchExecutor = driver.executor
        self.free_host = list(range(self.executor.capacity.host_blocks))
        self.number = 0

    def out(self, s: Sequence) -> Swap:
        """A swap out; the driver does not run the sequence meanwhile."""
        self.driver.running.remove(s)
        s.host_blocks = [self.free_host.pop() for _ in s.blocks]
        return self._swap(s)

    def back(self, s: Sequence) -> Swap:
        """A swap in, to other blocks."""
        s.blocks = [self.driver.free.pop() for _ in s.host_blocks]
        return self._swap(s)

    def left(self, s: Sequence) -> None:
        """Its swap out is complete: spoil its blocks and let others have them."""
        for block in s.blocks:
            self.executor.pool.storage[block].fill_(3.0)
        self.driver.free = s.blocks + self.driver.free
        s.blocks = []

    def returned(self, s: Sequence) -> None:
        """Its swap in is complete: it goes on."""
        self.free_host += s.host_blocks
        s.host_blocks = []
        self.driver.running.append(s)

    def _swap(self, s: Sequence) -> Swap:
        self.number += 1
        return Swap(self.number, s, tuple(s.blocks), tuple(s.host_blocks))


def run_beside(driver: Any, number: int, plan: StepPlan) -> StepResult:
    """Begin swaps in a plan without chunks, and wait until one of a number is complete."""
    result: StepResult = driver.executor.execute(plan)
    while number not in result.swapped:
        driver.step()
        result = driver.results[-1][1]
    return result


@pytest.mark.parametrize("name", ["llama", "mistral-window", "opt", "rope-dynamic"])
@pytest.mark.parametrize("length", [31, 32, 37])
def test_a_sequence_that_was_away_generates_what_transformers_does(
    name: str, length: int, drive_swapping: Callable[..., Any]
) -> None:
    model, driver = drive_swapping(name)
    swaps = Swaps(driver)
    texts = [prompt(length, seed=1), prompt(20, seed=2)]
    away, other = (driver.add(text, 24) for text in texts)
    for _ in range(4):
        driver.step()
    swap = swaps.out(away)
    run_beside(driver, swap.number, StepPlan((), swap_out=(swap,)))
    swaps.left(away)
    for _ in range(3):
        driver.step()
    swap = swaps.back(away)
    run_beside(driver, swap.number, StepPlan((), swap_in=(swap,)))
    swaps.returned(away)
    driver.run()
    for text, sequence in zip(texts, (away, other), strict=True):
        assert sequence.generated == 24
        model.assert_generates(text, sequence.tokens[len(text) :])


def test_two_that_take_turns_in_the_same_blocks_do_not_disturb_each_other(
    drive_swapping: Callable[..., Any],
) -> None:
    """Reactive: the pass waits, and runs in the blocks that its own swap out has freed."""
    model, driver = drive_swapping(kv_blocks=4)
    swaps = Swaps(driver)
    texts = [prompt(40, seed=1), prompt(40, seed=2)]
    first, second = (driver.add(text, 20) for text in texts)
    driver.running = [first]
    for _ in range(2):
        driver.step()
    swap = swaps.out(first)
    driver.executor.execute(StepPlan((), swap_out=(swap,), swaps_first=True))
    driver.free += first.blocks
    first.blocks, driver.running = [], [second]
    driver.step()
    for here, there in ((second, first), (first, second), (second, first)):
        out = swaps.out(here)
        driver.free += here.blocks
        here.blocks = []
        back = swaps.back(there)
        assert set(back.device) & set(out.device)
        plan = StepPlan(
            (Chunk(there, there.computed, 1, sample=True),),
            swap_out=(out,),
            swap_in=(back,),
            swaps_first=True,
        )
        result = driver.executor.execute(plan)
        assert sorted(result.swapped) == [out.number, back.number]
        swaps.returned(there)
        there.computed += 1
        there.append(result.sampled[0].token_id)
    driver.run()
    swap = swaps.back(second)
    driver.executor.execute(StepPlan((), swap_in=(swap,)))
    swaps.returned(second)
    driver.run()
    for text, sequence in zip(texts, (first, second), strict=True):
        model.assert_generates(text, sequence.tokens[len(text) :])


def test_a_block_that_came_back_is_not_cleared_when_the_next_token_begins_a_block(
    drive_swapping: Callable[..., Any],
) -> None:
    """31 tokens of KV and a full second block to come, and then the first of the third."""
    model, driver = drive_swapping(block_size=16)
    swaps, text = Swaps(driver), prompt(31, seed=3)
    sequence = driver.add(text, 8)
    for _ in range(2):
        driver.step()  # 32 tokens of KV now
    for _ in range(3):
        swap = swaps.out(sequence)
        driver.executor.execute(StepPlan((), swap_out=(swap,)))
        swaps.left(sequence)
        swap = swaps.back(sequence)
        driver.executor.execute(StepPlan((), swap_in=(swap,)))
        swaps.returned(sequence)
        driver.step()
    driver.run()
    model.assert_generates(text, sequence.tokens[len(text) :])


def test_a_pass_that_breaks_still_swaps_and_a_later_result_says_so(
    drive_swapping: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, driver = drive_swapping()
    swaps = Swaps(driver)
    away, other = driver.add(prompt(20, 1), 4), driver.add(prompt(20, 2), 4)
    driver.step()
    swap, forward = swaps.out(away), driver.executor.model.forward
    monkeypatch.setattr(driver.executor.model, "forward", None)
    plan = StepPlan((Chunk(other, other.computed, 1, sample=True),), swap_out=(swap,))
    with pytest.raises(TypeError):
        driver.executor.execute(plan)
    monkeypatch.setattr(driver.executor.model, "forward", forward)
    assert driver.executor.execute(StepPlan(())).swapped == (swap.number,)


def test_the_host_pool_follows_from_its_memory(tiny: Callable[..., Any]) -> None:
    executor = load_executor(tiny("llama").path, threads=1, kv_blocks=2, host_kv_memory=MEMORY)
    assert executor.capacity.host_blocks == MEMORY // executor.pool.block_bytes > 0
    assert load_executor(tiny("llama").path, threads=1, kv_blocks=2).capacity.host_blocks == 0
    executor.close()


# -- The swapper alone -------------------------------------------------------------------------


def pools(blocks: int = 8, **options: Any) -> tuple[KvPool, Swapper]:
    """A pool of recognizable blocks, and its swapper."""
    pool = KvPool(GEOMETRY, blocks)
    for block in range(blocks):
        pool.storage[block].fill_(block + 1)
    return pool, Swapper.of(pool, 16, **options)


def swap(number: int, device: list[int], host: list[int]) -> Swap:
    """A swap of nobody in particular."""
    return Swap(number, None, tuple(device), tuple(host))  # type: ignore[arg-type]


def test_blocks_come_back_in_order_and_no_other_block_is_touched() -> None:
    pool, swapper = pools()
    before = pool.storage.clone()
    out, back = swap(1, [5, 0, 3], [9, 2, 15]), swap(2, [1, 2, 7], [9, 2, 15])
    swapper.swap_out([out])
    swapper.wait_for([out])
    assert torch.equal(pool.storage, before)
    swapper.swap_in([back])
    swapper.wait_for([back])
    assert pool.storage[:, 0, 0, 0, 0, 0].tolist() == [1, 6, 1, 4, 5, 6, 7, 4]
    assert swapper.collect() == (1, 2)
    assert swapper.collect() == ()
    swapper.close()


def test_each_direction_keeps_its_order_and_nothing_is_named_twice() -> None:
    _, swapper = pools()
    outs = [swap(number, [number], [number]) for number in range(8)]
    swapper.swap_out(outs)
    collected: list[int] = []
    while len(collected) < 8:
        swapper.wait_for_any()
        collected += swapper.collect()
    assert collected == list(range(8))
    swapper.wait_for_any()  # nothing is under way: returns
    swapper.close()


def test_bandwidth_bounds_each_direction() -> None:
    _, swapper = pools(bandwidth=128 / 0.02)  # 20 ms a block
    begun = time.perf_counter()
    swaps = [swap(1, [0], [0]), swap(2, [1], [1])]
    swapper.swap_out(swaps)
    swapper.wait_for(swaps)
    assert time.perf_counter() - begun >= 0.04
    swapper.close()


def test_close_gives_up_what_is_queued_and_ends_the_threads() -> None:
    _, swapper = pools(bandwidth=0.001)  # a day a block
    before = threading.active_count()
    swapper.swap_out([swap(1, [0], [0])])
    swapper.swap_in([swap(2, [1], [1])])
    assert threading.active_count() == before + 2
    swapper.close()
    swapper.close()
    assert threading.active_count() == before


def test_kv_that_is_lost_on_the_way_breaks_the_executor_for_good() -> None:
    _, swapper = pools()
    lost = swap(1, [0], [16])  # no such host block
    swapper.swap_out([lost])
    for call in (lambda: swapper.wait_for([lost]), swapper.wait_for_any, swapper.collect):
        with pytest.raises(ExecutorBroken):
            call()
    swapper.close()


def test_a_device_that_cannot_be_copied_from_is_refused_only_if_swapping_is_wanted() -> None:
    pool = KvPool(GEOMETRY, 1, device="meta")
    Swapper.of(pool, 0)
    with pytest.raises(ConfigError, match="host-kv-memory"):
        Swapper.of(pool, 1)


def test_host_memory_is_taken_slab_by_slab() -> None:
    host = HostPool(GEOMETRY, 1_000_000, pinned=False)  # 128 MB
    assert host.allocated == 0
    host.block(0)
    slab = host.allocated
    assert slab == 32 * 2**20 // GEOMETRY.block_bytes
    host.block(slab - 1)
    assert host.allocated == slab
    host.block(999_999)
    assert host.allocated == slab + 1_000_000 % slab
    with pytest.raises(IndexError):
        host.block(1_000_000)
