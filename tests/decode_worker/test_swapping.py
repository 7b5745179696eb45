"""KV goes to the host and comes back while requests come, go and leave, and no token is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from baton.types import Request
from queueing.contract import Verdict
from scheduling.plan import Capacity, StepPlan, StepResult, Swap
from scheduling.rules import Rules
from scheduling.sequence import Phase
from tests.decode_worker.conftest import CAPACITY, Pair, expected, request

TIGHT = replace(CAPACITY, blocks=16, host_blocks=64)  # 64 tokens on the device
PROACTIVE, REACTIVE = (Rules(preemption="swap", swapping=how) for how in ("proactive", "reactive"))


def pair_of(rules: Rules, capacity: Capacity = TIGHT, **options: Any) -> Pair:
    """Workers that run out of KV blocks."""
    options = {"step_seconds": 0.001, "swap_seconds_per_block": 0.0003} | options
    return Pair(capacity, rules=rules, **options)


def requests() -> dict[int, Request]:
    """Each fits, two hardly, all of them never."""
    return {slot: request(f"r{slot}", 5 + 2 * slot, new=20 + 3 * slot) for slot in range(1, 6)}


class Watch:
    """Sees the swaps of a pair's decode worker go by."""

    def __init__(self, pair: Pair) -> None:
        self.swaps: dict[int, tuple[str, Swap]] = {}
        self.done: set[int] = set()
        self._execute = pair.executors[1].execute
        pair.executors[1].execute = self.execute  # type: ignore[method-assign]

    def execute(self, plan: StepPlan) -> StepResult:
        """In the executor's place."""
        self.swaps |= {swap.number: ("out", swap) for swap in plan.swap_out}
        self.swaps |= {swap.number: ("in", swap) for swap in plan.swap_in}
        result = self._execute(plan)
        self.done.update(result.swapped)
        return result

    def in_phase(self, phase: Phase) -> Iterator[int]:
        """The slots whose sequence was swapped and is in `phase` now."""
        for _, swap in list(self.swaps.values()):
            if swap.sequence.phase is phase:
                yield int(swap.sequence.request.id.rpartition("/")[2])


@pytest.mark.parametrize("policy", ["fcfs", "skip-join-mlfq"])
@pytest.mark.parametrize("rules", [PROACTIVE, REACTIVE, Rules(preemption="auto")])
async def test_requests_that_do_not_fit_together_get_the_tokens_they_must(
    rules: Rules, policy: str
) -> None:
    async with pair_of(rules, policy=policy) as pair:
        for slot, one in requests().items():
            pair.start(slot, one, local=True)
        for slot, one in requests().items():
            assert (await pair.finished(slot)).tokens[0] == expected(one), slot
        await pair.all_free()
        counters = pair.schedulers[1].counters
        preemptions = counters.swapped_out + counters.recomputed
        assert preemptions > 0
        if rules.preemption == "swap":
            assert counters.swapped_out > 0
            assert counters.swapped_in > 0


async def test_a_full_host_pool_leaves_recomputation() -> None:
    async with pair_of(REACTIVE, replace(TIGHT, host_blocks=3)) as pair:
        for slot, one in requests().items():
            pair.start(slot, one, local=True)
        for slot, one in requests().items():
            assert (await pair.finished(slot)).tokens[0] == expected(one), slot
        await pair.all_free()
        assert pair.schedulers[1].counters.recomputed > 0


@pytest.mark.parametrize("how", ["abort", "stale claim"])
@pytest.mark.parametrize("phase", [Phase.LEAVING, Phase.SWAPPED, Phase.RETURNING])
async def test_a_request_that_ends_in_mid_swap_frees_all_and_disturbs_nobody(
    phase: Phase, how: str
) -> None:
    async with pair_of(PROACTIVE, swap_seconds_per_block=0.005) as pair:
        watch, many = Watch(pair), requests()
        for slot, one in many.items():
            pair.start(slot, one, local=True)
        await pair.until(lambda: any(watch.in_phase(phase)))
        gone = next(iter(watch.in_phase(phase)), None)
        assert gone is not None
        if how == "abort":
            pair.decode.abort(pair.link, [gone])
        else:
            entry = next(e for e in pair.decode.progress() if e.fence == gone)
            pair.decode.drop(entry, Verdict.STALE)
        for slot in many.keys() - {gone}:
            assert (await pair.finished(slot)).tokens[0] == expected(many[slot]), slot
        await pair.all_free()
        assert not pair.heard[gone].finished
        assert pair.decode.idle


async def test_a_gateway_that_leaves_in_mid_swap_takes_its_requests_along() -> None:
    async with pair_of(PROACTIVE, swap_seconds_per_block=0.01) as pair:
        watch = Watch(pair)
        for slot, one in requests().items():
            pair.start(slot, one, local=True)
        await pair.until(lambda: any(watch.in_phase(Phase.LEAVING)))
        load, sample = pair.decode.load(), pair.registry.get_sample_value
        assert load.swapped > 0
        assert load.host_blocks > 0
        assert sample("baton_decode_sequences_swapped") is not None
        assert sample("baton_decode_kv_host_blocks_used") is not None
        pair.decode.disconnect(pair.link)
        assert pair.decode.idle
        await pair.all_free()
        assert watch.done == watch.swaps.keys()
        assert (pair.decode.load().swapped, pair.decode.load().host_blocks) == (0, 0)


async def test_kv_is_swapped_beside_hand_offs() -> None:
    async with pair_of(PROACTIVE) as pair:
        for slot, one in requests().items():
            pair.start(slot, one, local=slot < 4)
            if slot >= 4 and pair.heard[slot].event("failed") is None:
                await pair.until(lambda slot=slot: pair.heard[slot].events)
                if pair.heard[slot].event("reserved"):
                    await pair.hand_off(slot, one)
        for slot, one in requests().items():
            if slot < 4 or pair.heard[slot].event("reserved"):
                assert (await pair.finished(slot)).tokens[0] == expected(one), slot
        await pair.all_free()


async def test_what_is_swapped_and_preempted_is_counted() -> None:
    async with pair_of(REACTIVE) as pair:
        for slot, one in requests().items():
            pair.start(slot, one, local=True)
        for slot in requests():
            await pair.finished(slot)
        await pair.all_free()
        counters = pair.schedulers[1].counters

        def value(name: str, **labels: str) -> float | None:
            return pair.registry.get_sample_value(f"baton_decode_{name}_total", labels)

        assert value("preemptions", kind="swap") == counters.swapped_out > 0
        assert value("preemptions", kind="recompute") == counters.recomputed
        assert value("kv_swap_bytes", direction="out") == counters.blocks_out * 16 > 0
        assert value("kv_swap_bytes", direction="in") == counters.blocks_in * 16 > 0
        assert value("swap_stalls") == counters.waits + counters.stalls > 0
        assert value("length_mispredictions") == 0
