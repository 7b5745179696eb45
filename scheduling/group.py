"""The sequences of one request in a decode worker."""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import Request
from scheduling.prompt import PromptRecord
from scheduling.sequence import Sequence


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
