"""Random histories of several gateways and workers, checked step by step against a model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from queueing import keys
from queueing.contract import Outcome
from queueing.embedded import EmbeddedRedis, find_servers
from tests.queueing.history import CAPACITY, GATEWAYS, ROLES, History
from tests.queueing.reference import SECOND

STEPS = 120

# What can happen: how often, and what each argument is drawn from.
Rules = list[tuple[int, str, dict[str, Sequence[Any]]]]
RULES: Rules = [
    (
        2,
        "time_passes",
        {"seconds": [0.001, 0.5, 2, 2, 4, 6, 21], "silent": ["", *GATEWAYS, *ROLES]},
    ),
    (1, "network_changes", {"lost": [True, False], "flushed": [True, False]}),
    (
        8,
        "submit",
        {
            "gateway": GATEWAYS,
            "tenant": "ab",
            "prompt": [1, 60, 60, 90, 91, 300, 390, 391, 700, 1700],
            "cached": [0, 0, 1, 59],
            "priority": [0, 0, 0, -1, 2],
            "ttl": [None, None, 3.0, 9.0],
            "reuse": [True, False, False, False],
            "handicap": [0.0, 0.0, 0.003, 5.0],
            "cost": [0.1, 0.1, 0.3, 2.0],
            "predicted": [None, None, 0, 3],
            "token_cost": [0.0, 0.125, 0.5],
            "expected": [0, 2, 3],
        },
    ),
    (
        3,
        "claim",
        {"gateway": GATEWAYS, "worker": list(ROLES), "back": [0, 0, 0, 1], "limit": [1, 2, 4]},
    ),
    (2, "claim_one", {"gateway": GATEWAYS, "worker": list(ROLES), "n": range(9)}),
    (1, "look", {"gateway": GATEWAYS, "limit": [1, 3, 16]}),
    (3, "claim_and_hand_off", {"gateway": GATEWAYS, "worker": ["p1", "p2"], "limit": [1, 2]}),
    (3, "handoff", {"n": range(90), "back": [0, 0, 1], "worker_back": [0, 0, 0, 1]}),
    (
        3,
        "give_back",
        {"n": range(90), "back": [0, 0, 1], "tokens": range(5), "fault": [True, False]},
    ),
    (
        5,
        "finish",
        {"n": range(90), "back": [None, 0, 0, 1], "outcome": list(Outcome), "tokens": range(5)},
    ),
    (6, "report", {"worker": list(ROLES), "rows": []}),
    (2, "reap", {"gateway": GATEWAYS}),
    (1, "promote", {"gateway": GATEWAYS}),
    (1, "reconcile_changes_nothing", {"gateway": GATEWAYS}),
    (
        1,
        "worker_comes_and_goes",
        {"worker": list(ROLES), "how": ["register", "register", "drain", "deregister"]},
    ),
]

# Three tenants whose queues are often empty while workers have requests of theirs.
TURNS: Rules = [
    (1, "time_passes", {"seconds": [0.001, 0.5], "silent": [""]}),
    (
        6,
        "submit",
        {
            "gateway": ["g1"],
            "tenant": "abc",
            "prompt": [1],
            "cached": [0],
            "priority": [0],
            "ttl": [None],
            "reuse": [False],
            "handicap": [0.0],
            "cost": [0.125, 1.5, 4.0],
            "predicted": [None],
            "token_cost": [0.125, 0.5, 1.0],
            "expected": [0, 1, 4],
        },
    ),
    (6, "claim", {"gateway": ["g1"], "worker": ["p1", "d1"], "back": [0], "limit": [1, 4]}),
    (1, "give_back", {"n": range(90), "back": [0], "tokens": range(3), "fault": [False]}),
    (
        4,
        "finish",
        {"n": range(90), "back": [None, 0], "outcome": list(Outcome), "tokens": range(5)},
    ),
    (2, "report", {"worker": ["p1", "d1"], "rows": []}),
]


class RandomHistory(History):
    """Draws what happens next."""

    def step(self, rules: Rules = RULES) -> None:
        weights = [weight for weight, _, _ in rules]
        [(_, name, choices)] = self.random.choices(rules, weights)
        drawn = {k: self.random.choice(v) for k, v in choices.items() if v}
        if name == "report":
            drawn["rows"] = [
                (
                    self.random.randrange(90),
                    self.random.choice([0, 0, 1]),
                    self.random.randrange(6),  # one more than there may be
                    self.random.choice([0.0, 0.05, 0.3]),
                )
                for _ in range(4)
            ]
        getattr(self, name)(**drawn)

    # What holds after every step

    def records_agree(self) -> None:
        pipeline = self.raw.pipeline(transaction=False)
        for r in self.model.requests.values():
            pipeline.hgetall(keys.key(self.pool, "request", r.id))
        records = self.runner.run(pipeline.execute())
        for r, stored in zip(self.model.requests.values(), records, strict=True):
            assert stored["state"] == r.state
            assert int(stored["level"]) == r.level
            assert float(stored["spent"]) == r.spent
            assert int(stored["generated"]) == r.generated
            assert int(stored["faults"]) == r.faults
            assert (stored["urgent"] == "1") == r.urgent
            if r.claimed:
                assert int(stored["bill"].split()[0]) == r.charged

    def lanes_agree(self) -> None:
        for (priority, tenant), tag in self.model.tags.items():
            lane = keys.key(self.pool, "lane", f"{priority}/{tenant}")
            assert int(self.runner.run(self.raw.hget(lane, "tag")) or 0) == tag

    def depth_agrees(self) -> None:
        if not self.model.gateways:
            return
        waiting = self.model.waiting()
        for depth in self.runner.run(self.gateways["g1"].depth()):
            here = [r for r in waiting if r.level == depth.level]
            oldest = max((self.model.now - r.queued_at for r in here), default=0)
            assert depth.requests == len(here)
            assert depth.tokens == sum(r.prompt for r in here)
            assert depth.oldest == pytest.approx(oldest / SECOND)

    def workers_never_hold_more_than_they_can_take(self) -> None:
        for id in self.model.workers:
            stored = self.runner.run(self.raw.hget(keys.key(self.pool, "worker", id), "tokens"))
            assert int(stored) == self.model.in_flight(id)
            charged = [r for r in self.model.held(id) if r.tokens]
            assert int(stored) <= CAPACITY or len(charged) == 1


@pytest.fixture(scope="module", params=find_servers(), ids=lambda binary: binary.name)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    binary: Path = request.param
    server = asyncio.run(EmbeddedRedis.start(binary))
    yield server.url
    asyncio.run(server.stop())


@pytest.mark.parametrize("seed", range(12))
def test_any_history_agrees_with_the_model(url: str, seed: int):
    history = RandomHistory(url, seed)
    try:
        history.everybody_starts()
        for _ in range(STEPS):
            history.step()
            history.records_agree()
            history.lanes_agree()
            history.depth_agrees()
            history.workers_never_hold_more_than_they_can_take()
    finally:
        history.teardown()


@pytest.mark.parametrize("seed", range(4))
def test_tenants_pay_alike_whatever_their_requests_generate(url: str, seed: int):
    history = RandomHistory(url, seed)
    try:
        history.everybody_starts()
        for _ in range(STEPS):
            history.step(TURNS)
            history.records_agree()
            history.lanes_agree()
        assert history.model.absorbed > 0
    finally:
        history.teardown()
