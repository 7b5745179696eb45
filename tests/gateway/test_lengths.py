"""Output lengths in the gateway: predicted at intake, learnt at the end, reported, recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from baton.config import GatewayConfig
from baton.errors import ModelError
from baton.length_classifier import CLIPPED
from baton.types import FinishReason, LengthEstimate, Output, Request, Sampling, Stopping
from gateway.job import Job
from gateway.length_process import LengthProcess
from gateway.length_records import LengthRecords
from gateway.length_store import LengthStore
from gateway.lengths import Decode, Lengths, open_lengths
from gateway.metrics import GatewayMetrics
from gateway.model_files import load_facts
from gateway.session import Session
from gateway.tokenizer import Tokenizer
from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets

EOS = frozenset({1})
BUCKETS = Buckets((4, 16, 64, 256))
SETTINGS = PredictorSettings(BUCKETS, warm_up=3, rows=512, recalled=64)


def job(prompt: Sequence[int] = (5, 6, 7), *, n: int = 1, **stopping: object) -> Job:
    stop = Stopping(**{"max_tokens": 100, "eos_token_ids": EOS, **stopping})  # type: ignore[arg-type]
    request = Request("r", tuple(prompt), Sampling(n=n), stop)
    return Job(request=request, tenant="t", queue_timeout=1.0)


class Bench:
    """A `Lengths` without Redis, and sessions that end as told."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        records: Path | None = None,
        classifier: object = None,
        decode: Decode | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.registry = CollectorRegistry()
        self.predictor = LengthPredictor(SETTINGS)
        self.records = LengthRecords(records) if records else None
        self.lengths = Lengths(
            self.predictor,
            LengthStore(self.predictor, None, None),
            decode or tokenizer.decode,
            GatewayMetrics(self.registry),
            classifier=classifier,  # type: ignore[arg-type]
            records=self.records,
        )

    def end(self, job: Job, tokens: int, reason: FinishReason | None) -> None:
        """One session whose sequences all end like this; no reason: the client went away."""
        session = Session(job, "m", self.tokenizer, clock=lambda: 0.0, on_done=self.lengths.ended)
        for index in range(job.request.sampling.n):
            session.accept(Output("r", index, (9,) * tokens))
        if reason is None:
            session.fail(RuntimeError("gone"))
        else:
            session.end(reason)

    async def serve(self, job: Job, tokens: int, reason: FinishReason | None) -> Job:
        predicted = await self.lengths.predicted(job)
        self.end(predicted, tokens, reason)
        return predicted

    def answered(self, source: str) -> float | None:
        return self.registry.get_sample_value("baton_length_predictions_total", {"source": source})


@pytest.fixture
def tokenizer(model_directory: Path) -> Tokenizer:
    return Tokenizer.load(model_directory)


@pytest.fixture
def bench(tokenizer: Tokenizer) -> Bench:
    return Bench(tokenizer)


async def test_requests_get_an_estimate_once_some_have_ended(bench: Bench) -> None:
    for _ in range(3):
        served = await bench.serve(job(), 12, FinishReason.STOP)
        assert served.request.estimate is None
    estimate = (await bench.lengths.predicted(job())).request.estimate
    assert estimate is not None
    assert abs(estimate.tokens - 12) <= 4
    assert estimate.allotment == 16
    assert bench.answered("none") == 3
    assert bench.answered("online") == 1


async def test_every_sequence_of_a_request_is_learnt_from(bench: Bench) -> None:
    await bench.serve(job(n=3), 12, FinishReason.STOP)
    assert bench.predictor.state.seen == 3


async def test_what_ends_only_at_max_tokens_needs_no_prediction(bench: Bench) -> None:
    for endless in (job(eos_token_ids=frozenset()), job(min_tokens=100)):
        served = await bench.serve(endless, 100, FinishReason.LENGTH)
        assert served.request.estimate == LengthEstimate(100, 100)
    assert bench.predictor.state.seen == 0


async def test_no_estimate_is_below_min_tokens(bench: Bench) -> None:
    for _ in range(5):
        await bench.serve(job(), 2, FinishReason.STOP)
    estimate = (await bench.lengths.predicted(job(min_tokens=40))).request.estimate
    assert estimate is not None
    assert estimate.tokens == 40
    assert estimate.allotment >= 40


@pytest.mark.parametrize(
    "reason", [None, FinishReason.ABORTED, FinishReason.TIME_LIMIT, FinishReason.LENGTH]
)
async def test_an_output_that_was_cut_counts_as_longer(
    bench: Bench, reason: FinishReason | None
) -> None:
    for turn in range(40):
        await bench.serve(job((turn, 2)), 70, FinishReason.STOP)
        await bench.serve(job((turn, 3), max_tokens=10), 10, reason)
    estimate = (await bench.lengths.predicted(job((99,)))).request.estimate
    assert estimate is not None
    assert estimate.tokens > 40


async def test_a_predictor_that_fails_costs_no_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    predicted = await bench.lengths.predicted(job())
    for name in ("predict", "learn"):
        monkeypatch.setattr(bench.predictor, name, fail)
    bench.end(predicted, 12, FinishReason.STOP)
    served = await bench.serve(job(), 12, FinishReason.STOP)
    assert served.request.estimate is None
    assert "is not predicted" in caplog.text
    assert "nothing is learnt" in caplog.text


