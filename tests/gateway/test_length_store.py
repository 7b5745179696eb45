"""What was learnt about lengths: kept in a file, shared by gateways through Redis."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from baton.errors import QueueError
from gateway.length_store import LengthStore
from queueing.lengths import LengthsExchange, SharedLengths
from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets

SETTINGS = PredictorSettings(Buckets.geometric(512), warm_up=5, rows=512, recalled=64)


class Node:
    """A gateway's predictor and its store."""

    def __init__(self, exchange: LengthsExchange | None, file: Path | None = None) -> None:
        self.predictor = LengthPredictor(SETTINGS)
        self.exchange = exchange
        self.store = LengthStore(self.predictor, exchange, file)
        self.store.load()

    def learn(self, count: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            prompt = tuple(rng.randrange(1000) for _ in range(10))
            self.predictor.learn(self.predictor.predict(prompt, 512), rng.randrange(1, 300))

    @property
    def seen(self) -> int:
        return self.predictor.state.seen


@pytest.fixture
async def node(redis_url: str, pool: str) -> AsyncIterator[Callable[..., Node]]:
    """Makes gateways that share a pool."""
    made = []

    def make(file: Path | None = None) -> Node:
        shape = LengthPredictor(SETTINGS).shape.identity
        made.append(Node(LengthsExchange(redis_url, pool, shape), file))
        return made[-1]

    yield make
    for one in made:
        await one.exchange.close()


def assert_same(a: Node, b: Node) -> None:
    one, two = a.predictor.state, b.predictor.state
    assert one.seen == two.seen
    np.testing.assert_allclose(one.weights, two.weights, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(one.tallies, two.tallies, rtol=1e-6)


async def test_a_gateway_learns_what_another_has_learnt(node) -> None:
    one, two = node(), node()
    one.learn(50)
    await one.store.exchange()
    await two.store.exchange()
    assert two.seen == 50
    assert_same(one, two)


async def test_two_gateways_add_up_and_nothing_counts_twice(node) -> None:
    one, two = node(), node()
    for turn in range(5):
        one.learn(10, turn)
        two.learn(7, 100 + turn)
        await one.store.exchange()
        await two.store.exchange()
    await one.store.exchange()
    await two.store.exchange()
    assert one.seen == two.seen == 85
    assert_same(one, two)


async def test_a_write_that_comes_between_is_taken_in(node, monkeypatch) -> None:
    one, two = node(), node()
    one.learn(10, 1)
    two.learn(20, 2)
    write, late = one.exchange.write, []

    async def slow(expected: int, data: bytes) -> int | None:
        if not late:
            late.append(True)
            await two.store.exchange()
        return await write(expected, data)

    monkeypatch.setattr(one.exchange, "write", slow)
    await one.store.exchange()
    assert one.seen == 30


async def test_what_is_learnt_while_it_is_shared_is_kept_and_shared_next(node, monkeypatch) -> None:
    one, two = node(), node()
    one.learn(10, 1)
    write = one.exchange.write

    async def slow(expected: int, data: bytes) -> int | None:
        one.learn(5, 2)
        return await write(expected, data)

    monkeypatch.setattr(one.exchange, "write", slow)
    await one.store.exchange()
    monkeypatch.undo()
    assert one.seen == 15
    await two.store.exchange()
    assert two.seen == 10
    await one.store.exchange()
    await two.store.exchange()
    assert two.seen == 15


async def test_nothing_is_written_when_nothing_was_learnt(node) -> None:
    one = node()
    await one.store.exchange()
    assert (await one.exchange.read(0)).version == 0
    one.learn(5)
    for _ in range(3):
        await one.store.exchange()
    assert (await one.exchange.read(0)).version == 1


class Away:
    """Redis that does not answer."""

    async def read(self, known: int) -> SharedLengths:
        raise QueueError("away")

    async def close(self) -> None:
        pass


async def test_without_redis_a_gateway_goes_on_and_catches_up(node, tmp_path: Path) -> None:
    one, two = node(), node()
    one.learn(10)
    await one.store.exchange()
    real, one.store._exchange = one.store._exchange, Away()
    one.learn(10, 1)
    with pytest.raises(QueueError):
        await one.store.exchange()
    assert one.seen == 20
    one.store._exchange = real
    await one.store.exchange()
    await two.store.exchange()
    assert two.seen == 20


async def test_what_redis_has_lost_is_given_to_it_again(node, redis_url: str, pool: str) -> None:
    from redis.asyncio import Redis

    one, two = node(), node()
    one.learn(10)
    await one.store.exchange()
    redis = Redis.from_url(redis_url)
    await redis.delete(*[key async for key in redis.scan_iter(f"baton:{{{pool}}}:lengths:*")])
    await redis.aclose()
    one.learn(3, 1)
    await one.store.exchange()
    await two.store.exchange()
    assert one.seen == two.seen == 13


async def test_shared_bytes_that_make_no_sense_are_replaced(node) -> None:
    one, two = node(), node()
    await one.exchange.write(0, b"nonsense")
    one.learn(10)
    await one.store.exchange()
    await two.store.exchange()
    assert two.seen == 10


async def test_a_gateway_that_restarts_with_its_file_adds_nothing_twice(
    node, tmp_path: Path
) -> None:
    file = tmp_path / "lengths"
    one, other = node(file), node()
    one.learn(10)
    await one.store.close()
    other.learn(5, 3)
    await other.store.exchange()
    again = node(file)
    assert again.seen == 10
    await again.store.exchange()
    assert again.seen == 15
    again.learn(2, 4)
    await again.store.exchange()
    await other.store.exchange()
    assert other.seen == 17


async def test_the_file_is_replaced_whole_and_only_if_there_is_news(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    one = Node(None, file)
    await one.store.save()
    assert not file.exists()
    one.learn(10)
    await one.store.close()
    before = file.stat().st_ino
    await one.store.save()
    assert file.stat().st_ino == before
    one.learn(1, 1)
    await one.store.save()
    assert file.stat().st_ino != before
    assert Node(None, file).seen == 11
    assert os.listdir(tmp_path) == ["lengths"]  # noqa: PTH208


async def test_a_file_that_cannot_be_used_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "lengths"
    file.write_bytes(b"nonsense")
    assert Node(None, file).seen == 0
    assert "not used" in caplog.text
    caplog.clear()
    assert Node(None, file / "below a file").seen == 0
    assert "not used" in caplog.text
    caplog.clear()
    assert Node(None, tmp_path / "nothing yet").seen == 0
    assert not caplog.text


async def test_a_file_that_cannot_be_written_harms_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = Node(None, tmp_path / "nowhere" / "lengths")
    one.learn(3)
    await one.store.close()
    assert "not saved" in caplog.text
