"""How answers that stream side by side are shown: one pane each on a terminal, whole lines with
the number of the question elsewhere; and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from google.protobuf.duration_pb2 import Duration
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launcher.questions import Answer

FIGURES_WIDTH = 60  # of the table's columns after the first


class Screen(Protocol):
    """Shows answers while they grow."""

    def update(self, answer: Answer) -> None:
        """`answer` has more text, or its end."""
        ...


def screen_for(console: Console, answers: Sequence[Answer]) -> AbstractContextManager[Screen]:
    """Panes on a terminal, lines elsewhere."""
    return Panes(console, answers) if console.is_terminal else Lines(console, answers)


class Panes:
    """One pane for each answer, redrawn in place; when done, the whole answers."""

    def __init__(self, console: Console, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._console = console
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            refresh_per_second=12,
            transient=True,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()
        for number, answer in enumerate(self._answers, 1):
            self._console.print(_pane(number, answer, Text(answer.text.strip())))

    def update(self, answer: Answer) -> None:
        """Nothing to do: the panes are drawn from the answers, several times a second."""

    def _draw(self) -> RenderableType:
        """All panes, in two columns where there is room, as high as the terminal allows."""
        columns = 2 if self._console.width >= 80 else 1
        rows = -(-len(self._answers) // columns)
        lines = max(1, (self._console.height - 1) // rows - 2)
        width = self._console.width // columns - 4
        panes = [self._growing(n, a, width, lines) for n, a in enumerate(self._answers, 1)]
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        for row in range(rows):
            grid.add_row(*panes[row * columns : (row + 1) * columns])
        return grid

    def _growing(self, number: int, answer: Answer, width: int, lines: int) -> Panel:
        """A pane of fixed height with the end of the text."""
        wrapped = Text(answer.text.strip()).wrap(self._console, width)
        return _pane(number, answer, Text("\n").join(wrapped[-lines:]), height=lines + 2)


def _pane(number: int, answer: Answer, body: Text, height: int | None = None) -> Panel:
    colour = "red" if answer.error else "green" if answer.done else "yellow"
    return Panel(
        body,
        title=f"{number}. {answer.title}",
        subtitle=f"{answer.output_tokens} tokens",
        title_align="left",
        subtitle_align="right",
        border_style=colour,
        height=height,
    )


class Lines:
    """Whole lines as they fill up, each with the number of its question."""

    def __init__(self, console: Console, answers: Sequence[Answer]) -> None:
        self._console = console
        self._numbers = {id(answer): number for number, answer in enumerate(answers, 1)}
        self._shown = {id(answer): 0 for answer in answers}
        self._width = max(40, console.width - 5)

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def update(self, answer: Answer) -> None:
        """Print the lines that are complete."""
        pending = answer.text[self._shown[id(answer)] :]
        while cut := self._cut(pending, done=answer.done):
            self._print(answer, pending[:cut])
            self._shown[id(answer)] += cut
            pending = pending[cut:]
        if answer.error:
            self._print(answer, answer.error)

    def _cut(self, pending: str, *, done: bool) -> int:
        """Length of the first complete line of `pending`, its line break included; 0 for none."""
        newline = pending.find("\n", 0, self._width)
        if newline >= 0:
            return newline + 1
        if len(pending) > self._width:
            return pending.rfind(" ", 0, self._width) + 1 or self._width
        return len(pending) if done else 0

    def _print(self, answer: Answer, line: str) -> None:
        if line.strip():
            number = self._numbers[id(answer)]
            self._console.print(f"[{number}] {line.rstrip()}", markup=False, highlight=False)


def summary(answers: Sequence[Answer], wall: float, width: int) -> RenderableType:
    """One row for each answer, and the totals. `wall` is in seconds, `width` in characters."""
    title = "tokens in and out, then milliseconds"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("request", no_wrap=True)
    for name in ("prompt", "output", "queue", "prefill", "KV", "TTFT", "TPOT"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("finish", no_wrap=True)
    for number, answer in enumerate(answers, 1):
        label = Text(f"{number}. {answer.title}")
        label.truncate(max(10, width - FIGURES_WIDTH), overflow="ellipsis")
        table.add_row(label, *_figures(answer))
    tokens = sum(answer.output_tokens for answer in answers)
    prompts = sum(answer.prompt_tokens for answer in answers)
    totals = (
        f"{len(answers)} requests at once: {prompts} prompt and {tokens} output tokens\n"
        f"{wall:.2f} s in all, {tokens / wall:.1f} output tokens/s"
    )
    return Group(table, Text(totals))


def _figures(answer: Answer) -> tuple[str, ...]:
    counts = (str(answer.prompt_tokens), str(answer.output_tokens))
    if answer.ended is None:
        return (*counts, *("-",) * 5, "error")
    timing = answer.ended.message.timing
    between = answer.ended.completion_tokens - 1
    return (
        *counts,
        milliseconds(timing.queue),
        milliseconds(timing.prefill),
        milliseconds(timing.kv_transfer),
        milliseconds(timing.time_to_first_token),
        milliseconds(timing.decode, between) if between > 0 else "-",
        answer.ended.reason,
    )


def milliseconds(duration: Duration, parts: int = 1) -> str:
    """A duration, or each of its equal parts, with as many digits as matter."""
    value = duration.ToNanoseconds() / parts / 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