async def test_of_a_huge_prompt_only_the_ends_are_looked_at(tokenizer: Tokenizer) -> None:
    decoded: list[int] = []
    asked: list[str] = []

    class Classifier:
        ready = True

        async def probabilities(self, text: str, seconds: float) -> list[float]:
            asked.append(text)
            return [0.0, 0.0, 1.0, 0.0]

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return tokenizer.decode(ids)

    bench = Bench(tokenizer, classifier=Classifier(), decode=decode)
    short = tokenizer.encode("hello")
    huge = (*short, *[tokenizer.encode("x")[0]] * 1_000_000, *short)
    await bench.lengths.predicted(job(huge))
    assert sum(decoded) == 2 * CLIPPED
    assert asked[0].startswith("hello")
    assert asked[0].endswith("hello")
    assert len(asked[0]) <= 2 * CLIPPED + 1


async def test_a_request_that_never_began_teaches_nothing(bench: Bench) -> None:
    await bench.serve(job(), 0, None)
    assert bench.predictor.state.seen == 0


class Scripted:
    """A classifier that says what it is told."""

    def __init__(self, answer: list[float] | None, *, ready: bool = True) -> None:
        self.answer, self.ready = answer, ready
        self.texts: list[str] = []

    async def probabilities(self, text: str, seconds: float) -> list[float] | None:
        self.texts.append(text)
        return self.answer


async def test_a_classifier_is_believed_before_anything_was_learnt(tokenizer: Tokenizer) -> None:
    classifier = Scripted([0.0, 0.0, 1.0, 0.0])
    bench = Bench(tokenizer, classifier=classifier)
    prompt = tokenizer.encode("hello world")
    served = await bench.serve(job(prompt), 3, FinishReason.STOP)
    assert served.request.estimate == LengthEstimate(40, 64)  # the bucket is 17 to 64
    assert classifier.texts == ["hello world"]
    assert bench.answered("classifier") == 1
    report = bench.lengths.report()
    assert report is not None  # the report is about what was said
    assert report.accuracy == 0


@pytest.mark.parametrize(
    "classifier",
    [Scripted(None), Scripted([1.0], ready=False), Scripted([1.0]), Scripted([float("nan")] * 4)],
    ids=["late", "not ready", "wrong size", "no numbers"],
)
async def test_without_its_answer_the_online_prediction_stands(
    tokenizer: Tokenizer, classifier: Scripted
) -> None:
    bench = Bench(tokenizer, classifier=classifier)
    for _ in range(3):
        await bench.serve(job(), 12, FinishReason.STOP)
    estimate = (await bench.lengths.predicted(job())).request.estimate
    assert estimate is not None
    assert estimate.allotment == 16
    assert bench.answered("classifier") is None


async def test_records_hold_text_and_lengths(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    bench = Bench(tokenizer, records=path)
    prompt = tokenizer.encode("hello world")
    await bench.serve(job(prompt, n=2), 12, FinishReason.STOP)
    await bench.serve(job(prompt), 5, None)
    await bench.lengths.close()
    assert path.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["finish"] for line in lines] == ["stop", "stop", "cancelled"]
    assert lines[0] == {
        "text": "hello world",
        "prompt_tokens": len(prompt),
        "max_tokens": 100,
        "output_tokens": 12,
        "finish": "stop",
    }


async def test_records_that_cannot_be_written_harm_nothing(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tokenizer, records=tmp_path)
    await bench.serve(job(), 12, FinishReason.STOP)
    await bench.lengths.close()
    assert "1 records lost" in caplog.text


def test_the_configuration_chooses(model_directory: Path, tmp_path: Path) -> None:
    def opened(**options: object) -> Lengths | None:
        config = GatewayConfig(**options)
        facts = load_facts(model_directory)
        return open_lengths(config, facts, lambda ids: "", GatewayMetrics(CollectorRegistry()))

    assert opened(length_predictor="off") is None
    assert opened() is not None
    with pytest.raises(ModelError, match="length classifier"):
        opened(length_predictor=str(tmp_path))


# -- Served --------------------------------------------------------------------------------


async def test_workers_are_told_what_is_expected_and_admins_how_good_that_is(pair) -> None:
    for _ in range(34):
        await pair.client.generate_unary("hello world", max_tokens=6)
    told = pair.p.requests[-1].request
    assert told.HasField("estimate")
    assert (told.estimate.tokens, told.estimate.allotment) == (6, 6)
    assert not pair.p.requests[0].request.HasField("estimate")
    found = (await pair.client.status()).length_prediction
    assert found.seen == 34
    assert found.accuracy == 1
    assert found.majority_accuracy == 1  # max_tokens tells all: nothing was learnt


async def test_nothing_is_predicted_if_it_is_off(cluster) -> None:
    await cluster.start(length_predictor="off")
    await cluster.prefill()
    await cluster.decode()
    await cluster.ready()
    await cluster.client.generate_unary("hello world", max_tokens=6)
    assert not (await cluster.client.status()).HasField("length_prediction")


async def test_a_restarted_gateway_goes_on_with_what_was_learnt(cluster, tmp_path: Path) -> None:
    path = tmp_path / "lengths"
    await cluster.prefill()
    await cluster.decode()
    for turn in range(2):
        server = await cluster.start(length_state=path)
        await cluster.ready()
        assert server.gateway.lengths is not None
        report = server.gateway.lengths.report()
        assert (report is None) == (turn == 0)
        for _ in range(34):
            await cluster.client.generate_unary("hello world", max_tokens=6)
        await cluster.client.close()
        await server.stop(0)
        cluster.server = None
        cluster.registry = CollectorRegistry()
        assert path.stat().st_size > 0


async def test_a_classifier_that_cannot_start_delays_nothing(
    bench: Bench, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "baton_lengths.json").write_text('{"edges": [4, 16, 64, 256]}')
    process = LengthProcess(tmp_path, ["false"])
    bench = Bench(tokenizer, classifier=process)
    running = asyncio.create_task(process.run())
    await bench.serve(job(), 12, FinishReason.STOP)
    assert bench.answered("none") == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
