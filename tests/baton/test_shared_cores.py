"""Cores that workers lend each other; each worker is a process, because its locks are."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from baton.errors import ConfigError
from baton.shared_cores import Place

WORKER = """
import sys
from baton.shared_cores import Place, SharedCores
cores = SharedCores(Place.parse(sys.argv[1]))
for line in sys.stdin:
    print(getattr(cores, line.strip())(), flush=True)
"""


class Worker:
    """A process that takes cores when it is told to."""

    def __init__(self, place: Place) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, verb: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(verb + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, verb: str) -> str:
        self.say(verb)
        return self.hear()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Makes workers that share a file."""
    with ExitStack() as stack:

        def make(first: int, own: int, total: int) -> Worker:
            made = Worker(Place(tmp_path / "a:b.cores", first, own, total))
            stack.enter_context(made.process)
            stack.callback(made.process.kill)
            return made

        yield make


def test_a_worker_alone_has_all_cores(worker: Callable[..., Worker]) -> None:
    one = worker(0, 1, 4)
    for _ in range(3):
        assert one.ask("take") == "4"
        one.ask("give_back")


def test_workers_that_are_busy_have_their_own_and_what_nobody_owns(
    worker: Callable[..., Worker],
) -> None:
    one, two = worker(0, 1, 3), worker(1, 1, 3)
    assert one.ask("take") == "3"
    one.ask("give_back")
    assert two.ask("take") == "2"  # the first one has not rested: its core is its own
    assert one.ask("take") == "1"
    two.ask("give_back")
    one.ask("give_back")
    assert one.ask("take") == "2"


def test_the_cores_of_a_worker_that_rests_are_lent_until_it_wakes_up(
    worker: Callable[..., Worker],
) -> None:
    one, two = worker(0, 2, 4), worker(2, 2, 4)
    for worker_ in (one, two):
        worker_.ask("take")
        worker_.ask("give_back")
    two.ask("rest")
    assert one.ask("take") == "4"
    two.say("take")  # waits for the pass of the other
    time.sleep(0.02)
    one.ask("give_back")
    assert two.hear() == "2"
    assert one.ask("take") == "2"


def test_an_owner_does_not_wait_for_ever(worker: Callable[..., Worker]) -> None:
    one, two = worker(0, 1, 2), worker(1, 1, 2)
    assert one.ask("take") == "2"
    assert two.ask("take") == "1"


def test_the_cores_of_a_worker_that_dies_are_free(worker: Callable[..., Worker]) -> None:
    one, two = worker(0, 1, 2), worker(1, 1, 2)
    assert one.ask("take") == "2"
    one.process.kill()
    one.process.wait()
    assert two.ask("take") == "2"


@pytest.mark.parametrize("text", ["", "x", "x:1:2", "x:1:1:1", "x:0:0:2", ":0:1:2", "x:a:1:2"])
def test_places_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--shared-cores"):
        Place.parse(text)
