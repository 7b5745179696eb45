from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.stops import Scan, StopMatcher

TEXT = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4)


def scan(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    """Everything shown, and what matched, for a text cut into `pieces`."""
    matcher = StopMatcher(stops, include=include)
    shown = ""
    for piece in pieces:
        result = matcher.push(piece)
        shown += result.text
        if result.matched is not None:
            return shown, result.matched
    return shown + matcher.flush(), None


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the shortest prefix that ends with a stop, the longest stop it ends with."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(TEXT, STOPS, st.booleans(), st.data())
def test_result_does_not_depend_on_where_the_text_is_cut(text, stops, include, data):
    pieces, start = [], 0
    while start < len(text):
        size = data.draw(st.integers(1, len(text) - start))
        pieces.append(text[start : start + size])
        start += size
    assert scan(pieces, stops, include) == reference(text, stops, include)


@given(TEXT, STOPS)
def test_holds_back_no_more_than_the_longest_possible_beginning(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for i, char in enumerate(text):
        result = matcher.push(char)
        if result.matched is not None:
            return
        shown += result.text
        seen = text[: i + 1]
        held = max(
            (k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])), default=0
        )
        assert shown == seen[: len(seen) - held]


def test_without_stops_text_passes_at_once():
    assert StopMatcher([]).push("anything") == Scan("anything")


def test_include_keeps_the_match_and_drops_what_follows():
    assert StopMatcher(["END"], include=True).push("a END b") == Scan("a END", "END")
