"""The live requests of a decode worker, each with its sequences."""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import Logprob, Request
from scheduling.events import LocalPrefill, PromptLogprobs
from scheduling.plan import Chunk
from scheduling.prompt import PromptRecord
from scheduling.sequence import Sequence
from scheduling.shares import Tenants


@dataclass(slots=True)
class Group:
    """The unfinished sequences of one request. `prompt` is kept while it is computed here and
    until it has been reported."""

    request: Request
    sequences: list[Sequence]
    prompt: PromptRecord | None

    @classmethod
    def of(cls, request: Request, prompt: PromptRecord | None, now: float) -> Group:
        """All sequences of `request` but those that an earlier attempt has finished."""
        indexes = (i for i in range(request.sampling.n) if not request.prior(i).finished)
        return cls(request, [Sequence.start(request, i, now) for i in indexes], prompt)

    def begin_pass(self, sequence: Sequence, now: float) -> None:
        """A pass with a part of it begins, in this sequence."""
        if self.prompt is not None:
            self.prompt.begin(sequence, now)

    def prompt_news(
        self, chunk: Chunk, logprobs: tuple[Logprob, ...], now: float
    ) -> list[LocalPrefill | PromptLogprobs]:
        """Note a chunk in the prompt's record; report and close it when the prompt is done."""
        if self.prompt is None:
            return []
        self.prompt.add(chunk, logprobs)
        if not chunk.sample:
            return []
        record, self.prompt = self.prompt, None
        events: list[LocalPrefill | PromptLogprobs] = [
            LocalPrefill(self.request.id, record.queued, record.computed(now), record.cached)
        ]
        if self.request.prompt_logprobs is not None:
            events.append(PromptLogprobs(self.request.id, tuple(record.logprobs)))
        return events


class Groups(dict[str, Group]):
    """The groups of all live requests, by request id, and whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.tenants = Tenants()

    def enter(self, group: Group) -> None:
        """A request is here."""
        self[group.request.id] = group
        self.tenants.came(group.request.tenant)

    def take(self, request_id: str) -> Group | None:
        """Forget a request; None if it is not here."""
        group = self.pop(request_id, None)
        if group is not None:
            self.tenants.went(group.request.tenant)
        return group

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, and its request with the last one."""
        group = self[sequence.request.id]
        group.sequences.remove(sequence)
        if not group.sequences:
            self.take(sequence.request.id)
