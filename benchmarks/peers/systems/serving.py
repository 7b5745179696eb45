"""The side of the protocol that every system speaks: one JSON object a line, on stdin and stdout.

    {"op": "load", "model": DIR, "cache": DIR, "precision": "bf16", "threads": 2, "options": {}}
        -> {"ok": true, "about": {"version": "1.2"}}
    {"op": "run", "requests": [{"prompt": [5, 6], "output": 4}]}
        -> {"ok": true, "outputs": [{"tokens": [7, 8, 9, 9], "first": 0.1, "last": 0.4}]}
    {"op": "stop"}

All requests of a run arrive at once, at its time 0. `first` and `last` are the seconds at which the
first and the last token of an output were there. Anything that goes wrong is answered with
{"ok": false, "error": TEXT}. What libraries print goes to stderr.

Runs in the environments of other systems: nothing but the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Setup:
    """What to load. `cache`: where a converted model may be kept from one start to the next."""

    model: Path
    cache: Path
    precision: str  # bf16 or int8
    threads: int
    options: dict[str, Any]

    @property
    def max_tokens(self) -> int:
        """Token budget of a pass, where the system has one."""
        return int(self.options.get("max_tokens", 512))

    @property
    def max_sequences(self) -> int:
        """Sequences in a pass."""
        return int(self.options.get("max_sequences", 64))

    @property
    def context(self) -> int:
        """Longest prompt plus output that will be asked for."""
        return int(self.options.get("context", 1024))


@dataclass(frozen=True)
class Ask:
    """One request: exactly `output` tokens, whatever they are."""

    prompt: list[int]
    output: int


@dataclass
class Output:
    """What came back for one request."""

    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0


class Answers:
    """Outputs of one run as they grow. The run's time begins where this is made."""

    def __init__(self, count: int) -> None:
        self.outputs = [Output() for _ in range(count)]
        self._started = time.perf_counter()

    def add(self, index: int, tokens: Iterable[int]) -> None:
        """Tokens of request `index` are there now."""
        fresh = list(tokens)
        if not fresh:
            return
        output = self.outputs[index]
        output.last = time.perf_counter() - self._started
        if not output.tokens:
            output.first = output.last
        output.tokens += fresh


class System(Protocol):
    """A loaded model. `about` names versions and whatever else a reader must know."""

    about: dict[str, str]

    def run(self, requests: list[Ask], answers: Answers) -> None:
        """Serve all of them to the end, telling `answers` of tokens as they come."""
        ...

    def close(self) -> None:
        """End what was started; nothing is asked afterwards."""
        ...


def serve(load: Callable[[Setup], System]) -> None:
    """Answer lines from stdin until there are no more of them, or until told to stop."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system: System | None = None
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "stop":
            break
        try:
            if message["op"] == "load":
                system = load(_setup(message))
                reply = {"ok": True, "about": system.about}
            else:
                assert system is not None, "nothing is loaded"
                reply = {"ok": True, "outputs": _run(system, message["requests"])}
        except Exception as error:
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    if system is not None:
        system.close()


def _setup(message: dict[str, Any]) -> Setup:
    return Setup(
        model=Path(message["model"]),
        cache=Path(message["cache"]),
        precision=message["precision"],
        threads=message["threads"],
        options=message.get("options", {}),
    )


def _run(system: System, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    asked = [Ask(request["prompt"], request["output"]) for request in requests]
    answers = Answers(len(asked))
    system.run(asked, answers)
    return [asdict(output) for output in answers.outputs]
