"""What the gateway tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from baton.telemetry import LATENCY_BUCKETS, TPOT_BUCKETS, TTFT_BUCKETS
from gateway.session import Session
from queueing.contract import LevelDepth
from scheduling.length_report import LengthReport


class GatewayMetrics:
    """Counters and histograms of the public API."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "baton_requests", "Requests ended, by gRPC status", ["code"], registry=registry
        )
        self.inflight = Gauge("baton_requests_inflight", "Requests being served", registry=registry)
        self.prompt_tokens = Counter(
            "baton_prompt_tokens", "Prompt tokens of accepted requests", registry=registry
        )
        self.generation_tokens = Counter(
            "baton_generation_tokens", "Output tokens of ended requests", registry=registry
        )
        self.finished = Counter(
            "baton_sequences_finished",
            "Sequences ended, by finish reason",
            ["reason"],
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "baton_time_to_first_token_seconds",
            "Arrival to first token",
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "baton_time_per_output_token_seconds",
            "Mean time between the tokens of a sequence",
            buckets=TPOT_BUCKETS,
            registry=registry,
        )
        self.latency = Histogram(
            "baton_e2e_request_latency_seconds",
            "Arrival to last token",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.queue_time = Histogram(
            "baton_request_queue_time_seconds",
            "Arrival to first scheduling",
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self.queue_depth = Gauge(
            "baton_queue_depth", "Waiting requests, by MLFQ level", ["level"], registry=registry
        )
        self.length_predictions = Counter(
            "baton_length_predictions",
            "Requests, by who predicted their output length",
            ["source"],
            registry=registry,
        )
        self.length_quality = Gauge(
            "baton_length_prediction",
            "How good recent length predictions were, by figure of the report",
            ["figure"],
            registry=registry,
        )

    def session_done(self, session: Session, now: float) -> None:
        """Account for a session that is over."""
        self.generation_tokens.inc(session.generated)
        if session.time_to_first_token is not None:
            self.time_to_first_token.observe(session.time_to_first_token)
            self.queue_time.observe(session.stages.queue)
        for output in session.outputs:
            gaps = len(output.token_ids) - 1
            if gaps > 0 and output.first_token_at and output.last_token_at:
                span = output.last_token_at - output.first_token_at
                self.time_per_output_token.observe(span / gaps)
            if output.ending is not None:
                self.finished.labels(reason=output.ending.reason.name.lower()).inc()
        if session.error is None:
            self.latency.observe(now - session.job.request.arrived_at)

    def lengths(self, report: LengthReport) -> None:
        """Set how good length predictions are."""
        for figure, value in asdict(report).items():
            self.length_quality.labels(figure=figure).set(value)

    def depth(self, levels: Iterable[LevelDepth]) -> None:
        """Set the depth of the queue."""
        for level in levels:
            self.queue_depth.labels(level=level.level).set(level.requests)
