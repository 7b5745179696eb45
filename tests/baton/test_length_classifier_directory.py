"""The directory of a length classifier, and the frames its process speaks in."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.errors import ModelError
from baton.length_classifier import FILE, clipped, frame, read_edges, unframe, write_edges


def test_edges_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_edges(tmp_path, (8, 16, 99))
    assert read_edges(tmp_path) == (8, 16, 99)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"edges": []}', '{"edges": [4, 4]}', '{"edges": [0, 4]}', '{"edges": [1.5]}'],
)
def test_other_edges_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError, match=FILE):
        read_edges(tmp_path)
    with pytest.raises(ModelError, match=FILE):
        read_edges(tmp_path / "nowhere")


def test_a_long_text_is_looked_at_from_both_ends() -> None:
    assert clipped("short") == "short"
    cut = clipped("a" * 5000 + "z" * 5000)
    assert len(cut) < 5000
    assert (cut[0], cut[-1]) == ("a", "z")


def test_frames_come_whole_however_they_are_cut() -> None:
    messages = [{"id": n, "text": "é" * n} for n in range(5)]
    data = b"".join(frame(message) for message in messages)
    for step in (1, 7, len(data)):
        buffer, found = bytearray(), []
        for start in range(0, len(data), step):
            buffer += data[start : start + step]
            found += unframe(buffer)
        assert found == messages
        assert not buffer


@pytest.mark.parametrize("data", [b"\xff\xff\xff\x7f", b"\x02\x00\x00\x00[]", b"\x01\x00\x00\x00{"])
def test_what_is_no_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"frame|Expecting"):
        unframe(bytearray(data))
