"""One sequence's output: tokens in as the engine makes them, deltas out as the client takes them.

What nobody has taken yet stays here in one piece, so a slow reader costs at most the tokens that
the request may generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.types import Finish, FinishReason, Logprob, PriorOutput
from baton.v1.generation_pb2 import Delta, TokenLogprob, TopLogprob
from gateway.job import Job
from gateway.stops import StopMatcher
from gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sequence ended: `stop` is the caller's string, `token_id` the stop token or
    end-of-sequence token that matched."""

    reason: FinishReason
    stop: str | None = None
    token_id: int | None = None
    is_eos: bool = False


class SequenceOutput:
    """Producer: the session. Consumer: the client's stream, through `take`."""

    def __init__(self, index: int, job: Job, tokenizer: Tokenizer) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.ending: Ending | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._format = job.response
        self._include_stop = job.include_stop
        self._min_tokens = job.request.stopping.min_tokens
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(
            job.request.prompt_ids, skip_special_tokens=job.response.skip_special_tokens
        )
        self._matcher = StopMatcher(job.stop_strings, include=job.include_stop)
        self._needs_text = job.response.text or bool(job.stop_strings)
        self._text: list[str] = []  # not taken yet
        self._logprobs: list[Logprob] = []  # not taken yet
        self._taken = 0  # tokens

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprob],
        finish: Finish | None,
        now: float,
    ) -> None:
        """Add the engine's output. Ignored after the end: a stop string may end a sequence here
        while the engine is still generating it."""
        for i, token in enumerate(token_ids):
            if self.ending is not None:
                return
            matched = finish.token_id if finish and i == len(token_ids) - 1 else None
            self._push_token(token, silent=matched is not None and not self._include_stop)
            if i < len(logprobs):
                self._logprobs.append(logprobs[i])
            self.first_token_at = self.first_token_at or now
            self.last_token_at = now
        if finish is not None and self.ending is None:
            self._end(Ending(finish.reason, None, finish.token_id, finish.is_eos))

    def end(self, reason: FinishReason) -> None:
        """End it from outside, keeping what there is. Ignored after the end."""
        if self.ending is None:
            self._end(Ending(reason))

    def prior(self) -> PriorOutput:
        """What another worker must know to go on from here."""
        return PriorOutput(tuple(self.token_ids), finished=self.ending is not None)

    def take(self, *, last: bool = False) -> Delta | None:
        """Everything since the last delta, if it is time for one: the first token at once, then
        whenever `stream_interval` tokens are there, and all of it at the end. `last`: the request
        has ended, though this sequence may not have."""
        count = len(self.token_ids) - self._taken
        ready = count >= (self._format.stream_interval if self._taken else 1)
        over = last or self.ending is not None
        if not ready and not (over and (count or self._text)):
            return None
        delta = Delta(index=self.index, token_count=count)
        delta.text = "".join(self._text)
        if self._format.token_ids:
            delta.token_ids.extend(self.token_ids[self._taken :])
        delta.logprobs.extend(logprob_message(entry, self._tokenizer) for entry in self._logprobs)
        self._taken += count
        self._text.clear()
        self._logprobs.clear()
        return delta

    def _push_token(self, token: int, *, silent: bool) -> None:
        self.token_ids.append(token)
        if self._needs_text and not silent:
            self._push_text(self._detokenizer.push(token))

    def _push_text(self, text: str) -> None:
        if len(self.token_ids) <= self._min_tokens:
            self._show(text)  # stop strings count only in text after min_tokens
            return
        scan = self._matcher.push(text)
        self._show(scan.text)
        if scan.matched is not None:
            self.ending = Ending(FinishReason.STOP, stop=scan.matched)

    def _end(self, ending: Ending) -> None:
        if self._needs_text:
            self._push_text(self._detokenizer.flush())
            self._show(self._matcher.flush())
        self.ending = self.ending or ending  # the last characters may have completed a stop

    def _show(self, text: str) -> None:
        if text and self._format.text:
            self._text.append(text)


def logprob_message(entry: Logprob, tokenizer: Tokenizer) -> TokenLogprob:
    """A logprob as the client gets it, with the tokens' bytes."""
    return TokenLogprob(
        token_id=entry.token_id,
        token=tokenizer.token_bytes(entry.token_id),
        logprob=entry.logprob,
        rank=entry.rank,
        top=[
            TopLogprob(token_id=token, token=tokenizer.token_bytes(token), logprob=logprob)
            for token, logprob in entry.top
        ],
    )
