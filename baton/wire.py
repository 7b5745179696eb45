"""Protobuf to types and back: the only translator between the wire and the core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf import duration_pb2

from baton.internal.v1 import worker_pb2
from baton.types import (
    Claim,
    Finish,
    FinishReason,
    KvRef,
    LengthEstimate,
    Load,
    Logprob,
    Output,
    PriorOutput,
    Request,
    Sampling,
    Stopping,
)
from baton.v1 import generation_pb2


def duration(seconds: float) -> duration_pb2.Duration:
    """A protobuf Duration; negative seconds (a clock read twice) become zero."""
    return duration_pb2.Duration(
        seconds=int(max(0.0, seconds)), nanos=int(max(0.0, seconds) % 1 * 1e9)
    )


def seconds(value: duration_pb2.Duration) -> float:
    """Seconds of a protobuf Duration."""
    return value.seconds + value.nanos * 1e-9


def sampling_to_proto(sampling: Sampling) -> generation_pb2.SamplingParams:
    """Every optional field is set."""
    return generation_pb2.SamplingParams(
        n=sampling.n,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=sampling.allowed_token_ids,
    )


def sampling_from_proto(message: generation_pb2.SamplingParams) -> Sampling:
    """Inverse of sampling_to_proto: no defaults are filled in here."""
    return Sampling(
        n=message.n,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        seed=message.seed,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        allowed_token_ids=tuple(message.allowed_token_ids),
    )


def request_to_proto(request: Request, now: float) -> worker_pb2.EngineRequest:
    """A request for a worker. Clocks stay at home: what travels of a deadline is the time that
    is left of it `now`."""
    stopping = request.stopping
    message = worker_pb2.EngineRequest(
        request_id=request.id,
        prompt_token_ids=request.prompt_ids,
        sampling=sampling_to_proto(request.sampling),
        max_tokens=stopping.max_tokens,
        min_tokens=stopping.min_tokens,
        stop_token_ids=sorted(stopping.stop_token_ids),
        eos_token_ids=sorted(stopping.eos_token_ids),
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        priority=request.priority,
        level=request.level,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        bypass_prefix_cache=request.bypass_cache,
        age=duration(now - request.arrived_at + request.waited),
        prior_outputs=[
            worker_pb2.PriorOutput(token_ids=p.token_ids, finished=p.finished)
            for p in request.prior_outputs
        ],
    )
    if request.estimate is not None:
        message.estimate.tokens = request.estimate.tokens
        message.estimate.allotment = request.estimate.allotment
    if request.deadline is not None:
        message.time_left.CopyFrom(duration(request.deadline - now))
    return message


def request_from_proto(message: worker_pb2.EngineRequest, now: float) -> Request:
    """A request as a worker sees it, arrived `now` on the worker's clock."""
    estimate = message.estimate
    return Request(
        id=message.request_id,
        prompt_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_proto(message.sampling),
        stopping=Stopping(
            max_tokens=message.max_tokens,
            min_tokens=message.min_tokens,
            stop_token_ids=frozenset(message.stop_token_ids),
            eos_token_ids=frozenset(message.eos_token_ids),
        ),
        priority=message.priority,
        level=message.level,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        bypass_cache=message.bypass_prefix_cache,
        arrived_at=now,
        waited=seconds(message.age),
        deadline=now + seconds(message.time_left) if message.HasField("time_left") else None,
        estimate=(
            LengthEstimate(estimate.tokens, estimate.allotment)
            if message.HasField("estimate")
            else None
        ),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        prior_outputs=tuple(
            PriorOutput(tuple(p.token_ids), p.finished) for p in message.prior_outputs
        ),
    )


def logprob_to_proto(logprob: Logprob) -> generation_pb2.TokenLogprob:
    """Token bytes are left empty: the gateway, which has the tokenizer, fills them."""
    return generation_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top=[generation_pb2.TopLogprob(token_id=t, logprob=p) for t, p in logprob.top],
    )


