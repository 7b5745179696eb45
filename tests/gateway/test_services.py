"""ModelService, AdminService, health, reflection, metrics."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from gateway.tokenizer import Tokenizer


@pytest.fixture
def models(pair):
    return model_pb2_grpc.ModelServiceStub(pair.client.channel)


@pytest.fixture
def admin(pair):
    return model_pb2_grpc.AdminServiceStub(pair.client.channel)


async def code_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_the_model_is_listed_with_the_limits_of_its_workers(pair):
    (model,) = await pair.client.list_models()
    assert (model.name, model.vocab_size, model.revision) == ("tiny", 400, "weights")
    assert model.max_context_tokens == 200  # the model's own limit is 256, the workers' 200
    assert "chat" in model.capabilities


async def test_tokenize_gives_what_generate_sees(pair, models, model_directory):
    response = await models.Tokenize(model_pb2.TokenizeRequest(text="hello world"))
    tokenizer = Tokenizer.load(model_directory)
    assert list(response.token_ids) == tokenizer.encode("hello world")
    chat = generation_pb2.ChatInput(messages=[{"role": "user", "content": "hi"}])
    response = await models.Tokenize(model_pb2.TokenizeRequest(chat=chat))
    await pair.client.generate_unary([{"role": "user", "content": "hi"}], max_tokens=1)
    assert pair.p.requests[0].request.prompt_token_ids == response.token_ids


async def test_detokenize_is_the_inverse(models):
    for text in ("hello world", "é🙂" * 3000):
        ids = (await models.Tokenize(model_pb2.TokenizeRequest(text=text))).token_ids
        response = await models.Detokenize(model_pb2.DetokenizeRequest(token_ids=ids))
        assert response.text == "<s>" + text


async def test_bad_tokenizer_calls_have_their_status(models):
    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    detokenize, tokenize = models.Detokenize, models.Tokenize
    assert await code_of(tokenize(model_pb2.TokenizeRequest())) is invalid
    assert await code_of(tokenize(model_pb2.TokenizeRequest(text=""))) is invalid
    assert await code_of(tokenize(model_pb2.TokenizeRequest(text="x", model="y"))) is missing
    assert await code_of(detokenize(model_pb2.DetokenizeRequest(token_ids=[400]))) is invalid


async def test_status_shows_queue_workers_and_running_requests(pair, admin, eventually):
    pair.d.paused = True
    stream = pair.client.generate("hello", max_tokens=9)
    await anext(stream)
    await eventually(lambda: bool(pair.d.held))
    status = (await admin.GetStatus(model_pb2.GetStatusRequest())).status
    assert status.running_requests == 1
    assert status.levels
    assert not any(level.waiting_requests for level in status.levels)
    roles = {worker.id: worker.role for worker in status.workers}
    assert roles == {
        "decode-0": model_pb2.WORKER_ROLE_DECODE,
        "prefill-0": model_pb2.WORKER_ROLE_PREFILL,
    }
    await stream.aclose()


async def test_status_can_be_watched(pair, admin):
    call = admin.WatchStatus(model_pb2.WatchStatusRequest(interval=Duration(nanos=100_000_000)))
    await anext(aiter(call))
    await pair.client.generate_unary("hello", max_tokens=50)
    async for message in call:
        if message.status.output_tokens_per_second > 0:
            break
    call.cancel()
    bad = admin.WatchStatus(model_pb2.WatchStatusRequest(interval=Duration(nanos=1)))
    assert await code_of(anext(aiter(bad))) is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_is_not_there_yet_says_so(pair, admin):
    unimplemented = grpc.StatusCode.UNIMPLEMENTED
    drain = admin.DrainWorker(model_pb2.DrainWorkerRequest(worker_id="x"))
    assert await code_of(drain) is unimplemented
    generation = generation_pb2_grpc.GenerationServiceStub(pair.client.channel)
    resume = generation.Resume(generation_pb2.ResumeRequest(request_id="x"))
    assert await code_of(anext(aiter(resume))) is unimplemented


async def test_health_follows_the_drain(pair):
    stub = health_pb2_grpc.HealthStub(pair.client.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="baton.v1.GenerationService"))
    statuses = aiter(watch)
    assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.SERVING
    pair.d.paused = True
    stream = pair.client.generate("hello", max_tokens=9)
    await anext(stream)
    stop = asyncio.create_task(pair.server.stop(0.2))
    assert (await anext(statuses)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    async for _ in stream:
        pass
    await stop


async def test_metrics_count_requests_tokens_and_times(pair):
    await pair.client.generate_unary("hello", max_tokens=7)
    with pytest.raises(Exception, match="prompt"):
        await pair.client.generate_unary("")
    value = pair.registry.get_sample_value
    assert value("baton_requests_total", {"code": "OK"}) == 1
    assert value("baton_requests_total", {"code": "INVALID_ARGUMENT"}) == 1
    assert value("baton_requests_inflight") == 0
    assert value("baton_generation_tokens_total") == 7
    assert value("baton_prompt_tokens_total") > 1
    assert value("baton_sequences_finished_total", {"reason": "length"}) == 1
    for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency"):
        assert value(f"baton_{name}_seconds_count") == 1
