"""Routing: who is named first, and why."""

import pytest

from baton.errors import ConfigError
from scheduling.routing import ROUTERS, Candidate, make_router


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


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="kv-aware"):
        make_router("random")
