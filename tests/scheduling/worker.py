"""A decode scheduler stepped by hand."""

from __future__ import annotations

from baton.types import Output
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.cost import LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.rules import Rules

TOKEN_OF = checksum_token(1000)


class Worker:
    """A scheduler with an executor, stepped by hand on a clock of its own."""

    def __init__(
        self,
        capacity: Capacity,
        policy="fcfs",
        max_waiting=100,
        rules=None,
        block_keys=None,
        **options,
    ) -> None:
        self.scheduler = DecodeScheduler(
            capacity,
            make_policy(policy, **options),
            max_waiting=max_waiting,
            rules=rules or Rules(),
            block_keys=block_keys,
        )
        self.executor = CostModelExecutor(capacity, LinearCost(1.0, 0.0, 0.0), TOKEN_OF)
        self.now = 0.0
        self.tokens: dict[tuple[str, int], list[int]] = {}

    def submit(self, request):
        return self.scheduler.submit(request, self.now)

    def step(self):
        """One pass: (request id, index) -> tokens in it, and the events."""
        plan = self.scheduler.plan(self.now)
        assert plan is not None
        shape = {chunk.sequence.id: chunk.length for chunk in plan.chunks}
        result = self.executor.execute(plan)
        self.now += result.seconds
        return shape, self.take(self.scheduler.apply(plan, result, self.now))

    def take(self, events):
        self.scheduler.check_integrity()
        for event in events:
            if isinstance(event, Output):
                self.tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        return events

    def finish(self):
        """Run until nothing is left; the events of all passes."""
        events = []
        while self.scheduler.load().running + self.scheduler.load().waiting:
            events += self.step()[1]
        return events

    @property
    def free(self) -> int:
        return self.scheduler.load().free_blocks


def deliver(worker, sequence) -> int:
    """Write the KV that is missing, as a transfer does; the token sampled after all of it."""
    size = worker.executor.capacity.block_size
    for position in range(sequence.cached, len(sequence.tokens)):
        block = worker.executor.store.block(sequence.blocks[position // size]).cast("i")
        block[position % size] = sequence.tokens[position]
    return expected_tokens(sequence.request, sequence.index, TOKEN_OF)[0]
