"""Output lengths in the gateway: predicted at intake, learnt when a request is over.

The online predictor (scheduling/length.py) is always there and learns from everything. A
transformers classifier, if there is one, is asked too, and believed as far as it was better
lately; when it is late or dead, the online predictor's answer stands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from baton.config import GatewayConfig
from baton.length_classifier import CLIPPED, clipped
from baton.types import FinishReason, LengthEstimate, Request
from gateway.job import Job
from gateway.length_process import LengthProcess
from gateway.length_records import LengthRecords
from gateway.length_store import LengthStore
from gateway.metrics import GatewayMetrics
from gateway.model_files import ModelFacts
from gateway.session import Session
from queueing.lengths import LengthsExchange
from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets
from scheduling.length_report import LengthReport

log = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]


class Lengths:
    """Sets `Request.estimate`, and sees to what must run beside the requests for it."""

    def __init__(
        self,
        predictor: LengthPredictor,
        store: LengthStore,
        decode: Decode,
        metrics: GatewayMetrics,
        *,
        classifier: LengthProcess | None = None,
        timeout: float = 0.05,
        records: LengthRecords | None = None,
    ) -> None:
        """`timeout`: the longest wait for the classifier, in seconds."""
        self._predictor = predictor
        self._store = store
        self._decode = decode
        self._metrics = metrics
        self._classifier = classifier
        self._timeout = timeout
        self._records = records

    async def predicted(self, job: Job) -> Job:
        """`job` with an estimate, unless there is none yet."""
        request = job.request
        most = request.stopping.max_tokens
        if _runs_to_the_end(job):
            return replace(job, request=replace(request, estimate=LengthEstimate(most, most)))
        try:
            return await self._told(job)
        except Exception:  # a request can do without
            log.exception("the length of request %s is not predicted", request.id)
            return job

    async def _told(self, job: Job) -> Job:
        request = job.request
        prediction = self._predictor.predict(request.prompt_ids, request.stopping.max_tokens)
        source = "online" if prediction.ripe else "none"
        if self._classifier is not None and self._classifier.ready:
            text = self._text(request)
            found = await self._classifier.probabilities(text, self._timeout)
            if found is not None:
                try:
                    prediction = self._predictor.adopted(prediction, found)
                    source = "classifier"
                except ValueError as error:
                    log.warning("the length classifier's answer is not used: %s", error)
        self._metrics.length_predictions.labels(source=source).inc()
        estimate = prediction.estimate and _at_least(prediction.estimate, request)
        request = replace(request, estimate=estimate)
        return replace(job, request=request, prediction=prediction)

    def ended(self, session: Session) -> None:
        """Learn from a request that is over, sequence by sequence. Never raises."""
        try:
            self._learn(session)
        except Exception:
            log.exception("nothing is learnt from request %s", session.id)

    def _learn(self, session: Session) -> None:
        job = session.job
        text = self._text(job.request) if self._records else ""
        for output in session.outputs:
            tokens, ending = len(output.token_ids), output.ending
            if job.prediction is not None:
                if ending is not None and ending.reason is FinishReason.STOP:
                    self._predictor.learn(job.prediction, max(1, tokens))
                else:
                    self._predictor.learn_cut(job.prediction, tokens)
            if self._records is not None:
                self._records.add(job, text, ending, tokens)

    def _text(self, request: Request) -> str:
        """What a classifier looks at of the prompt, in a time that does not grow with it."""
        ids = request.prompt_ids
        if len(ids) <= 2 * CLIPPED:
            return clipped(self._decode(ids))
        return clipped(f"{self._decode(ids[:CLIPPED])}\n{self._decode(ids[-CLIPPED:])}")

    def report(self) -> LengthReport | None:
        """How good recent predictions were, of all gateways of the pool."""
        return self._predictor.report()

    async def run(self) -> None:
        """Share, save, record, and keep the classifier alive until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._store.run())
            if self._records is not None:
                group.create_task(self._records.run())
            if self._classifier is not None:
                group.create_task(self._classifier.run())

    async def close(self) -> None:
        """Keep what was learnt. Call it when `run` has ended."""
        await self._store.close()
        if self._records is not None:
            await self._records.flush()


def open_lengths(
    config: GatewayConfig, facts: ModelFacts, decode: Decode, metrics: GatewayMetrics
) -> Lengths | None:
    """What the configuration asks for; None if nothing is predicted.

    Raises ModelError if it names a directory that is no length classifier, ConfigError for a
    Redis URL that cannot work.
    """
    if config.length_predictor == "off":
        return None
    classifier = None
    buckets = Buckets.geometric(facts.max_context)
    if config.length_predictor != "online":
        classifier = LengthProcess(Path(config.length_predictor))
        buckets = Buckets(classifier.edges)
    salt = f"{facts.name}\n{config.length_salt.get_secret_value()}"
    settings = PredictorSettings(buckets, quantile=config.length_quantile, salt=salt)
    predictor = LengthPredictor(settings)
    url = config.redis_url.get_secret_value()
    exchange = LengthsExchange(url, config.pool, predictor.shape.identity)
    store = LengthStore(predictor, exchange, config.length_state)
    store.load()
    return Lengths(
        predictor,
        store,
        decode,
        metrics,
        classifier=classifier,
        timeout=config.length_timeout,
        records=LengthRecords(config.record_lengths) if config.record_lengths else None,
    )


def _runs_to_the_end(job: Job) -> bool:
    """Nothing ends its output but `max_tokens`: there is nothing to predict, or to learn."""
    stopping = job.request.stopping
    stops = stopping.eos_token_ids or stopping.stop_token_ids or job.stop_strings
    return not stops or stopping.min_tokens >= stopping.max_tokens


def _at_least(estimate: LengthEstimate, request: Request) -> LengthEstimate:
    """No output is shorter than `min_tokens`."""
    least = request.stopping.min_tokens
    return LengthEstimate(max(estimate.tokens, least), max(estimate.allotment, least))
