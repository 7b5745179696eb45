"""What the figures should come to, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks.gpu.records import Record

_INT4 = "over bfloat16"


@dataclass(frozen=True, slots=True)
class Bar:
    """A bound on some records' values."""

    name: str
    bound: float
    holds_for: Callable[[Record], bool]
    most: bool = False  # the bound is the most that a value may be, not the least

    def passed(self, value: float) -> bool:
        """Whether a value keeps to it."""
        return value < self.bound if self.most else value >= self.bound


@dataclass(frozen=True, slots=True)
class Verdict:
    """One record beside its bar."""

    bar: Bar
    record: Record

    @property
    def passed(self) -> bool:
        """Whether it is reached."""
        return self.bar.passed(self.record.value)

    @property
    def text(self) -> str:
        """One line."""
        record, bar = self.record, self.bar
        what = ", ".join(part for part in (record.shape, record.format, record.workload) if part)
        mark = "pass" if self.passed else "FAIL"
        sign = "<" if bar.most else ">="
        return f"{mark}  {bar.name}: {what}: {record.value:.3f} ({sign} {bar.bound})"


def _pass(begins: str, metric: str, forms: tuple[str, ...] = ("none",)) -> Callable[[Record], bool]:
    return lambda record: (
        record.section == "passes"
        and record.workload.startswith(begins)
        and record.metric == metric
        and record.format in forms
    )


def _of(section: str, metric: str, *begins: str) -> Callable[[Record], bool]:
    return lambda record: (
        record.section == section and record.metric == metric and record.workload.startswith(begins)
    )


def _large_rows(record: Record) -> bool:
    """Kernels over so many tokens that a launch is a small part of them."""
    kernels = ("rms_norm", "add_rms_norm", "gated", "rotate_and_store")
    name, _, tokens = record.workload.rpartition(" x ")
    return (
        record.section == "kernels"
        and record.metric == "share"
        and (name in kernels and int(tokens) >= 8192)
    )


def _eight_thousand(record: Record) -> bool:
    if not _pass("prompt ", "mfu")(record):
        return False
    sequences, _, tokens = record.workload.removeprefix("prompt ").partition(" x ")
    return int(sequences) * int(tokens) >= 8192


def _decode_8k(record: Record) -> bool:
    found = _of("attention", "of bandwidth", "decode")(record)
    return found and record.workload.endswith(" x 8192")


BARS = (
    Bar("decode MBU, batch 1", 0.75, _pass("generation 1 x ", "mbu")),
    Bar("decode MBU, batch 64, 2k contexts", 0.65, _pass("generation 64 x 2048", "mbu")),
    Bar("prefill MFU, 8k tokens", 0.55, _eight_thousand),
    Bar(
        "device waits for the host, share of decode steps",
        0.05,
        _pass("generation ", "host wait", ("none", "int8", "int4", "fp8")),
        most=True,
    ),
    Bar(
        "what the device alone does not need, share of decode steps",
        0.05,
        _pass("generation ", "gap", ("none", "int8", "int4", "fp8")),
        most=True,
    ),
    Bar("int4 over bfloat16, batch 1", 2.2, _pass("generation 1 x ", _INT4, ("int4",))),
    Bar("over transformers, output tokens/s", 2.0, _of("serving", "ratio", "")),
    Bar("decode attention, share of copy bandwidth", 0.8, _decode_8k),
    Bar(
        "prompt attention, share of torch's product",
        0.5,
        _of("attention", "of product", "prompt, 4096"),
    ),
    Bar("row kernels, share of copy bandwidth", 0.8, _large_rows),
)


def derived(records: Iterable[Record]) -> list[Record]:
    """How many times as fast as bfloat16 each pass is with weights of another format."""
    known = [r for r in records if r.section == "passes" and r.metric == "seconds"]
    base = {(r.shape, r.workload): r.value for r in known if r.format == "none"}
    return [
        replace(record, metric=_INT4, value=base[record.shape, record.workload] / record.value)
        for record in known
        if record.format != "none" and (record.shape, record.workload) in base
    ]


def judged(records: Iterable[Record]) -> list[Verdict]:
    """Every record that a bar is for, bar by bar."""
    found = list(records)
    found += derived(found)
    return [Verdict(bar, record) for bar in BARS for record in found if bar.holds_for(record)]
