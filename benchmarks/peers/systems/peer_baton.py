"""Baton in process: the engine under a decode worker's scheduler, without gateway and wire."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from serving import Answers, Ask, Setup, serve

from launcher.cores import spin_briefly


class Baton:
    """One executor; every run gets a scheduler of its own, with the rules that workers have."""

    def __init__(self, setup: Setup) -> None:
        from engine.load import load_executor

        options: dict[str, Any] = {"quantization": "int8"} if setup.precision == "int8" else {}
        self._executor = load_executor(
            setup.model,
            dtype="bfloat16",
            kv_memory=2 * 2**30,
            max_batch_tokens=setup.max_tokens,
            max_batch_sequences=setup.max_sequences,
            threads=setup.threads,
            attention_backend=setup.options.get("attention_backend", "auto"),
            **options,
        )
        self._executor.warm_up()
        self.about = {"baton": version("baton-serve"), "model": type(self._executor.model).__name__}

    def run(self, requests: list[Ask], answers: Answers) -> None:
        """Plan, execute, apply."""
        from baton.config import DecodeConfig, load
        from baton.types import Output, Request, Sampling, Stopping
        from scheduling.cost import CostTracker
        from scheduling.decode import DecodeScheduler
        from scheduling.events import RequestFailed
        from scheduling.order import policy_from
        from scheduling.rules import Rules

        config, cost = load(DecodeConfig, {}), CostTracker()
        scheduler = DecodeScheduler(
            self._executor.capacity,
            policy_from(config, cost),
            max_waiting=len(requests),
            rules=Rules.of(config),
            cost=cost,
        )
        for number, request in enumerate(requests):
            wanted = Stopping(max_tokens=request.output)
            scheduler.submit(
                Request(str(number), tuple(request.prompt), Sampling(), wanted), time.monotonic()
            )
        left = len(requests)
        while left:
            plan = scheduler.plan(time.monotonic())
            assert plan is not None, "requests are left and nothing can run"
            result = self._executor.execute(plan)
            for event in scheduler.apply(plan, result, time.monotonic()):
                if isinstance(event, Output):
                    answers.add(int(event.request_id), event.token_ids)
                    left -= event.finish is not None
                assert not isinstance(event, RequestFailed), event

    def close(self) -> None:
        """Nothing outlives the process."""


if __name__ == "__main__":
    spin_briefly()
    serve(Baton)
