"""A system that needs no model: its tokens are made of the prompt. `python fake_system.py KIND`.

KIND is ok, short (an output lacks a token), broken (cannot load), dying (ends in a run), noisy
(prints to stdout) or silent (never answers a run).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "peers" / "systems"))

from serving import Answers, Ask, Setup, serve


class Fake:
    """Token i of an output is the prompt's length plus i."""

    def __init__(self, setup: Setup) -> None:
        self._kind = sys.argv[1]
        if self._kind == "broken":
            raise ValueError(f"no {setup.precision} here")
        self.about = {"threads": str(setup.threads), "wide": str(setup.max_sequences)}

    def run(self, requests: list[Ask], answers: Answers) -> None:
        """All at once, a token at a time."""
        if self._kind == "dying":
            print("last words", file=sys.stderr)
            os._exit(1)
        if self._kind == "silent":
            time.sleep(60)
        if self._kind == "noisy":
            print("chatter of a library")
        for number, request in enumerate(requests):
            for step in range(request.output - (self._kind == "short")):
                answers.add(number, [len(request.prompt) + step])

    def close(self) -> None:
        """Nothing to end."""


serve(Fake)
