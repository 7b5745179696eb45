"""What is noted while a prompt is computed: its times, its logprobs, what was known of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.types import Logprob, Request
from scheduling.plan import Chunk
from scheduling.sequence import Sequence


@dataclass(slots=True)
class PromptRecord:
    """Notes on the prompt of one request, whichever of its sequences computes it."""

    request: Request
    arrived_at: float
    begun_at: float | None = None  # when its first pass was planned
    cached: int = 0  # prompt tokens that were computed before
    logprobs: list[Logprob] = field(default_factory=list)  # of prompt tokens 1, 2, ...

    def begin(self, sequence: Sequence, now: float) -> None:
        """A pass with a part of it begins; the first one counts."""
        if self.begun_at is None:
            self.begun_at = now
            self.cached = min(sequence.cached, sequence.prompt_length)

    def add(self, chunk: Chunk, logprobs: tuple[Logprob, ...]) -> None:
        """Take the logprobs of a pass, which are those of tokens from `chunk.start + 1` on.

        Those known already are passed over: a recomputed prompt gives them again.
        """
        known = len(self.logprobs) - chunk.start
        self.logprobs += logprobs[max(known, 0) :]

    @property
    def queued(self) -> float:
        """Seconds from arrival to the first pass."""
        return 0.0 if self.begun_at is None else self.begun_at - self.arrived_at

    def computed(self, now: float) -> float:
        """Seconds from the first pass to `now`."""
        return 0.0 if self.begun_at is None else now - self.begun_at
