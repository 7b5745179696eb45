"""A loop that serves sequences by a policy alone: no memory, no token budget, no admission."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from baton.types import LengthEstimate, Request, Sampling, Stopping
from scheduling.cost import LinearCost, Work
from scheduling.order import Policy
from scheduling.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class Job:
    """What arrives, and how long its output really is."""

    arrives: float
    prompt: int
    output: int
    estimate: int | None = None
    priority: int = 0
    deadline: float | None = None
    level: int = 0

    def request(self, id: str) -> Request:
        """The request, as a worker sees it."""
        estimate = None if self.estimate is None else LengthEstimate(self.estimate, self.estimate)
        return Request(
            id,
            (1,) * self.prompt,
            Sampling(),
            Stopping(self.output),
            priority=self.priority,
            deadline=self.deadline,
            estimate=estimate,
            level=self.level,
        )


@dataclass(slots=True)
class Served:
    """What happened to the jobs, by their place in the list."""

    finished: dict[int, float] = field(default_factory=dict)
    longest_wait: float = 0.0  # between two passes of the same sequence, or until its first
    longest_pass: float = 0.0
    most_waiting: int = 0

    def mean_latency(self, jobs: list[Job]) -> float:
        """Mean of the times from arrival to the last token."""
        return sum(self.finished[i] - job.arrives for i, job in enumerate(jobs)) / len(jobs)


def serve(
    policy: Policy,
    jobs: list[Job],
    cost: LinearCost,
    *,
    slots: int = 1,
    watch: Callable[[list[Sequence], float], None] | None = None,
) -> Served:
    """Run passes of the best `slots` sequences until all have ended. `watch` sees those that are
    there, in rank order, before each pass."""
    served, now, ahead = Served(), 0.0, sorted(range(len(jobs)), key=lambda i: jobs[i].arrives)
    live: list[Sequence] = []
    while live or ahead:
        if not live:
            now = max(now, jobs[ahead[0]].arrives)
        while ahead and jobs[ahead[0]].arrives <= now:
            number = ahead.pop(0)
            live.append(start(policy, jobs[number], now, id=str(number)))
        policy.promote(live, now)
        live.sort(key=policy.rank)
        if watch is not None:
            watch(live, now)
        chosen = live[:slots]
        seconds = cost.seconds(work_of(chosen))
        served.longest_pass = max(served.longest_pass, seconds)
        served.most_waiting = max(served.most_waiting, len(live))
        for sequence in chosen:
            served.longest_wait = max(served.longest_wait, now - sequence.waiting_since)
        now += seconds
        for sequence in chosen:
            if advance(policy, sequence, seconds, now):
                served.finished[int(sequence.request.id)] = now
                live.remove(sequence)
    return served


def start(policy: Policy, job: Job, now: float = 0.0, id: str = "r") -> Sequence:
    """A sequence of the job that has joined."""
    sequence = Sequence.start(job.request(id), 0, now)
    policy.join(sequence, sequence.uncomputed, now)
    return sequence


def advance(policy: Policy, sequence: Sequence, seconds: float, now: float) -> bool:
    """A pass computes all of its tokens and samples one more; True if that ends it."""
    sequence.computed = len(sequence.tokens)
    policy.charge(sequence, seconds, now)
    if sequence.append(7) is None:
        return False
    sequence.phase = Phase.FINISHED
    return True


def work_of(chosen: Iterable[Sequence]) -> Work:
    """What a pass with all their tokens does."""
    prompts = [s.uncomputed for s in chosen if not s.generating]
    contexts = [len(s.tokens) for s in chosen if s.generating]
    return Work(
        prompt_tokens=sum(prompts),
        attention=sum(n * n for n in prompts),
        sequences=len(contexts),
        context=sum(contexts),
    )
