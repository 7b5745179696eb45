"""Routing: who is named first, and why."""

from dataclasses import replace

import pytest

from baton.errors import ConfigError
from scheduling.routing import ROUTERS, Candidate, cached_that_count, make_router


def ids(name: str, *candidates: Candidate, blocks: int = 1) -> list[str]:
    return [one.id for one in make_router(name).rank(candidates, blocks)]


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_names_all_candidates_whatever_their_order(name):
    three = [Candidate(str(i), sequences=i % 2, free_blocks=i) for i in range(3)]
    assert sorted(ids(name, *three)) == ["0", "1", "2"]
    assert ids(name, *three) == ids(name, *reversed(three))
    assert ids(name) == []


def test_round_robin_takes_turns_whoever_comes_and_goes():
    router = make_router("round-robin")
    three = [Candidate(name) for name in "abc"]
    assert [router.rank(three, 1)[0].id for _ in range(4)] == ["a", "b", "c", "a"]
    assert router.rank([three[0], three[2]], 1)[0].id == "c"  # b left
    assert [one.id for one in router.rank(three, 1)] == ["a", "b", "c"]


def test_least_outstanding_looks_at_sequences_then_at_prompts():
    few, many = Candidate("b", sequences=1, queued_tokens=9), Candidate("a", sequences=2)
    assert ids("least-outstanding", many, few) == ["b", "a"]
    assert ids("least-outstanding", Candidate("a", 1, 10), few) == ["b", "a"]


def test_kv_aware_prefers_room_for_the_predicted_kv_to_a_short_queue():
    full = Candidate("a", sequences=0, free_blocks=3)
    roomy = Candidate("b", sequences=9, free_blocks=8)
    assert ids("kv-aware", full, roomy, blocks=4) == ["b", "a"]
    assert ids("kv-aware", full, roomy, blocks=3) == ["a", "b"]


def test_kv_aware_prefers_a_place_in_the_batch_to_less_predicted_work():
    long = Candidate("a", sequences=7, free_blocks=9, outstanding_tokens=900, slots=8)
    busy = Candidate("b", sequences=8, free_blocks=9, outstanding_tokens=60, slots=8)
    busier = Candidate("c", sequences=9, free_blocks=9, outstanding_tokens=30, slots=8)
    assert ids("kv-aware", busier, busy, long) == ["a", "b", "c"]
    assert ids("kv-aware", busy, long, blocks=10) == ["a", "b"]


def test_kv_aware_counts_predicted_tokens_where_all_are_known():
    long = Candidate("a", sequences=1, free_blocks=9, outstanding_tokens=500)
    short = Candidate("b", sequences=3, free_blocks=9, outstanding_tokens=60)
    assert ids("kv-aware", long, short) == ["b", "a"]
    unknown = Candidate("c", sequences=2, free_blocks=9)
    assert ids("kv-aware", long, short, unknown) == ["a", "c", "b"]


def test_a_prompt_token_weighs_less_than_a_generated_one():
    prompts = Candidate("a", 1, queued_tokens=512, free_blocks=9, outstanding_tokens=0)
    outputs = Candidate("b", 1, free_blocks=9, outstanding_tokens=16)
    assert ids("kv-aware", outputs, prompts) == ["a", "b"]


def test_prefix_aware_is_kv_aware_where_nobody_has_any_of_the_prompt():
    busy = Candidate("a", sequences=8, free_blocks=9, outstanding_tokens=60, slots=8)
    long = Candidate("b", sequences=7, free_blocks=9, outstanding_tokens=900, slots=8)
    full = Candidate("c", sequences=0, free_blocks=0, outstanding_tokens=0, slots=8)
    assert ids("prefix-aware", busy, full, long) == ids("kv-aware", busy, full, long)


def test_prefix_aware_prefers_who_has_the_prompt_until_its_work_outweighs_that():
    idle = Candidate("a", free_blocks=9, outstanding_tokens=0)
    has = Candidate("b", 3, 100, free_blocks=9, outstanding_tokens=399, cached_tokens=500)
    assert ids("prefix-aware", idle, has) == ["b", "a"]
    swamped = replace(has, outstanding_tokens=401)
    assert ids("prefix-aware", idle, swamped) == ["a", "b"]


def test_prefix_aware_counts_who_waits_for_a_place_twice():
    idle = Candidate("a", free_blocks=9, outstanding_tokens=0, slots=8)
    has = Candidate("b", 10, 0, 9, outstanding_tokens=100, slots=11, cached_tokens=125)
    assert ids("prefix-aware", idle, has) == ["b", "a"]
    assert ids("prefix-aware", idle, replace(has, slots=8)) == ["a", "b"]  # 100 and 3 times 10


def test_prefix_aware_prefers_room_to_a_cached_prompt():
    full = Candidate("a", free_blocks=3, outstanding_tokens=0, cached_tokens=9000)
    roomy = Candidate("b", 9, free_blocks=8, outstanding_tokens=900)
    assert ids("prefix-aware", full, roomy, blocks=4) == ["b", "a"]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="kv-aware"):
        make_router("random")


def test_beside_helpers_a_decode_worker_s_cache_counts_if_it_would_compute_the_rest_at_once():
    cached = {"helper": 16, "nearly all": 90, "too little": 89, "full": 90}
    assert cached_that_count(cached, 90, {"helper"}, lambda id: id != "full") == {
        "helper": 16,
        "nearly all": 90,
    }
