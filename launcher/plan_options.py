"""The options of `baton plan`, apart: the simulator is loaded only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click

from baton.config import SchedulingConfig

F = TypeVar("F", bound=Callable[..., Any])

_POSITIVE = click.FloatRange(0, min_open=True)
_NOT_NEGATIVE = click.FloatRange(0)

_OPTIONS = [
    click.option(
        "--model",
        default="llama-3-8b",
        show_default=True,
        help="a model directory, or a name such as llama-3-8b",
    ),
    click.option("--gpu", default="h200", show_default=True, help="a100-40, a100-80, h100 or h200"),
    click.option(
        "--kv-dtype",
        type=click.Choice(["auto", "int8", "fp8"]),
        default="auto",
        show_default=True,
        help="number format of KV: that of the weights, or int8 or fp8",
    ),
    click.option("--profile", default="", help="instead of these three: a profile's name or file"),
    click.option(
        "--trace",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="traffic as JSON lines: arrived_at, prompt_tokens, output_tokens; or Mooncake's form",
    ),
    click.option(
        "--rate", type=_NOT_NEGATIVE, default=0.0, help="requests per second; stretches a trace"
    ),
    click.option(
        "--lengths",
        default="sharegpt",
        show_default=True,
        help="without a trace: sharegpt, alpaca, or IN/OUT tokens",
    ),
    click.option(
        "--burstiness",
        type=_POSITIVE,
        default=1.0,
        show_default=True,
        help="without a trace: coefficient of variation of the gaps; 1 is Poisson",
    ),
    click.option(
        "--ttft", type=_NOT_NEGATIVE, default=0.0, help="limit of the time to first token, seconds"
    ),
    click.option("--tpot", type=_NOT_NEGATIVE, default=0.0, help="limit per output token, seconds"),
    click.option(
        "--percentile",
        type=click.FloatRange(1, 100),
        default=95.0,
        show_default=True,
        help="of the requests that must stay below the limits",
    ),
    click.option(
        "--policy",
        type=click.Choice(["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt"]),
        default=SchedulingConfig.model_fields["policy"].default,
        show_default=True,
        help="order in which requests wait and sequences run",
    ),
    click.option(
        "--predictor-error",
        type=_NOT_NEGATIVE,
        default=0.5,
        show_default=True,
        help="predicted-srpt: standard deviation of the logarithm of its length estimates",
    ),
    click.option(
        "--max-workers",
        type=click.IntRange(1, 1000),
        default=64,
        show_default=True,
        help="most workers to try",
    ),
    click.option(
        "--prefill-price",
        type=_POSITIVE,
        default=1.0,
        show_default=True,
        help="what a prefill worker costs, in decode workers",
    ),
    click.option(
        "--requests",
        type=click.IntRange(200, 1_000_000),
        default=2000,
        show_default=True,
        help="simulated per try; the answer is proven on twice as many",
    ),
    click.option(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="of the traffic"
    ),
    click.option(
        "--values",
        type=click.Path(dir_okay=False, path_type=Path),
        help="write values for the Helm chart to this file; on GPUs for decode workers only, as "
        "prefill workers hand KV over from host memory",
    ),
]


def plan_options(command: F) -> F:
    """All of them, in this order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
