from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tokenizer import Tokenizer

TEXT = st.text(max_size=60) | st.sampled_from(
    ["🙂👩‍👩‍👧 the é", "  leading", "敏捷的棕色狐狸", "a\u0301\u0302", "\U0001f1fa\U0001f1f3"]
)


def stream(tokenizer: Tokenizer, prompt, ids, *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_prompt_and_streamed_text_join_to_the_decoded_whole(backends, kind):
    tokenizer = Tokenizer(backends[kind])

    @settings(max_examples=100, deadline=None)
    @given(TEXT.map(lambda text: "the " + text), st.data())
    def check(text, data):
        ids = tokenizer.encode(text, add_special_tokens=False)
        cut = data.draw(st.integers(1, len(ids)))
        whole = tokenizer.decode(ids)
        pieces = stream(tokenizer, ids[:cut], ids[cut:])
        head = tokenizer.decode(ids[:cut])
        if "\ufffd" not in head:  # else the cut went through a character
            assert head + "".join(pieces) == whole
            assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)

    check()


@given(st.lists(st.integers(0, 399), max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_byte_level_ids_stream_to_what_decode_gives(backends, ids, skip):
    tokenizer = Tokenizer(backends["byte-level"])
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, [], ids, skip=skip)) == expected


def test_word_pieces_keep_the_space_between_prompt_and_output(backends):
    tokenizer = Tokenizer(backends["word-piece"])
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog" * 5)
    for cut in range(1, len(ids)):
        head = tokenizer.decode(ids[:cut])
        assert head + "".join(stream(tokenizer, ids[:cut], ids[cut:])) == tokenizer.decode(ids)


def test_a_character_is_shown_only_when_complete(backends):
    for kind in ("byte-level", "byte-fallback"):
        tokenizer = Tokenizer(backends[kind])
        ids = tokenizer.encode("🙈", add_special_tokens=False)
        *before, last, tail = stream(tokenizer, [], ids)
        assert (set(before) <= {"", " "}, last, tail) == (True, "🙈", "")


def test_an_unfinished_character_ends_as_a_replacement(backends):
    tokenizer = Tokenizer(backends["byte-level"])
    ids = tokenizer.encode("🙈", add_special_tokens=False)[:-1]
    assert "".join(stream(tokenizer, [], ids)) == "\ufffd"


def test_special_tokens_are_dropped_only_if_asked(backends):
    tokenizer = Tokenizer(backends["byte-level"])
    ids = [*tokenizer.encode("ab", add_special_tokens=False), 1]
    assert "".join(stream(tokenizer, [], ids, skip=True)) == "ab"
    assert "".join(stream(tokenizer, [], ids, skip=False)) == "ab</s>"


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "word-piece"])
def test_work_per_token_does_not_grow(backends, kind):
    tokenizer = Tokenizer(backends[kind])
    rng = random.Random(0)
    detokenizer = tokenizer.detokenizer([], skip_special_tokens=True)
    size = 150 if kind == "word-piece" else 250
    ids = [rng.randrange(size) for _ in range(20_000)]
    started = time.process_time()
    for token in ids:
        detokenizer.push(token)
    assert time.process_time() - started < 10  # quadratic work would take minutes
