"""A system is a process that answers lines; whatever it does, the driver goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.peers.process import Peer, PeerError
from benchmarks.peers.workloads import Ask

FAKE = Path(__file__).parent / "fake_system.py"
ASKS = (Ask((5, 6, 7), 4), Ask((5,), 2))


@contextmanager
def fake(kind: str, folder: Path, *, timeout: float = 60.0, freeze: bool = True) -> Iterator[Peer]:
    command = [sys.executable, FAKE, kind]
    with Peer(command, folder / "log", freeze=freeze, timeout=timeout) as peer:
        yield peer


def load(peer: Peer, folder: Path) -> dict[str, str]:
    return peer.load(
        model=str(folder),
        cache=str(folder),
        precision="bf16",
        threads=3,
        options={"max_sequences": 7},
    )


def test_a_system_is_told_its_setup_and_gives_every_request_its_tokens(tmp_path: Path) -> None:
    with fake("ok", tmp_path) as peer:
        assert load(peer, tmp_path) == {"threads": "3", "wide": "7"}
        for _ in range(2):
            first, second = peer.run(ASKS)
            assert (first.tokens, second.tokens) == ((3, 4, 5, 6), (1, 2))
            assert 0 < first.first <= first.last <= second.last


def test_what_libraries_print_is_no_answer(tmp_path: Path) -> None:
    with fake("noisy", tmp_path) as peer:
        load(peer, tmp_path)
        assert len(peer.run(ASKS)) == 2
    assert "chatter" in (tmp_path / "log").read_text()


def test_an_output_of_another_length_than_asked_for_is_refused(tmp_path: Path) -> None:
    with fake("short", tmp_path) as peer:
        load(peer, tmp_path)
        with pytest.raises(PeerError, match="request 0 got 3 tokens, not 4"):
            peer.run(ASKS)


def test_a_failing_load_says_why(tmp_path: Path) -> None:
    with (
        fake("broken", tmp_path) as peer,
        pytest.raises(PeerError, match="ValueError: no bf16 here"),
    ):
        load(peer, tmp_path)


def test_a_process_that_ends_is_quoted(tmp_path: Path) -> None:
    with fake("dying", tmp_path) as peer:
        load(peer, tmp_path)
        with pytest.raises(PeerError, match="last words"):
            peer.run(ASKS)


def test_silence_ends_in_an_error_and_the_process_with_it(tmp_path: Path) -> None:
    with fake("silent", tmp_path, timeout=30.0) as peer:
        load(peer, tmp_path)
        peer._timeout = 0.1
        with pytest.raises(PeerError, match=r"no answer within 0\.1 s"):
            peer.run(ASKS)
        process = psutil.Process(peer._process.pid)
        peer.kill()
    assert not process.is_running()


def test_idle_systems_are_frozen_unless_they_cannot_be(tmp_path: Path) -> None:
    for freeze in (True, False):
        with fake("ok", tmp_path, freeze=freeze) as peer:
            load(peer, tmp_path)
            process = psutil.Process(peer._process.pid)
            deadline = time.monotonic() + 30 if freeze else 0.0  # a signal takes a moment
            while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
                time.sleep(0.01)
            assert (process.status() == psutil.STATUS_STOPPED) is freeze
        assert not process.is_running()
