"""Prometheus metrics of an engine, the same in both kinds of worker."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from baton.telemetry import STEP_BUCKETS, TOKEN_BUCKETS
from baton.types import Load
from scheduling.plan import StepPlan
from scheduling.prefix import PrefixCounters


class EngineMetrics:
    """What every engine step and every change of load leaves behind."""

    def __init__(self, role: str, registry: CollectorRegistry = REGISTRY) -> None:
        def own(name: str) -> str:
            return f"baton_{role}_{name}"

        self.step_tokens = Histogram(
            own("step_tokens"), "tokens per pass", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.step_sequences = Histogram(
            own("step_sequences"), "sequences per pass", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.step_seconds = Histogram(
            own("step_seconds"), "wall time of a pass", buckets=STEP_BUCKETS, registry=registry
        )
        self.sampled = Counter(own("sampled_tokens"), "tokens sampled", registry=registry)
        self.running = Gauge(own("sequences_running"), "sequences in the batch", registry=registry)
        self.waiting = Gauge(own("sequences_waiting"), "sequences waiting", registry=registry)
        self.blocks_used = Gauge(own("kv_blocks_used"), "KV blocks in use", registry=registry)
        self.blocks = Gauge(own("kv_blocks"), "KV blocks", registry=registry)
        self.demotions = Counter(
            own("mlfq_demotions"), "sequences that sank", ["from", "to"], registry=registry
        )
        self.boosts = Counter(own("mlfq_boosts"), "sequences that rose", registry=registry)
        self.looked_up = Counter(
            own("prefix_lookup_tokens"),
            "tokens of sequences that were looked up in the prefix cache",
            registry=registry,
        )
        self.found = Counter(
            own("prefix_hit_tokens"), "those of them that were found", registry=registry
        )
        self._prefixes = PrefixCounters()

    def step(self, plan: StepPlan, seconds: float) -> None:
        """Account one pass, if the plan is one."""
        if not plan.chunks:
            return
        self.step_tokens.observe(plan.tokens)
        self.step_sequences.observe(len(plan.chunks))
        self.step_seconds.observe(seconds)
        self.sampled.inc(sum(chunk.sample for chunk in plan.chunks))

    def level(self, before: int, after: int) -> None:
        """A sequence was seen in one MLFQ level, and then in another or in the same."""
        if after > before:
            self.demotions.labels(str(before), str(after)).inc()
        elif after < before:
            self.boosts.inc()

    def prefixes(self, now: PrefixCounters) -> None:
        """The scheduler's counters stand at `now`."""
        last, self._prefixes = self._prefixes, now
        self.looked_up.inc(now.looked_up - last.looked_up)
        self.found.inc(now.found - last.found)

    def load(self, load: Load) -> None:
        """Show how busy the worker is."""
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        self.blocks_used.set(load.total_blocks - load.free_blocks)
        self.blocks.set(load.total_blocks)
