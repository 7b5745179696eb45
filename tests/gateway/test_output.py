from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import Finish, FinishReason, Logprob, Request, Sampling, Stopping
from gateway.job import Job, ResponseFormat
from gateway.output import Ending, SequenceOutput
from gateway.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(model_directory) -> Tokenizer:
    return Tokenizer.load(model_directory)


def output(tokenizer: Tokenizer, *, min_tokens: int = 0, **fields) -> SequenceOutput:
    stopping = Stopping(max_tokens=100, min_tokens=min_tokens)
    request = Request("r", (5, 6), Sampling(), stopping)
    return SequenceOutput(0, Job(request, "tenant", 1.0, **fields), tokenizer)


def drain(sequence: SequenceOutput) -> str:
    text = ""
    while (delta := sequence.take()) is not None:
        text += delta.text
    return text


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_an_end_of_sequence_token_leaves_no_text(tokenizer):
    sequence = output(tokenizer, response=ResponseFormat(skip_special_tokens=False))
    tokens = [*ids(tokenizer, "done"), 1]
    sequence.push(tokens, (), Finish(FinishReason.STOP, 1, is_eos=True), 0.0)
    assert drain(sequence) == "done"
    assert sequence.ending == Ending(FinishReason.STOP, token_id=1, is_eos=True)
    assert len(sequence.token_ids) == len(tokens)


def test_include_stop_keeps_the_text_of_a_stop_token(tokenizer):
    tokens = ids(tokenizer, "ab")
    sequence = output(tokenizer, include_stop=True)
    sequence.push(tokens, (), Finish(FinishReason.STOP, tokens[-1]), 0.0)
    assert drain(sequence) == "ab"


def test_a_stop_string_beats_the_length_limit_and_drops_what_follows(tokenizer):
    sequence = output(tokenizer, stop_strings=("END",))
    tokens = ids(tokenizer, "text END more")
    sequence.push(tokens, (), Finish(FinishReason.LENGTH), 0.0)
    assert drain(sequence) == "text "
    assert sequence.ending == Ending(FinishReason.STOP, stop="END")
    assert len(sequence.token_ids) < len(tokens)
    sequence.push(tokens, (), None, 1.0)
    assert drain(sequence) == ""


def test_stop_strings_do_not_count_before_min_tokens(tokenizer):
    tokens = ids(tokenizer, "x!y!z")
    sequence = output(tokenizer, stop_strings=("!",), min_tokens=2)
    for token in tokens:
        sequence.push([token], (), None, 0.0)
    assert drain(sequence) == "x!y"
    assert sequence.ending == Ending(FinishReason.STOP, stop="!")


def test_held_back_text_comes_out_at_the_end(tokenizer):
    sequence = output(tokenizer, stop_strings=("ab!",))
    sequence.push(ids(tokenizer, "xab"), (), None, 0.0)
    assert sequence.take().text == "x"
    sequence.end(FinishReason.ABORTED)
    delta = sequence.take()
    assert (delta.text, delta.token_count) == ("ab", 0)
    assert sequence.take() is None


def test_no_empty_delta_comes_when_no_text_is_wanted(tokenizer):
    sequence = output(tokenizer, stop_strings=("never",), response=ResponseFormat(text=False))
    sequence.push(ids(tokenizer, "nev"), (), None, 0.0)
    assert sequence.take() is not None
    sequence.end(FinishReason.TIME_LIMIT)
    assert sequence.take() is None


def test_stop_strings_work_when_no_text_is_wanted(tokenizer):
    sequence = output(
        tokenizer, stop_strings=("!",), response=ResponseFormat(text=False, token_ids=True)
    )
    sequence.push(ids(tokenizer, "a!b"), (), None, 0.0)
    delta = sequence.take()
    assert delta.text == ""
    assert list(delta.token_ids) == ids(tokenizer, "a!")
    assert sequence.ending is not None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(5, 399), min_size=1, max_size=40),
    st.lists(st.integers(1, 7), max_size=20),
    st.integers(1, 9),
)
def test_deltas_add_up_however_they_are_taken(tokenizer, tokens, steps, interval):
    wanted = ResponseFormat(token_ids=True, stream_interval=interval)
    sequence = output(tokenizer, response=wanted)
    deltas, rest, now = [], list(tokens), 0.0
    for step in [*steps, len(tokens)]:
        batch, rest = rest[:step], rest[step:]
        entries = [Logprob(token, -1.0, 1) for token in batch]
        finish = None if rest else Finish(FinishReason.LENGTH)
        if batch:
            sequence.push(batch, entries, finish, now)
        while (delta := sequence.take()) is not None:
            deltas.append(delta)
        now += 1.0
    assert [token for delta in deltas for token in delta.token_ids] == tokens
    assert [entry.token_id for delta in deltas for entry in delta.logprobs] == tokens
    assert sum(delta.token_count for delta in deltas) == len(tokens)
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(tokens)
    assert all(delta.token_count >= interval for delta in deltas[1:-1])
