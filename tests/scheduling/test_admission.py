from __future__ import annotations

import dataclasses

import pytest

from baton.errors import InvalidRequest
from baton.types import PriorOutput
from scheduling.admission import longest_kv, require_fit
from scheduling.plan import Capacity

CAPACITY = Capacity(blocks=4, block_size=4, max_tokens=8, max_sequences=2, max_context=20)


def refused(request, capacity=CAPACITY) -> list[str]:
    """The fields that are complained about."""
    with pytest.raises(InvalidRequest) as refusal:
        require_fit(request, capacity, longest_kv(request))
    return [violation.field for violation in refusal.value.violations]


def test_the_last_token_needs_no_kv(make_request) -> None:
    request = make_request("r", prompt=13, most=4)
    assert longest_kv(request) == 16
    require_fit(request, CAPACITY, longest_kv(request))


def test_more_kv_than_the_pool_has_can_never_fit(make_request) -> None:
    assert refused(make_request("r", prompt=13, most=5)) == ["stopping.max_tokens"]


def test_prompt_and_output_must_fit_the_context(make_request) -> None:
    roomy = dataclasses.replace(CAPACITY, blocks=100)
    require_fit(make_request("r", prompt=10, most=10), roomy, 19)
    assert refused(make_request("r", prompt=10, most=11), roomy) == ["stopping.max_tokens"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": 0}, "prompt"),
        ({"prompt": 1, "most": 0}, "stopping.max_tokens"),
        ({"prompt": 1, "n": 0}, "sampling.n"),
        ({"prompt": 1, "n": 2, "prior_outputs": (PriorOutput(),)}, "prior_outputs"),
        ({"prompt": 1, "most": 2, "prior_outputs": (PriorOutput((1, 2)),)}, "prior_outputs"),
    ],
)
def test_what_makes_no_sense_is_refused(make_request, fields, field) -> None:
    assert refused(make_request("r", **fields)) == [field]


def test_every_reason_is_named_at_once(make_request) -> None:
    fields = refused(make_request("r", prompt=0, most=0, n=0))
    assert fields == ["prompt", "stopping.max_tokens", "sampling.n"]
