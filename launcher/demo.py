"""`baton demo`: a local cluster, several questions at once, their answers live, and the figures.

A client like any other: it knows the public API only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from rich.console import Console

from baton.client import Client
from baton.config import ServeConfig
from baton.errors import BatonError
from launcher.cluster import LocalCluster
from launcher.generate import describe
from launcher.interrupt import interruptible
from launcher.questions import QUESTIONS, Answer
from launcher.screen import Screen, screen_for, summary
from launcher.serve import to_stderr

TIMEOUT = 60.0  # seconds for one answer
SEED = 7


async def run(config: ServeConfig) -> int:
    """Run it; returns the exit code."""
    own = {"address": "127.0.0.1:0", "log_level": "warning"}  # where nothing else was asked for
    unset = {key: value for key, value in own.items() if key not in config.model_fields_set}
    code = await interruptible(_demo(config.model_copy(update=unset), Console()))
    return 130 if code is None else code


async def _demo(config: ServeConfig, console: Console) -> int:
    answers = [Answer(question) for question in QUESTIONS]
    started = time.perf_counter()
    console.print("[dim]starting Redis, a gateway and workers, each a process of its own[/]")
    async with LocalCluster(config, to_stderr) as cluster:
        pids = "  ".join(f"{name} [bold]{pid}[/]" for name, pid in cluster.pids.items())
        console.print(
            f"ready on {cluster.address} in {time.perf_counter() - started:.1f} s: {pids}"
        )
        asked = time.perf_counter()
        with screen_for(console, answers) as screen:
            await ask_all(cluster.address, answers, screen)
        wall = time.perf_counter() - asked
        console.print(summary(answers, wall, console.width))
    failed = [answer for answer in answers if answer.error]
    for answer in failed:
        console.print(f"{answer.title} {answer.error}", style="red", markup=False)
    console.print("[dim]all processes stopped[/]")
    return 1 if failed else 0


async def ask_all(address: str, answers: Sequence[Answer], screen: Screen) -> None:
    """Ask everything at once on one channel; returns when all answers have ended."""
    async with Client(address) as client:
        await asyncio.gather(*(_ask(client, answer, screen) for answer in answers))


async def _ask(client: Client, answer: Answer, screen: Screen) -> None:
    """Stream one answer into `answer`, showing it as it grows."""
    question = answer.question
    options = {"max_tokens": question.max_tokens, "temperature": question.temperature, "seed": SEED}
    try:
        async for event in client.generate(
            question.prompt, timeout=TIMEOUT, timing=True, **options
        ):
            answer.take(event)
            screen.update(answer)
    except BatonError as error:
        answer.error = describe(error)
        screen.update(answer)
