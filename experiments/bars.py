"""What B1 to B6 have to reach: read from the records, never assumed."""

from __future__ import annotations

from experiments.experiment import Bar
from experiments.orders import LEARNED, SKIP_JOIN
from experiments.records import EngineName, Results

_ENGINES: tuple[EngineName, ...] = ("real", "simulator")
_NEVER_WORSE = ("mean_jct_s", "p99_jct_s", "s_per_token", "mean_ttft_s", "p99_ttft_s")


class _Bars:
    """Collects the bars of one experiment on one engine; what was not measured is left out."""

    def __init__(self, results: Results, engine: EngineName) -> None:
        self._results = results
        self._engine: EngineName = engine
        self.found: list[Bar] = []

    def value(self, policy: str, metric: str, load: float, experiment: str = "B1") -> float | None:
        """One value, None if it is not there."""
        return self._results.value(
            experiment=experiment, engine=self._engine, policy=policy, load=load, metric=metric
        )

    def least(self, claim: str, value: float | None, limit: float) -> None:
        """At least `limit`."""
        self._add(claim, value, limit, at_least=True)

    def most(self, claim: str, value: float | None, limit: float) -> None:
        """At most `limit`."""
        self._add(claim, value, limit, at_least=False)

    def _add(self, claim: str, value: float | None, limit: float, *, at_least: bool) -> None:
        if value is not None:
            self.found.append(Bar(claim, self._engine, value, limit, at_least))


def load_bars(results: Results) -> list[Bar]:
    """Of B1: skip-join against FCFS and predicted-srpt against everybody at load 0.9, and nothing
    lost at load 0.5."""
    found: list[Bar] = []
    for engine in _ENGINES:
        bars = _Bars(results, engine)
        _skip_join(bars)
        _learned(bars)
        found += bars.found
    return found


def _skip_join(bars: _Bars) -> None:
    for metric, name, limit in (
        ("s_per_token", "per-token latency", 1.8),
        ("mean_jct_s", "mean JCT", 1.0),
    ):
        ours = bars.value(SKIP_JOIN, f"{metric}_vs_fcfs", 0.9)
        bars.least(f"load 0.9: {name}, FCFS over skip-join", _inverse(ours), limit)


def _learned(bars: _Bars) -> None:
    def ours(metric: str) -> float | None:
        return bars.value(LEARNED, metric, 0.9)

    bars.most(
        "load 0.9: predicted-srpt, mean JCT over the oracle's", ours("mean_jct_s_vs_oracle"), 1.15
    )
    bars.least(
        "load 0.9: per-token latency, FCFS over predicted-srpt",
        _inverse(ours("s_per_token_vs_fcfs")),
        2.0,
    )
    bars.most(
        "load 0.9: predicted-srpt, P99 JCT over the oracle's", ours("p99_jct_s_vs_oracle"), 1.0
    )
    tail, theirs = ours("p99_jct_s"), bars.value(SKIP_JOIN, "p99_jct_s", 0.9)
    if tail is not None and theirs is not None:
        bars.most("load 0.9: predicted-srpt, P99 JCT over skip-join's", tail / theirs, 0.5)
    bars.most("load 0.9: predicted-srpt, peak KV over FCFS's", ours("peak_kv_tokens_vs_fcfs"), 1.25)
    for metric in (*_NEVER_WORSE, "peak_kv_tokens", "makespan_s"):
        bars.most(
            f"load 0.5: predicted-srpt, {metric} over FCFS's",
            bars.value(LEARNED, f"{metric}_vs_fcfs", 0.5),
            1.02,
        )


def optimality_bars(results: Results) -> list[Bar]:
    """Of B4: skip-join's mean JCT is at most 1.5 times the oracle's at load 0.9."""
    found: list[Bar] = []
    for engine in _ENGINES:
        bars = _Bars(results, engine)
        ours = bars.value(SKIP_JOIN, "mean_jct_s_vs_oracle", 0.9, "B4")
        bars.most("load 0.9: skip-join, mean JCT over the oracle's", ours, 1.5)
        found += bars.found
    return found


def peak_bars(results: Results) -> list[Bar]:
    """Of B6: skip-join holds 2 to 4 times FCFS's KV at load 0.9, as the paper's argument says."""
    found: list[Bar] = []
    for engine in _ENGINES:
        bars = _Bars(results, engine)
        ours = bars.value(SKIP_JOIN, "peak_kv_tokens_vs_fcfs", 0.9, "B6")
        bars.least("load 0.9: skip-join, peak KV over FCFS's", ours, 2.0)
        found += bars.found
    return found


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value
