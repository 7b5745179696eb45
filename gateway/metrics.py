"""What the gateway tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from baton.telemetry import LATENCY_BUCKETS, TPOT_BUCKETS, TTFT_BUCKETS
from gateway.session import Session
from queueing.contract import LevelDepth
from scheduling.length_report import LengthReport


class GatewayMetrics:
    """Counters and histograms of the public API."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.requests = counter("baton_requests", "Requests ended, by gRPC status", ["code"])
        self.inflight = gauge("baton_requests_inflight", "Requests being served")
        self.prompt_tokens = counter("baton_prompt_tokens", "Prompt tokens of accepted requests")
        self.cached_tokens = counter(
            "baton_cached_prompt_tokens", "Prompt tokens that were not computed, of ended requests"
        )
        self.expected_cached_tokens = counter(
            "baton_expected_cached_prompt_tokens",
            "Prompt tokens that some worker was expected to have, of ended requests",
        )
        self.generation_tokens = counter(
            "baton_generation_tokens", "Output tokens of ended requests"
        )
        self.finished = counter(
            "baton_sequences_finished", "Sequences ended, by finish reason", ["reason"]
        )
        self.time_to_first_token = histogram(
            "baton_time_to_first_token_seconds", "Arrival to first token", buckets=TTFT_BUCKETS
        )
        self.time_per_output_token = histogram(
            "baton_time_per_output_token_seconds",
            "Mean time between the tokens of a sequence",
            buckets=TPOT_BUCKETS,
        )
        self.latency = histogram(
            "baton_e2e_request_latency_seconds", "Arrival to last token", buckets=LATENCY_BUCKETS
        )
        self.queue_time = histogram(
            "baton_request_queue_time_seconds", "Arrival to first scheduling", buckets=TTFT_BUCKETS
        )
        self.queue_depth = gauge("baton_queue_depth", "Waiting requests, by MLFQ level", ["level"])
        self.length_predictions = counter(
            "baton_length_predictions", "Requests, by who predicted their output length", ["source"]
        )
        self.length_quality = gauge(
            "baton_length_prediction",
            "How good recent length predictions were, by figure of the report",
            ["figure"],
        )

    def session_done(self, session: Session, now: float) -> None:
        """Account for a session that is over."""
        self.generation_tokens.inc(session.generated)
        self.cached_tokens.inc(session.cached_tokens)
        self.expected_cached_tokens.inc(session.expected_cached)
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
