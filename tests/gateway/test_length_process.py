"""The classifier's process, watched over: late, dead, hanging, talking nonsense."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from baton.errors import ModelError
from baton.length_classifier import write_edges
from gateway import length_process
from gateway.length_process import LengthProcess

# Speaks the protocol; what it does with a text is the text itself.
CHILD = """
import json, struct, sys, time
def say(message):
    body = json.dumps(message).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(body)) + body)
    sys.stdout.buffer.flush()
say({"edges": [8, 64]})
while head := sys.stdin.buffer.read(4):
    message = json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))
    match message["text"]:
        case "die": sys.exit(3)
        case "hang": time.sleep(3600)
        case "nonsense": print("nonsense" * 10, flush=True)
        case "nobody": say({"id": 999, "probabilities": [0.5, 0.5]})
        case "nothing": say({"id": message["id"], "probabilities": None})
        case "no id": say({"id": [], "probabilities": [0.5, 0.5]})
        case "list": say([1, 2])
        case text: say({"id": message["id"], "probabilities": [0.25, len(text)]})
"""

Eventually = Callable[[Callable[[], bool]], object]


@asynccontextmanager
async def running(directory: Path, child: str = CHILD) -> AsyncIterator[LengthProcess]:
    write_edges(directory, (8, 64))
    process = LengthProcess(directory, [sys.executable, "-c", child])
    task = asyncio.create_task(process.run())
    try:
        yield process
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_process, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(length_process, "LONGEST_PAUSE", 0.02)


async def test_answers_belong_to_their_texts(tmp_path, eventually) -> None:
    async with running(tmp_path) as process:
        assert await process.probabilities("early", 5.0) is None  # it is not up yet
        await eventually(lambda: process.ready)
        texts = ["a" * size for size in range(20)]
        answers = await asyncio.gather(*(process.probabilities(text, 5.0) for text in texts))
        assert answers == [[0.25, float(len(text))] for text in texts]


async def test_a_process_that_dies_is_started_again(tmp_path, eventually) -> None:
    async with running(tmp_path) as process:
        await eventually(lambda: process.ready)
        assert await process.probabilities("die", 5.0) is None
        await eventually(lambda: process.starts == 2 and process.ready)
        assert await process.probabilities("ab", 5.0) == [0.25, 2.0]


@pytest.mark.parametrize("nonsense", ["nonsense", "nobody", "nothing", "no id", "list"])
async def test_a_process_that_talks_nonsense_is_started_again(
    tmp_path, eventually, nonsense
) -> None:
    async with running(tmp_path) as process:
        await eventually(lambda: process.ready)
        assert await process.probabilities(nonsense, 5.0) is None
        await eventually(lambda: process.starts == 2 and process.ready)


async def test_nobody_waits_longer_than_they_say_and_a_backlog_is_not_added_to(
    tmp_path, eventually, monkeypatch
) -> None:
    monkeypatch.setattr(length_process, "MAX_WAITING", 3)
    async with running(tmp_path) as process:
        await eventually(lambda: process.ready)
        for _ in range(3):
            assert await process.probabilities("hang", 0.01) is None
        assert not process.ready
        assert await process.probabilities("ab", 3600.0) is None  # at once


async def test_a_process_that_hangs_is_started_again(tmp_path, eventually, monkeypatch) -> None:
    monkeypatch.setattr(length_process, "STUCK_SECONDS", 0.3)
    async with running(tmp_path) as process:
        await eventually(lambda: process.ready)
        assert await process.probabilities("hang", 0.01) is None
        await eventually(lambda: process.starts >= 2 and process.ready)
        assert await process.probabilities("ab", 5.0) == [0.25, 2.0]


async def test_an_idle_process_is_left_alone(tmp_path, eventually, monkeypatch) -> None:
    monkeypatch.setattr(length_process, "STUCK_SECONDS", 0.01)
    async with running(tmp_path) as process:
        await eventually(lambda: process.ready)
        await asyncio.sleep(0.1)
        assert process.starts == 1


async def test_a_process_with_other_buckets_is_not_believed(tmp_path, eventually, caplog) -> None:
    async with running(tmp_path, CHILD.replace("[8, 64]", "[8, 65]")) as process:
        await eventually(lambda: process.starts >= 2)
        assert not process.ready
    assert "did not say that it has these buckets" in caplog.text


async def test_a_caller_that_is_cancelled_leaves_no_trace(tmp_path, eventually) -> None:
    async with running(tmp_path) as process:
        await eventually(lambda: process.ready)
        caller = asyncio.create_task(process.probabilities("a", 5.0))
        await asyncio.sleep(0)
        caller.cancel()
        assert await process.probabilities("ab", 5.0) == [0.25, 2.0]


def test_a_directory_without_buckets_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError):
        LengthProcess(tmp_path)
