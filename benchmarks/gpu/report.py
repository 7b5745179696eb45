"""The tables and the plot of docs/gpu.md, made of the records of every device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from baton.plots import pyplot
from benchmarks.gpu.bars import judged
from benchmarks.gpu.records import Record, load

OWED = "Not measured yet: no GPU has been at hand. Device figures are owed."
_BLOCK = re.compile(r"(<!-- gpu figures -->\n).*?(<!-- end -->)", re.DOTALL)
_NAMES = {"none": "bfloat16"}


def all_records(results: Path) -> list[Record]:
    """Those of all devices' files in a folder."""
    return [record for file in sorted(results.glob("*.json")) for record in load(file)]


def fill(page: str, records: list[Record], plot: str) -> str:
    """The page with what was measured between its markers, or with the words that nothing was.
    Raises ValueError if it has no markers."""
    text = markdown(records, plot) if records else OWED + "\n"
    filled, count = _BLOCK.subn(lambda place: f"{place[1]}\n{text}\n{place[2]}", page)
    if count != 1:
        raise ValueError(f"the page has {count} places for the figures of GPUs, not one")
    return filled


def markdown(records: list[Record], plot: str) -> str:
    """Device by device: ceilings, bars, passes, serving, attention and kernels."""
    parts = [f"![share of the floor](img/{plot})\n"] if plot else []
    for device in dict.fromkeys(record.device for record in records):
        own = [record for record in records if record.device == device]
        dates = sorted({record.date for record in own})
        versions = ", ".join(sorted({record.torch for record in own}))
        days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        parts.append(f"### {device}\n\n{days}, torch {versions}.\n")
        parts += [part for part in (_ceilings(own), _bars(own), *_sections(own)) if part]
    return "\n".join(parts)


def _ceilings(records: list[Record]) -> str:
    value = {record.metric: record.value for record in records if record.section == "ceilings"}
    if not value:
        return ""
    return (
        f"Ceilings: {value['bytes per second'] / 1e9:.0f} GB/s, "
        f"{value['bfloat16 operations per second'] / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{value['fp8 operations per second'] / 1e12:.0f} in fp8.\n"
    )


def _bars(records: list[Record]) -> str:
    rows = [
        (
            each.bar.name,
            _named(each.record),
            f"{each.record.value:.3f}",
            f"{'<' if each.bar.most else '≥'} {each.bar.bound:g}",
            "yes" if each.passed else "**no**",
        )
        for each in judged(records)
    ]
    return _table("Bars", ("bar", "of", "measured", "wanted", "reached"), rows)


def _sections(records: list[Record]) -> Iterable[str]:
    for section, title, metrics in (
        ("passes", "Passes", ("seconds", "mbu", "mfu", "gap", "idle", "host wait")),
        (
            "serving",
            "Beside transformers",
            ("baton output tokens/s", "transformers output tokens/s", "ratio"),
        ),
        ("attention", "Attention of one layer", ("seconds", "of bandwidth", "of product")),
        (
            "handoff",
            "KV from another process",
            (
                "direct GB/s",
                "by host GB/s",
                "ratio",
                "direct one block us",
                "by host one block us",
            ),
        ),
        ("parallel", "Shards beside one device", ("seconds", "seconds on one", "ratio")),
        ("kernels", "Kernels", ("seconds", "share")),
    ):
        values: dict[str, dict[str, float]] = {}
        for record in records:
            if record.section == section:
                values.setdefault(_named(record), {})[record.metric] = record.value
        heads = tuple(metric.replace("seconds", "ms") for metric in metrics)
        rows = [
            (name, *(_cell(metric, found.get(metric)) for metric in metrics))
            for name, found in values.items()
        ]
        yield _table(title, ("", *heads), rows)


def _named(record: Record) -> str:
    form = _NAMES.get(record.format, record.format)
    return ", ".join(part for part in (record.shape, form, record.workload) if part)


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric.startswith("seconds"):
        return f"{value * 1e3:.3f}"
    if metric.endswith("tokens/s"):
        return f"{value:.0f}"
    return f"{value:.1%}" if metric in ("gap", "idle", "host wait") else f"{value:.2f}"


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [f"**{title}**", "", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(records: list[Record], file: Path) -> None:
    """The share of the floor that each pass reaches: of bandwidth or of torch's product, whichever
    binds."""
    shares: dict[str, float] = {}
    for record in records:
        if record.section == "passes" and record.metric in ("mbu", "mfu"):
            name = f"{record.device}: {_named(record)}"
            shares[name] = max(shares.get(name, 0.0), record.value)
    if not shares:
        return
    plots = pyplot()
    names = list(shares)[::-1]
    figure, axes = plots.subplots(figsize=(9, 1 + 0.28 * len(names)))
    axes.barh(names, [shares[name] for name in names], color="#4477aa")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the roofline's floor")
    axes.set_xlim(0, 1.05)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plots.close(figure)
