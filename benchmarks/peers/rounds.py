"""Runs the systems in turn: the speed of a shared machine changes from minute to minute, and only
neighbours compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.process import Output, Peer, PeerError
from benchmarks.peers.records import Record
from benchmarks.peers.registry import Start, System
from benchmarks.peers.workloads import Workload

AGREEMENT_TOKENS = 8  # of each output, compared with Baton's

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Matter:
    """One model in one precision, which all systems load."""

    shape: str
    precision: str
    directory: Path
    cache: Path  # for this model, converted
    threads: int
    max_tokens: int
    max_sequences: int
    context: int

    def setup(self, system: System) -> dict[str, Any]:
        """The message that loads it."""
        sizes = {
            "max_tokens": self.max_tokens,
            "max_sequences": self.max_sequences,
            "context": self.context,
        }
        return {
            "model": str(self.directory),
            "cache": str(self.cache),
            "precision": self.precision,
            "threads": self.threads,
            "options": sizes | system.options,
        }


@dataclass(slots=True)
class Comparison:
    """What came out so far."""

    records: list[Record] = field(default_factory=list)
    about: dict[str, dict[str, str]] = field(default_factory=dict)  # by system
    failures: dict[str, str] = field(default_factory=dict)  # why a system is missing


def compare(
    matter: Matter,
    systems: Sequence[System],
    workloads: Sequence[Workload],
    warm_up: Workload,
    *,
    rounds: int,
    start: Start,
    before_round: Callable[[int], None],
    into: Comparison,
    say: Say,
) -> None:
    """Load all systems, then run round after round of every workload on every system in turn.

    A system that fails is left out from there on, and `into.failures` says why. `before_round` is
    called while all systems are idle.
    """
    with ExitStack() as stack:
        peers = {}
        for system in systems:
            say(f"{matter.shape} {matter.precision}: {system.name}: loading")
            found = _loaded(stack, matter, system, warm_up, start, into)
            if found is not None:
                peers[system.name] = found
        first: dict[tuple[str, str], list[Output]] = {}
        for number in range(rounds):
            before_round(number)
            for workload in workloads:
                for name in _order(list(peers), number):
                    say(f"{matter.shape} {matter.precision} {workload.name}: {name}")
                    try:
                        outputs, used = _alone(name, peers, workload)
                    except PeerError as error:
                        into.failures[_title(matter, name)] = f"{workload.name}: {error}"
                        peers.pop(name).stop()
                        continue
                    first.setdefault((name, workload.name), outputs)
                    values = measures(outputs) | used
                    into.records += _records(matter, name, workload.name, number, values)
        into.records += _agreements(matter, first)


def measures(outputs: Sequence[Output]) -> dict[str, float]:
    """Metrics of one run: throughput of many requests, latency of a single one."""
    seconds = max(output.last for output in outputs)
    if len(outputs) > 1:
        return {"output_tokens_per_s": sum(len(each.tokens) for each in outputs) / seconds}
    (output,) = outputs
    steps = len(output.tokens) - 1
    return {"ttft_s": output.first, "tpot_s": (output.last - output.first) / steps}


def agreement(outputs: Sequence[Output], reference: Sequence[Output]) -> float:
    """Share of the first `AGREEMENT_TOKENS` tokens that are the same before the first one that
    differs, over all requests."""
    same = wanted = 0
    for output, other in zip(outputs, reference, strict=True):
        pairs = list(zip(output.tokens, other.tokens, strict=True))[:AGREEMENT_TOKENS]
        wanted += len(pairs)
        same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return same / wanted


def _loaded(
    stack: ExitStack,
    matter: Matter,
    system: System,
    warm_up: Workload,
    start: Start,
    into: Comparison,
) -> Peer | None:
    if matter.precision not in system.precisions:
        return None
    try:
        peer = stack.enter_context(start(system))
        began = time.monotonic()
        about = peer.load(**matter.setup(system))
        values = {"load_s": time.monotonic() - began}
        peer.run(warm_up.asks)
    except PeerError as error:
        into.failures[_title(matter, system.name)] = str(error)
        return None
    into.about[system.name] = about
    into.records += _records(matter, system.name, "load", 0, values)
    return peer


def _alone(
    name: str, peers: dict[str, Peer], workload: Workload
) -> tuple[list[Output], dict[str, float]]:
    """Outputs of one run, and the processor time behind it: what the system itself took, and how
    much of a processor the others took meanwhile."""
    before = {each: peer.processor_seconds() for each, peer in peers.items()}
    began = time.monotonic()
    outputs = peers[name].run(workload.asks)
    lasted = time.monotonic() - began
    spent = {each: peer.processor_seconds() - before[each] for each, peer in peers.items()}
    own = spent.pop(name)
    return outputs, {
        "processor_s": own,
        "others_processor_share": sum(spent.values()) / lasted,
    }


def _order(names: list[str], number: int) -> list[str]:
    """Each round begins with the next one, so that nobody always follows the same neighbour."""
    shift = number % len(names) if names else 0
    return names[shift:] + names[:shift]


def _agreements(matter: Matter, first: dict[tuple[str, str], list[Output]]) -> Iterator[Record]:
    """How far the first outputs of each system are Baton's."""
    for (name, workload), outputs in first.items():
        reference = first.get(("baton", workload))
        if reference is not None and name != "baton":
            values = {"agreement": agreement(outputs, reference)}
            yield from _records(matter, name, workload, 0, values)


def _records(
    matter: Matter, system: str, workload: str, number: int, values: dict[str, float]
) -> Iterator[Record]:
    for metric, value in values.items():
        yield Record(system, matter.shape, workload, matter.precision, metric, number, value)


def _title(matter: Matter, system: str) -> str:
    return f"{system}, {matter.shape} {matter.precision}"
