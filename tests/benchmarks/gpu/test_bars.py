"""Which figures are held against which bound."""

from __future__ import annotations

import pytest

from benchmarks.gpu.bars import BARS, Verdict, judged
from benchmarks.gpu.records import Record, Source

SOURCE = Source("GPU", "2026-11-21", "2.13.0")


def one(section: str, workload: str, metric: str, value: float, form: str = "") -> Record:
    shape = "llama-3-8b" if section in ("passes", "serving") else ""
    (record,) = SOURCE.records(section, workload, {metric: value}, shape=shape, form=form)
    return record


def only(record: Record) -> Verdict:
    (verdict,) = judged([record])
    return verdict


@pytest.mark.parametrize(
    ("record", "enough"),
    [
        (("passes", "generation 1 x 128", "mbu", "none"), 0.75),
        (("passes", "generation 64 x 2048", "mbu", "none"), 0.65),
        (("passes", "prompt 2 x 4096", "mfu", "none"), 0.55),
        (("serving", "256 x (256 + 128)", "ratio", ""), 2.0),
        (("attention", "decode, 64 x 8192", "of bandwidth", "int8"), 0.8),
        (("attention", "prompt, 4096 after 0", "of product", "bfloat16"), 0.5),
        (("kernels", "add_rms_norm x 8192", "share", ""), 0.8),
    ],
)
def test_a_figure_passes_from_its_bound_on(
    record: tuple[str, str, str, str], enough: float
) -> None:
    section, workload, metric, form = record
    assert only(one(section, workload, metric, enough, form)).passed
    assert not only(one(section, workload, metric, enough - 0.01, form)).passed


def test_waiting_for_the_host_has_to_stay_below_its_bound() -> None:
    assert only(one("passes", "generation 8 x 2048", "host wait", 0.049, "int8")).passed
    assert not only(one("passes", "generation 8 x 2048", "host wait", 0.05, "int8")).passed


@pytest.mark.parametrize(
    "record",
    [
        ("passes", "generation 8 x 2048", "mbu", "none"),
        ("passes", "generation 1 x 128", "mbu", "int4"),
        ("passes", "prompt 1 x 512", "mfu", "none"),
        ("attention", "decode, 64 x 2048", "of bandwidth", "bfloat16"),
        ("kernels", "rms_norm x 64", "share", ""),
        ("kernels", "gate_up, int4 x 8192", "share", ""),
    ],
)
def test_no_bar_is_for_other_figures(record: tuple[str, str, str, str]) -> None:
    section, workload, metric, form = record
    assert judged([one(section, workload, metric, 0.0, form)]) == []


def test_int4_is_compared_with_the_same_pass_in_bfloat16() -> None:
    work = "generation 1 x 128"
    (verdict,) = judged(
        [
            one("passes", work, "seconds", 0.009, "none"),
            one("passes", work, "seconds", 0.004, "int4"),
        ]
    )
    assert verdict.record.value == pytest.approx(2.25)
    assert verdict.passed
    assert "2.250 (>= 2.2)" in verdict.text


def test_every_bar_has_a_name_of_its_own() -> None:
    assert len({bar.name for bar in BARS}) == len(BARS)
