"""One request's life in the gateway, whichever workers serve it.

    QUEUED ──▶ RESERVING ──▶ PREFILLING ──▶ HANDING_OFF ──▶ DECODING ──▶ DONE
      ▲            │              │ local prefill │ ▲            │
      │            │              └───────────────┼─┴────────────┤
      └────────────┴── worker refused or died ────┴──────────────┘
    finished, failed, cancelled, out of time: from any state to DONE, which absorbs everything

Prompt and output stay here until the end, so that another worker can go on where one died: the
client's stream has no gap and no duplicate. Knows nothing about gRPC calls or Redis: attempts
feed it, the client's stream drains it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from baton import wire
from baton.types import Claim, FinishReason, Output, Request
from baton.v1 import generation_pb2
from baton.v1.generation_pb2 import Accepted, Finished, GenerateResponse, Timing, Usage
from gateway.job import Job
from gateway.output import SequenceOutput
from gateway.tokenizer import Tokenizer
from scheduling.prefix_map import PromptKeys


class State(Enum):
    """Where a request stands."""

    QUEUED = auto()
    RESERVING = auto()
    PREFILLING = auto()
    HANDING_OFF = auto()
    DECODING = auto()
    DONE = auto()


MIN_LEFT_TOKENS = 20  # of an output that outlived its prediction

_MOVES = {
    State.QUEUED: {State.RESERVING, State.DONE},
    State.RESERVING: {State.PREFILLING, State.QUEUED, State.DONE},
    State.PREFILLING: {State.HANDING_OFF, State.DECODING, State.QUEUED, State.DONE},
    State.HANDING_OFF: {State.DECODING, State.QUEUED, State.DONE},
    State.DECODING: {State.QUEUED, State.DONE},
    State.DONE: set(),
}


@dataclass(slots=True)
class Stages:
    """Seconds of each stage, as far as they are known."""

    queue: float = 0.0
    prefill: float = 0.0
    kv_transfer: float = 0.0


class Session:
    """Producers: the attempt that serves it, timers, Abort. Consumer: `responses`.

    Every method but `responses` is a plain call on the event loop: no producer ever waits for
    the client.
    """

    def __init__(
        self,
        job: Job,
        model: str,
        tokenizer: Tokenizer,
        *,
        clock: Callable[[], float],
        on_done: Callable[[Session], None],
    ) -> None:
        """`on_done` is called once, when nothing more will be generated."""
        self.job = job
        self.prefix = PromptKeys.of_request(job.request)
        self.state = State.QUEUED
        self.stages = Stages()
        self.cached_tokens = 0  # of the prompt, when it was first computed
        self.outputs = [SequenceOutput(i, job, tokenizer) for i in range(job.request.sampling.n)]
        self.error: Exception | None = None
        self.done = asyncio.Event()
        # Set by its owner.
        self.expected_cached = 0  # tokens of the prompt, when it came
        self.waiting_since = job.request.arrived_at
        self.level = 0
        self.claim: Claim | None = None
        self.worker_id: str | None = None
        self.resumed = self.outputs  # those that had not ended when a worker got it last

        self._model = model
        self._tokenizer = tokenizer
        self._clock = clock
        self._on_done = on_done
        self._news = asyncio.Event()
        self._prompt_logprobs: list[generation_pb2.TokenLogprob] | None = None
        self._reported: set[int] = set()  # sequences whose Finished was sent

    @property
    def id(self) -> str:
        """The request id."""
        return self.job.request.id

    @property
    def over(self) -> bool:
        """Nothing more will be generated."""
        return self.state is State.DONE

    def is_open(self, index: int) -> bool:
        """Whether more tokens of this sequence may come."""
        return index < len(self.outputs) and self.outputs[index].ending is None

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether logprobs of its prompt are to come still: then all of it is computed."""
        return self.job.request.prompt_logprobs is not None and self._prompt_logprobs is None

    @property
    def generated(self) -> int:
        """Output tokens of all sequences."""
        return sum(len(output.token_ids) for output in self.outputs)

    def expected_left(self, mean: float) -> int:
        """Output tokens still to come, where an output has `mean` if nothing was predicted. One
        that outlived its prediction is expected to get a quarter longer."""
        request = self.job.request
        each = request.estimate.tokens if request.estimate else round(mean)
        each = min(each, request.stopping.max_tokens)
        done = [len(output.token_ids) for output in self.outputs if output.ending is None]
        left = (each - n if n < each else max(MIN_LEFT_TOKENS, n // 4) for n in done)
        return sum(left)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival."""
        first = [o.first_token_at for o in self.outputs if o.first_token_at is not None]
        return min(first) - self.job.request.arrived_at if first else None

    def move(self, state: State) -> None:
        """Change state; a move that is not in the drawing is a bug in the caller."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"request {self.id}: {self.state.name} -> {state.name}")
        self.state = state

    def engine_request(self) -> Request:
        """What a worker must do now: the request, and what earlier attempts generated."""
        request = replace(self.job.request, level=self.level)
        if self._prompt_logprobs is not None:
            request = replace(request, prompt_logprobs=None)
        if any(output.token_ids or output.ending for output in self.outputs):
            request = replace(request, prior_outputs=tuple(o.prior() for o in self.outputs))
        return request

    # What producers tell.

    def claimed(self, claim: Claim, level: int, worker_id: str) -> None:
        """A worker has it, and goes on with what had not ended before."""
        self.claim, self.level, self.worker_id = claim, level, worker_id
        self.resumed = [output for output in self.outputs if output.ending is None]

    def accept(self, output: Output) -> None:
        """New tokens of one sequence."""
        if self.over or output.index >= len(self.outputs):
            return
        self.outputs[output.index].push(
            output.token_ids, output.logprobs, output.finish, self._clock()
        )
        self._news.set()
        if all(sequence.ending for sequence in self.outputs):
            self._finish(None)

    def accept_prompt_logprobs(self, entries: Iterable[generation_pb2.TokenLogprob]) -> None:
        """Prompt logprobs as a worker reports them; later reports are ignored."""
        if not self.owes_prompt_logprobs:
            return
        self._prompt_logprobs = [self._with_bytes(entry) for entry in entries]
        self._news.set()

    def end(self, reason: FinishReason) -> None:
        """End every sequence that goes on, keeping what there is."""
        if not self.over:
            for sequence in self.outputs:
                sequence.end(reason)
            self._finish(None)

    def fail(self, error: Exception) -> None:
        """End with an error: the client gets what is there, then the status."""
        if not self.over:
            self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        self.error = error
        self.move(State.DONE)
        self.done.set()
        self._news.set()
        self._on_done(self)

    # What the client gets.

    async def responses(self) -> AsyncIterator[GenerateResponse]:
        """Accepted, deltas, one Finished per sequence, Usage. Raises the error it failed with."""
        request = self.job.request
        while self.owes_prompt_logprobs:
            if self.over:
                break
            await self._wait()
        if self.error is None or self.generated:
            accepted = Accepted(model=self._model, prompt_tokens=len(request.prompt_ids))
            accepted.prompt_logprobs.extend(self._prompt_logprobs or ())
            yield GenerateResponse(request_id=self.id, accepted=accepted)
        while True:
            over = self.over  # what comes after this look is seen in the next turn
            for sequence in self.outputs:
                # Looked at first: the end may come, with tokens, while a delta is being written.
                ended = sequence.ending is not None
                if (delta := sequence.take(last=over)) is not None:
                    yield GenerateResponse(request_id=self.id, delta=delta)
                if ended and sequence.index not in self._reported:
                    self._reported.add(sequence.index)
                    yield GenerateResponse(request_id=self.id, finished=self._finished(sequence))
            if over:
                break
            await self._wait()
        if self.error is not None:
            raise self.error
        yield GenerateResponse(request_id=self.id, usage=self.usage())

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()

    def usage(self) -> Usage:
        """Token accounting so far."""
        prompt, completion = len(self.job.request.prompt_ids), self.generated
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            cached_tokens=self.cached_tokens,
        )

    def _finished(self, sequence: SequenceOutput) -> Finished:
        ending = sequence.ending
        assert ending is not None
        message = Finished(
            index=sequence.index,
            reason=generation_pb2.FinishReason.ValueType(ending.reason.value),
            completion_tokens=len(sequence.token_ids),
            seed=self.job.request.sampling.seed,
        )
        if ending.stop is not None:
            message.stop = ending.stop
        elif ending.token_id is not None and ending.is_eos:
            message.eos_token_id = ending.token_id
        elif ending.token_id is not None:
            message.stop_token_id = ending.token_id
        if self.job.response.timing:
            message.timing.CopyFrom(self._timing(sequence))
        return message

    def _timing(self, sequence: SequenceOutput) -> Timing:
        first, last = sequence.first_token_at, sequence.last_token_at
        arrived = self.job.request.arrived_at
        return Timing(
            queue=wire.duration(self.stages.queue),
            prefill=wire.duration(self.stages.prefill),
            kv_transfer=wire.duration(self.stages.kv_transfer),
            time_to_first_token=wire.duration(first - arrived) if first else None,
            decode=wire.duration(last - first) if first and last else None,
        )

    def _with_bytes(self, entry: generation_pb2.TokenLogprob) -> generation_pb2.TokenLogprob:
        filled = generation_pb2.TokenLogprob()
        filled.CopyFrom(entry)
        filled.token = self._tokenizer.token_bytes(entry.token_id)
        for alternative in filled.top:
            alternative.token = self._tokenizer.token_bytes(alternative.token_id)
        return filled
