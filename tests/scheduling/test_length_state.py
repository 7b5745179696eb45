"""What was learnt: kept as bytes, and put together from several learners."""

from __future__ import annotations

import random
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets
from scheduling.length_state import LengthState, StateError

SETTINGS = PredictorSettings(Buckets.geometric(512), warm_up=5, rows=1024, recalled=64)


def teach(predictor: LengthPredictor, seed: int, count: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        word = rng.randrange(8)
        prompt = (word, *(rng.randrange(100, 900) for _ in range(10)))
        predictor.learn(predictor.predict(prompt, 512), 5 + 20 * word)


def taught(seed: int = 1, count: int = 200) -> LengthPredictor:
    predictor = LengthPredictor(SETTINGS)
    teach(predictor, seed, count)
    return predictor


def assert_equal(a: LengthState, b: LengthState) -> None:
    assert a.seen == b.seen
    for name in ("weights", "squares", "tallies", "tags", "lengths"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=2e-3, atol=1e-5)


def test_a_state_survives_as_bytes() -> None:
    predictor = taught()
    copy = LengthPredictor(SETTINGS)
    copy.state = copy.from_bytes(predictor.to_bytes())
    assert_equal(copy.state, predictor.state)
    assert copy.report() == predictor.report()
    prompt = tuple(range(12))
    assert copy.predict(prompt, 512).estimate == predictor.predict(prompt, 512).estimate


def test_a_state_of_thousands_of_requests_takes_a_few_hundred_kilobytes() -> None:
    predictor = LengthPredictor(PredictorSettings(Buckets.geometric(8192)))
    rng = random.Random(3)
    for _ in range(1500):
        prompt = tuple(rng.randrange(100_000) for _ in range(200))
        predictor.learn(predictor.predict(prompt, 8192), rng.randrange(1, 4000))
    assert (predictor.state.squares > 0).sum() > 30_000  # hardly a row is left
    assert len(predictor.to_bytes()) < 400_000


def test_bytes_of_another_setup_or_format_are_refused() -> None:
    data = taught().to_bytes()
    for change in ({"salt": "other"}, {"buckets": Buckets.geometric(256)}, {"rows": 2048}):
        other = LengthPredictor(replace(SETTINGS, **change))
        with pytest.raises(StateError, match="set up differently"):
            other.from_bytes(data)
    with pytest.raises(StateError, match="format"):
        LengthPredictor(SETTINGS).from_bytes(data[:4] + b"\x63\x00" + data[6:])
    with pytest.raises(StateError):
        LengthPredictor(SETTINGS).from_bytes(b"")


@pytest.mark.parametrize("seen", ["Infinity", "NaN", "-1", "null", "[]"])
def test_a_count_that_makes_no_sense_is_refused(seen: str) -> None:
    data = taught(count=20).to_bytes()
    (size,) = struct.unpack_from("<I", data, 6)
    header = data[10 : 10 + size].replace(b'"seen": 20', f'"seen": {seen}'.encode())
    changed = data[:6] + struct.pack("<I", len(header)) + header + data[10 + size :]
    with pytest.raises(StateError):
        LengthPredictor(SETTINGS).from_bytes(changed)


def test_counts_below_zero_are_refused() -> None:
    predictor = taught(count=20)
    predictor.state.tallies[0] = -1.0
    with pytest.raises(StateError):
        predictor.from_bytes(predictor.to_bytes())


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), flip=st.integers(0, 10_000), how=st.booleans())
def test_damaged_bytes_are_refused_and_never_crash(cut: int, flip: int, how: bool) -> None:
    data = taught(count=20).to_bytes()
    if how:
        damaged = data[: cut % len(data)]
    else:
        at = flip % len(data)
        damaged = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
    predictor = LengthPredictor(SETTINGS)
    try:
        predictor.from_bytes(damaged)
    except StateError:
        return
    assert not how  # one flipped bit may be of a number; a cut is always noticed


def test_a_learner_alone_gets_its_own_state_back() -> None:
    predictor = taught(count=100)
    base = predictor.state.copy()
    teach(predictor, 2, 100)
    merged = predictor.merged(predictor.state, base, base)
    assert_equal(merged, predictor.state)


def test_what_one_learner_did_not_learn_comes_from_the_other() -> None:
    base = taught(count=100)
    one, two = LengthPredictor(SETTINGS), LengthPredictor(SETTINGS)
    one.state, two.state = base.state.copy(), base.state.copy()
    teach(one, 2, 150)
    taken = two.merged(two.state, base.state, one.state)
    assert_equal(taken, one.state)


def test_two_learners_add_up() -> None:
    base = taught(count=100)
    one, two = LengthPredictor(SETTINGS), LengthPredictor(SETTINGS)
    one.state, two.state = base.state.copy(), base.state.copy()
    teach(one, 2, 150)
    teach(two, 3, 80)
    both = two.merged(two.state, base.state, one.state)
    assert both.seen == 330
    moved = one.state.weights - base.state.weights + two.state.weights
    np.testing.assert_allclose(both.weights, moved, atol=1e-5)
    # The frequencies are those of one learner that saw the requests one after the other.
    count = len(SETTINGS.buckets)
    alone = LengthPredictor(SETTINGS)
    alone.state = base.state.copy()
    teach(alone, 2, 150)
    teach(alone, 3, 80)
    np.testing.assert_allclose(both.tallies[:count], alone.state.tallies[:count], rtol=1e-9)


def test_learners_that_exchange_predict_better_than_each_alone() -> None:
    """Two learners see each word half as often; together they know it as well as one."""
    shared = LengthPredictor(SETTINGS).state
    learners = [LengthPredictor(SETTINGS) for _ in range(2)]
    bases = [shared.copy(), shared.copy()]
    for turn in range(20):
        for k, learner in enumerate(learners):
            teach(learner, 100 + 2 * turn + k, 20)
            shared = learner.merged(learner.state, bases[k], shared)
            learner.state, bases[k] = shared.copy(), shared.copy()
    alone = taught(seed=50, count=400)
    assert shared.seen == 800
    probe = LengthPredictor(replace(SETTINGS, half_life=400))
    errors = []
    for state in (shared, alone.state):
        probe.state = state.copy()
        rng, error = random.Random(77), 0
        for _ in range(200):
            word = rng.randrange(8)
            prompt = (word, *(rng.randrange(100, 900) for _ in range(10)))
            found = probe.predict(prompt, 512).estimate
            assert found is not None
            error += abs(found.tokens - 5 - 20 * word)
        errors.append(error)
    assert errors[0] < errors[1]
