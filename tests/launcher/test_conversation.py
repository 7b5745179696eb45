from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from launcher.conversation import Conversation, Exchange, WordWrap


def wrapped(text: str, width: int, size: int = 3) -> str:
    """`text` fed in pieces of `size`."""
    wrap = WordWrap(width)
    shown = [wrap.feed(text[i : i + size]) for i in range(0, len(text), size)]
    return "".join(shown) + wrap.end()


def test_a_chat_is_system_then_turns_then_the_new_one():
    conversation = Conversation("be brief", [Exchange("one", "1"), Exchange("two", "2")])
    assert [(turn["role"], turn["content"]) for turn in conversation.messages("three")] == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "1"),
        ("user", "two"),
        ("assistant", "2"),
        ("user", "three"),
    ]
    assert Conversation().messages("one") == [{"role": "user", "content": "one"}]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four", "one two\nthree four"),
        ("one\n  two three", "one\n  two\nthree"),
        ("one\n\ntwo", "one\n\ntwo"),
        ("abcdefghijklmno pq", "abcdefghijklmno pq"),  # the terminal breaks it: pq is at column 6
        ("\tif x:", "    if x:"),
        ("日本語日本語", "日本語日本\n語"),
        ("re\x1b[31md\x07", "re[31md"),
        ("end ", "end"),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_lines_are_broken_between_words(text: str, shown: str, size: int):
    assert wrapped(text, 10, size) == shown


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("aé語", min_size=1, max_size=6), max_size=30), st.integers(1, 20))
def test_wrapping_keeps_every_word_and_the_width(words: list[str], size: int):
    shown = wrapped(" ".join(words), 12, size)
    assert shown.replace("\n", "").replace(" ", "") == "".join(words)
    assert all(cell_len(line) <= 12 for line in shown.split("\n"))


def test_a_word_is_shown_once_it_is_complete():
    wrap = WordWrap(20)
    assert wrap.feed("half") == ""
    assert wrap.feed("way there") == "halfway"
    assert wrap.end() == " there"
