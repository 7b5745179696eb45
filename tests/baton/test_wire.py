"""Everything that travels between our processes arrives as it left."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baton import wire
from baton.types import (
    Claim,
    Finish,
    FinishReason,
    KvRef,
    LengthEstimate,
    Load,
    Logprob,
    Output,
    PriorOutput,
    Request,
    Sampling,
    Stopping,
)

token = st.integers(0, 2**32 - 1)
tokens = st.lists(token, max_size=5).map(tuple)
f32 = st.floats(0, 2, width=32)

samplings = st.builds(
    Sampling,
    n=st.integers(1, 16),
    temperature=f32,
    top_k=st.integers(0, 100),
    top_p=f32,
    min_p=f32,
    presence_penalty=f32,
    frequency_penalty=f32,
    repetition_penalty=f32,
    seed=st.integers(0, 2**64 - 1),
    logit_bias=st.dictionaries(token, f32, max_size=3).map(lambda d: tuple(sorted(d.items()))),
    allowed_token_ids=tokens,
)
stoppings = st.builds(
    Stopping,
    max_tokens=st.integers(1, 2**31),
    min_tokens=st.integers(0, 2**31),
    stop_token_ids=st.frozensets(token, max_size=3),
    eos_token_ids=st.frozensets(token, max_size=3),
)
requests = st.builds(
    Request,
    id=st.text(max_size=20).filter(lambda s: s.isascii()),
    prompt_ids=st.lists(token, min_size=1, max_size=9).map(tuple),
    sampling=samplings,
    stopping=stoppings,
    priority=st.integers(-(2**31), 2**31 - 1),
    tenant=st.text(max_size=16),
    level=st.integers(0, 15),
    arrived_at=st.just(5.0),
    waited=st.integers(0, 1000).map(float),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    prior_outputs=st.lists(st.builds(PriorOutput, tokens, st.booleans()), max_size=3).map(tuple),
    deadline=st.none() | st.integers(5, 1000).map(float),
    estimate=st.none() | st.builds(LengthEstimate, st.integers(0, 2**31), st.integers(0, 2**31)),
    cache_salt=st.text(max_size=3),
    bypass_cache=st.booleans(),
)
logprobs = st.builds(
    Logprob,
    token_id=token,
    logprob=st.floats(-50, 0, width=32),
    rank=st.integers(1, 1000),
    top=st.lists(st.tuples(token, st.floats(-50, 0, width=32)), max_size=3).map(tuple),
)
finishes = st.none() | st.sampled_from(
    [
        Finish(FinishReason.STOP, 0, is_eos=True),
        Finish(FinishReason.STOP, 0),
        Finish(FinishReason.STOP, 7),
        Finish(FinishReason.LENGTH),
    ]
)
outputs = st.builds(
    Output,
    request_id=st.just("r"),
    index=st.integers(0, 15),
    token_ids=tokens,
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish=finishes,
)


@given(requests)
def test_a_request_arrives_as_it_left(request: Request) -> None:
    assert wire.request_from_proto(wire.request_to_proto(request, now=5.0), now=5.0) == request


def test_a_request_ages_on_its_way() -> None:
    request = Request("r", (1,), Sampling(), Stopping(4), arrived_at=100.0, waited=2.0)
    there = wire.request_from_proto(wire.request_to_proto(request, now=103.0), now=7.0)
    assert (there.arrived_at, there.waited) == (7.0, 5.0)


@given(outputs, st.integers(0, 99))
def test_an_output_arrives_as_it_left(output: Output, slot: int) -> None:
    message = wire.output_to_proto(output, slot)
    assert message.slot == slot
    assert wire.output_from_proto(message, "r") == output


@given(st.floats(0, 1e6))
def test_durations_keep_their_nanoseconds(value: float) -> None:
    assert np.isclose(wire.seconds(wire.duration(value)), value, rtol=1e-12, atol=2e-9)


def test_a_duration_is_never_negative() -> None:
    assert wire.seconds(wire.duration(-0.001)) == 0


def test_references_claims_and_loads_arrive_as_they_left() -> None:
    ref = KvRef(b"\x00\xff" * 8, "127.0.0.1:1", "engine", "digest", 3, 40, 29.5)
    assert wire.kv_ref_from_proto(wire.kv_ref_to_proto(ref)) == ref
    claim = Claim(fence=2**60, attempt=3)
    assert wire.claim_from_proto(wire.claim_to_proto(claim)) == claim
    load = Load(1, 2, 3, 4, draining=True)
    assert wire.load_from_proto(wire.load_to_proto(load)) == load


def test_the_first_prompt_token_has_no_logprob() -> None:
    first, second = wire.prompt_logprobs_to_proto([5, 6], [Logprob(6, -1.5, 2)])
    assert not first.HasField("logprob")
    assert (first.token_id, second.token_id, second.logprob) == (5, 6, -1.5)
