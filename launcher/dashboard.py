"""How a snapshot of the cluster is shown: redrawn in place, as tables one after another, or as
lines of JSON."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Protocol

from google.protobuf.json_format import MessageToDict
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton import wire
from baton.v1 import model_pb2
from baton.v1.model_pb2 import ClusterStatus, QueueLevel, WorkerStatus

SPARKS = "▁▂▃▄▅▆▇█"
WIDE = 110  # columns from which bars are long
RATES_NARROW, RATES_WIDE = 10, 40  # token rates that are drawn
BUSY, FULL = 0.7, 0.9  # shares of a KV cache


class Display(Protocol):
    """Shows snapshots."""

    def show(self, status: ClusterStatus) -> None:
        """A new snapshot."""
        ...

    def lost(self, reason: str) -> None:
        """There is none for now, and why."""
        ...


def display_for(
    console: Console, address: str, *, live: bool, as_json: bool
) -> AbstractContextManager[Display]:
    """JSON if asked for; otherwise redrawn in place, or one after another."""
    if as_json:
        return nullcontext(JsonLines(console))
    return Redrawn(console, address) if live else nullcontext(Tables(console, address))


class JsonLines:
    """One object a line on the console, losses on standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, status: ClusterStatus) -> None:
        """Every field, also those that are zero."""
        fields = MessageToDict(
            status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        self._console.file.write(json.dumps(fields) + "\n")
        self._console.file.flush()

    def lost(self, reason: str) -> None:
        """See Display."""
        print(f"baton: {reason}", file=sys.stderr, flush=True)


class Tables:
    """One snapshot under another, losses on standard error."""

    def __init__(self, console: Console, address: str) -> None:
        self._console = console
        self._address = address

    def show(self, status: ClusterStatus) -> None:
        """See Display."""
        self._console.print(dashboard(status, self._address, self._console.width))

    def lost(self, reason: str) -> None:
        """See Display."""
        print(f"baton: {reason}", file=sys.stderr, flush=True)


class Redrawn:
    """The last snapshot, in one place of a terminal, with the course of the token rate."""

    def __init__(self, console: Console, address: str) -> None:
        self._console = console
        self._address = address
        self._status: ClusterStatus | None = None
        self._lost = ""
        self._rates = deque([0.0] * RATES_WIDE, maxlen=RATES_WIDE)
        self._live = Live(console=console, get_renderable=self._draw, auto_refresh=False)

    def __enter__(self) -> Display:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, status: ClusterStatus) -> None:
        """See Display."""
        self._status, self._lost = status, ""
        self._rates.append(status.output_tokens_per_second)
        self._live.refresh()

    def lost(self, reason: str) -> None:
        """The last snapshot stays, said to be old."""
        self._lost = reason
        self._live.refresh()

    def _draw(self) -> RenderableType:
        lines: list[RenderableType] = []
        if self._status is not None:
            rates, width = list(self._rates), self._console.width
            lines.append(dashboard(self._status, self._address, width, rates))
        elif not self._lost:
            lines.append(Text(f"waiting for {self._address}", "dim"))
        if self._lost:
            state = "trying again" if self._status is None else "trying again; the above is old"
            lines.append(Text(f"{self._lost}\n{state}", "red"))
        return Group(*lines, Text())  # where the terminal writes the ^C


def dashboard(
    status: ClusterStatus, address: str, width: int, rates: Sequence[float] = ()
) -> RenderableType:
    """A snapshot, with recent token rates, in `width` columns."""
    return Group(
        _summary(status, address, rates[-(RATES_WIDE if width >= WIDE else RATES_NARROW) :]),
        Text(),
        _queue(status.levels),
        Text(),
        _workers(status.workers, bar=24 if width >= WIDE else 8),
        *_lengths(status),
    )


def _summary(status: ClusterStatus, address: str, rates: Sequence[float]) -> RenderableType:
    waiting = sum(level.waiting_requests for level in status.levels)
    figures = Text.assemble(
        (f"{waiting}", "bold"),
        " waiting  ",
        (f"{status.running_requests}", "bold"),
        " running  ",
        (f"{status.output_tokens_per_second:.1f}", "bold"),
        " output tokens/s",
    )
    if rates:
        figures.append(f" {sparkline(rates)}", "cyan")
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(Text(address, "bold"), figures)
    return line


def _table(*columns: str) -> Table:
    """Right-aligned columns, the first one left-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in columns:
        left = name in ("worker", "role", "KV blocks")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table


def _queue(levels: Sequence[QueueLevel]) -> RenderableType:
    table = _table("MLFQ level", "requests", "prompt tokens", "oldest")
    for level in levels:
        busy = level.waiting_requests > 0
        table.add_row(
            str(level.level),
            str(level.waiting_requests),
            str(level.waiting_tokens),
            age(wire.seconds(level.oldest)) if busy else "-",
            style="" if busy else "dim",
        )
    return table


def _lengths(status: ClusterStatus) -> Sequence[RenderableType]:
    """How good length predictions are, always beside what the majority class alone would give."""
    if not status.HasField("length_prediction"):
        return ()
    found = status.length_prediction
    line = (
        f"output lengths: {found.accuracy:.0%} right "
        f"(majority class {found.majority_accuracy:.0%}), "
        f"off by {found.error_tokens:.0f} tokens ({found.majority_error_tokens:.0f}), "
        f"{found.exceeded:.0%} exceeded"
    )
    return Text(), Text(line, "dim")


def _workers(workers: Sequence[WorkerStatus], bar: int) -> RenderableType:
    if not workers:
        return Text("no workers", "yellow")
    table = _table("worker", "role", "running", "waiting", "KV blocks", "steps/s")
    for worker in workers:
        table.add_row(
            Text(worker.id),
            _role(worker),
            str(worker.running_sequences),
            str(worker.waiting_sequences),
            _kv(worker, bar),
            f"{worker.steps_per_second:.1f}",
        )
    return table


def _role(worker: WorkerStatus) -> Text:
    names = model_pb2.WorkerRole.DESCRIPTOR.values_by_number
    known = names.get(worker.role)
    text = Text(known.name.removeprefix("WORKER_ROLE_").lower() if known else "unknown")
    if worker.draining:
        text.append(" draining", "yellow")
    return text


def _kv(worker: WorkerStatus, bar: int) -> Text:
    """A bar, used and all blocks, and the share; blocks swapped out to the host, if any."""
    total = worker.total_kv_blocks
    used = total - min(worker.free_kv_blocks, total)
    share = used / total if total else 0.0
    filled = -(-used * bar // total) if total else 0  # something is seen as soon as any is used
    colour = "red" if share >= FULL else "yellow" if share >= BUSY else "green"
    text = Text.assemble(
        ("█" * filled, colour),
        ("░" * (bar - filled), "dim"),
        f" {used}/{total} ",
        (f"{share:.0%}", colour),
    )
    if worker.host_kv_blocks:
        text.append(f" +{worker.host_kv_blocks} on host", "dim")
    return text


def sparkline(values: Sequence[float]) -> str:
    """One character a value, the highest one full."""
    top = max(values, default=0.0)
    steps = len(SPARKS) - 1
    return "".join(SPARKS[round(v / top * steps) if top > 0 else 0] for v in values)


def age(seconds: float) -> str:
    """`1.2 s`, `3 m 20 s`, `2 h 5 m`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} m {int(seconds) % 60} s"
    return f"{minutes // 60} h {minutes % 60} m"
