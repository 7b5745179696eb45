"""What a map of prefixes says of workers, and what it forgets."""

from __future__ import annotations

import random

import pytest

from baton.prefix import block_keys, salt_of
from baton.types import Request, Sampling, Stopping
from scheduling.prefix_map import RENEW_SECONDS, PrefixMap, PromptKeys

TENANT = "tenant"
SALT = salt_of(TENANT, "")


def keys(*tokens: int) -> list[bytes]:
    """Of blocks of one token."""
    return block_keys(tokens, 1, SALT)


@pytest.fixture
def two() -> PrefixMap:
    """Two workers with room for four blocks each."""
    known = PrefixMap()
    known.workers({"a": (1, 4), "b": (1, 4)})
    return known


def test_a_worker_has_as_much_of_a_prompt_as_it_shares_with_an_earlier_one(two: PrefixMap):
    two.note("a", 1, keys(1, 2, 3), 0.0)
    two.note("b", 1, keys(1, 2), 0.0)
    assert two.cached(keys(1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert two.cached(keys(1, 2, 9)) == {"a": 2, "b": 2}
    assert two.cached(keys(1, 9)) == {"a": 1, "b": 1}
    assert two.cached(keys(2, 3)) == {}
    assert two.cached([]) == {}


def test_what_was_not_used_for_longest_is_forgotten_and_ends_before_beginnings(two: PrefixMap):
    two.note("a", 1, keys(1, 2), 0.0)
    two.note("a", 1, keys(3, 4, 5), 0.0)
    assert two.cached(keys(1, 2)) == {"a": 1}
    two.note("a", 1, keys(1), 0.0)
    two.note("a", 1, keys(6), 0.0)
    assert two.cached(keys(3, 4, 5)) == {"a": 2}
    assert two.cached(keys(1)) == {"a": 1}
    assert len(two) == 4
    two.check_integrity()


def test_a_bound_on_all_workers_is_shared_by_them():
    known = PrefixMap(max_keys=6)
    known.workers({"a": (1, 100)})
    known.note("a", 1, keys(1, 2, 3, 4, 5), 0.0)
    known.workers({"a": (1, 100), "b": (1, 100)})
    assert known.cached(keys(1, 2, 3, 4, 5)) == {"a": 3}
    known.check_integrity()


def test_what_a_worker_had_goes_with_it(two: PrefixMap):
    two.note("a", 1, keys(1, 2), 0.0)
    two.note("b", 1, keys(1), 0.0)
    two.workers({"b": (1, 4)})
    assert two.cached(keys(1, 2)) == {"b": 1}
    assert two.note("a", 1, keys(1, 2), 0.0) == []
    two.workers({"b": (2, 4)})  # it has started anew
    assert two.cached(keys(1, 2)) == {}
    two.note("b", 1, keys(1), 0.0)  # said of the one before
    assert len(two) == 0
    two.check_integrity()


def test_others_are_told_what_is_new_and_what_they_would_forget(two: PrefixMap):
    assert two.note("a", 1, keys(1, 2), 0.0) == keys(1, 2)
    assert two.note("a", 1, keys(1, 2, 3), 1.0) == keys(1, 2, 3)[2:]
    assert two.note("b", 1, keys(1), 1.0) == keys(1)
    assert two.note("a", 1, keys(1, 2, 3), RENEW_SECONDS) == keys(1, 2)
    two.hear("b", 1, keys(7), RENEW_SECONDS)
    assert two.note("b", 1, keys(7), RENEW_SECONDS + 1) == []


def test_what_others_tell_counts_like_what_was_noted_here(two: PrefixMap):
    two.hear("a", 1, reversed(keys(1, 2, 3)), 0.0)
    two.hear("b", 2, keys(1), 0.0)  # of an epoch that there is not
    two.hear("c", 1, keys(1), 0.0)
    assert two.cached(keys(1, 2, 3)) == {"a": 3}
    two.hear("a", 1, reversed(keys(4, 5)), 0.0)
    assert two.cached(keys(1, 2, 3)) == {"a": 2}
    two.check_integrity()


def test_both_indexes_agree_after_any_history():
    rng = random.Random(0)
    known = PrefixMap(max_keys=40)
    for _ in range(2000):
        prompt = keys(*(rng.randrange(3) for _ in range(rng.randrange(1, 9))))
        worker, epoch = rng.choice("abc"), rng.randrange(3)
        match rng.randrange(10):
            case 0:
                chosen = rng.sample("abc", rng.randrange(4))
                known.workers({w: (rng.randrange(3), rng.randrange(30)) for w in chosen})
            case 1 | 2:
                known.hear(worker, epoch, reversed(prompt), 0.0)
            case _:
                known.note(worker, epoch, prompt, 0.0)
        known.check_integrity()
        assert all(0 < blocks <= len(prompt) for blocks in known.cached(prompt).values())


def request(*tokens: int, **options: object) -> Request:
    return Request("r", tokens, Sampling(), Stopping(max_tokens=1), tenant="t", **options)  # type: ignore[arg-type]


def test_keys_differ_by_tenant_and_salt_and_there_are_none_past_the_cache():
    def first(one: Request) -> bytes:
        found = PromptKeys.of_request(one)
        assert found is not None
        return found.of(2)[0]

    one = request(1, 2)
    others = [request(1, 2, cache_salt="s"), Request("r", (1, 2), Sampling(), Stopping(1))]
    assert len({first(one), *map(first, others)}) == 3
    assert first(one) == block_keys((1, 2), 2, salt_of("t", ""))[0]
    assert PromptKeys.of_request(request(1, 2, bypass_cache=True)) is None


def test_the_last_token_of_a_prompt_is_always_computed():
    four = PromptKeys((1, 2, 3, 4), TENANT)
    assert len(four.of(2)) == 2
    assert [four.usable(blocks, 2) for blocks in range(3)] == [0, 2, 2]
    assert PromptKeys((1, 2, 3, 4, 5), TENANT).usable(2, 2) == 4


@pytest.mark.parametrize("prompt", [(1,), (1, 2), (1, 2, 3)])
def test_an_output_goes_on_with_the_keys_of_its_prompt_but_for_the_last_token(prompt):
    whole = block_keys((*prompt, 7, 8, 9), 2, SALT)
    assert PromptKeys(prompt, TENANT).with_output(2, (7, 8, 9, 10)) == whole
    assert PromptKeys(prompt, TENANT).with_output(2, (7,)) == block_keys(prompt, 2, SALT)
