"""Prometheus metrics of a decode worker, beside those of its engine."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from baton.types import Load
from engine.metrics import EngineMetrics
from scheduling.residency import Counters


class DecodeMetrics(EngineMetrics):
    """What becomes of KV: who gives way, what is swapped, who outlives its prediction."""

    def __init__(self, block_bytes: int, registry: CollectorRegistry = REGISTRY) -> None:
        """`block_bytes`: of one KV block."""
        super().__init__("decode", registry)
        self._block_bytes = block_bytes
        self._last = Counters()
        self._preemptions = Counter(
            "baton_decode_preemptions",
            "sequences that gave up their KV blocks",
            ["kind"],
            registry=registry,
        )
        self._swapped = Counter(
            "baton_decode_kv_swap_bytes",
            "KV that left for the host, or came back",
            ["direction"],
            registry=registry,
        )
        self._pulled = Counter(
            "baton_decode_kv_pulled_bytes",
            "KV that came from prefill workers",
            ["transport"],
            registry=registry,
        )
        self._mispredictions = Counter(
            "baton_decode_length_mispredictions",
            "sequences that outlived the allotment predicted for them",
            registry=registry,
        )
        self._stalls = Counter(
            "baton_decode_swap_stalls", "passes that waited for swaps", registry=registry
        )
        self._sequences = Gauge(
            "baton_decode_sequences_swapped", "sequences whose KV is on the host", registry=registry
        )
        self._host_blocks = Gauge(
            "baton_decode_kv_host_blocks_used", "KV blocks in use on the host", registry=registry
        )
        for kind in ("recompute", "swap"):
            self._preemptions.labels(kind)
        for direction in ("out", "in"):
            self._swapped.labels(direction)

    def pulled(self, transport: str, size: int) -> None:
        """So many bytes of KV came by this transport."""
        self._pulled.labels(transport).inc(size)

    def residency(self, now: Counters) -> None:
        """The scheduler's counters stand at `now`."""
        last, self._last = self._last, now
        self._preemptions.labels("recompute").inc(now.recomputed - last.recomputed)
        self._preemptions.labels("swap").inc(now.swapped_out - last.swapped_out)
        self._swapped.labels("out").inc((now.blocks_out - last.blocks_out) * self._block_bytes)
        self._swapped.labels("in").inc((now.blocks_in - last.blocks_in) * self._block_bytes)
        self._mispredictions.inc(now.mispredictions - last.mispredictions)
        self._stalls.inc(now.waits + now.stalls - last.waits - last.stalls)

    def load(self, load: Load) -> None:
        """Show how busy the worker is, on the host too."""
        super().load(load)
        self._sequences.set(load.swapped)
        self._host_blocks.set(load.host_blocks)