def logprob_from_proto(message: generation_pb2.TokenLogprob) -> Logprob:
    """Inverse of logprob_to_proto."""
    return Logprob(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        top=tuple((t.token_id, t.logprob) for t in message.top),
    )


def prompt_logprobs_to_proto(
    prompt_ids: Sequence[int], logprobs: Iterable[Logprob]
) -> list[generation_pb2.TokenLogprob]:
    """One entry per prompt token; the first token has no logprob."""
    first = generation_pb2.TokenLogprob(token_id=prompt_ids[0])
    return [first, *map(logprob_to_proto, logprobs)]


def output_to_proto(output: Output, slot: int) -> worker_pb2.StepOutput:
    """One sequence's part of a step, under its slot on the stream."""
    message = worker_pb2.StepOutput()
    put_output(message, output, slot)
    return message


def put_output(message: worker_pb2.StepOutput, output: Output, slot: int) -> None:
    """`output_to_proto` into an empty message: every step does this for each of its sequences."""
    message.slot = slot
    message.index = output.index
    message.token_ids.extend(output.token_ids)
    if output.logprobs:
        message.logprobs.extend(map(logprob_to_proto, output.logprobs))
    if output.finish is not None:
        message.finish_reason = generation_pb2.FinishReason.ValueType(output.finish.reason.value)
        if output.finish.token_id is not None:
            if output.finish.is_eos:
                message.eos_token_id = output.finish.token_id
            else:
                message.stop_token_id = output.finish.token_id


def output_from_proto(message: worker_pb2.StepOutput, request_id: str) -> Output:
    """Inverse of output_to_proto; the caller knows whose slot it is."""
    return Output(
        request_id=request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(logprob_from_proto, message.logprobs)),
        finish=_finish(message),
    )


def _finish(message: worker_pb2.StepOutput) -> Finish | None:
    if message.finish_reason == generation_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    reason = FinishReason(message.finish_reason)
    match message.WhichOneof("matched"):
        case "eos_token_id":
            return Finish(reason, message.eos_token_id, is_eos=True)
        case "stop_token_id":
            return Finish(reason, message.stop_token_id)
        case _:
            return Finish(reason)


def claim_to_proto(claim: Claim) -> worker_pb2.Claim:
    """A claim."""
    return worker_pb2.Claim(fence=claim.fence, attempt=claim.attempt)


def claim_from_proto(message: worker_pb2.Claim) -> Claim:
    """A claim."""
    return Claim(fence=message.fence, attempt=message.attempt)


def kv_ref_to_proto(ref: KvRef) -> worker_pb2.KvRef:
    """A KV reference."""
    return worker_pb2.KvRef(
        lease_id=ref.lease_id,
        control_address=ref.control_address,
        engine_id=ref.engine_id,
        layout_digest=ref.layout_digest,
        blocks=ref.blocks,
        tokens=ref.tokens,
        time_to_live=duration(ref.time_to_live),
    )


def kv_ref_from_proto(message: worker_pb2.KvRef) -> KvRef:
    """A KV reference."""
    return KvRef(
        lease_id=message.lease_id,
        control_address=message.control_address,
        engine_id=message.engine_id,
        layout_digest=message.layout_digest,
        blocks=message.blocks,
        tokens=message.tokens,
        time_to_live=seconds(message.time_to_live),
    )


def load_to_proto(load: Load) -> worker_pb2.Load:
    """A worker's load."""
    return worker_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        free_kv_blocks=load.free_blocks,
        total_kv_blocks=load.total_blocks,
        draining=load.draining,
    )


def load_from_proto(message: worker_pb2.Load) -> Load:
    """A worker's load."""
    return Load(
        running=message.running,
        waiting=message.waiting,
        free_blocks=message.free_kv_blocks,
        total_blocks=message.total_kv_blocks,
        draining=message.draining,
    )
