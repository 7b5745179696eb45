"""The queue on a Redis server: a gateway's side and a worker's side.

The state machine itself is in lua/; here its arguments are spelled and its answers read.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from baton.errors import AlreadyExists, Overloaded, QueueError
from baton.types import Claim, Load
from queueing.contract import (
    Claimed,
    LevelDepth,
    Live,
    Outcome,
    Progress,
    ProgressReply,
    Reaped,
    Registration,
    Role,
    Submission,
    Verdict,
    WorkerRecord,
)
from queueing.scripts import Clock, Scripts
from queueing.settings import QueueSettings

LOOK_AHEAD = 128  # waiting requests that one claim looks at
SWEEP_LIMIT = 500  # requests that one sweep or promotion touches: about 25 ms of the server
RECONCILE_BATCH = 200  # requests in one call

_FULL = {
    "requests": ("the queue is full", "queue"),
    "tokens": ("too many prompt tokens are waiting", "queue tokens"),
    "tenant": ("too many requests of this tenant are live", "tenant requests"),
}


def _microseconds(seconds: float | None) -> str | int:
    return "" if seconds is None else round(seconds * 1e6)


def _nonce() -> str:
    """Marks one call, so that the server knows its retries."""
    return secrets.token_hex(8)


class RedisGatewayQueue:
    """GatewayQueue on Redis."""

    def __init__(
        self,
        url: str,
        pool: str,
        gateway_id: str,
        settings: QueueSettings | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        """Does not connect yet. `clock` replaces the server's clock in tests.

        Raises ConfigError for a URL or a pool name that cannot work.
        """
        self._scripts = Scripts(url, pool, clock)
        self._gateway = gateway_id
        self._settings = settings or QueueSettings()
        self._lost = False  # a call found that the server does not know this gateway
        self._news_read = "0"

    async def close(self) -> None:
        """Close the connections. The gateway itself is forgotten when its time is up."""
        await self._scripts.close()

    async def submit(self, submission: Submission) -> int:
        """See GatewayQueue."""
        nonce = _nonce()
        status, *rest = await self._submit(submission, nonce)
        if status == "UNKNOWN":
            # First call, or the server lost its data: the next heartbeat must say so.
            self._lost = not await self._announce()
            status, *rest = await self._submit(submission, nonce)
        match status:
            case "OK":
                return int(rest[0])
            case "EXISTS":
                raise AlreadyExists(f"request id {submission.request_id!r} is in use")
            case "FULL":
                message, subject = _FULL[rest[0]]
                raise Overloaded(message, subject=subject)
            case _:
                raise QueueError(f"the queue answered {status}")

    async def _submit(self, submission: Submission, nonce: str) -> list[str]:
        reply: list[str] = await self._scripts.run(
            "submit",
            self._gateway,
            nonce,
            submission.request_id,
            submission.tenant,
            submission.prompt_tokens,
            submission.cached_tokens,
            submission.priority,
            _microseconds(submission.time_to_live),
            *_order(submission),
        )
        return reply

    async def claim(
        self,
        worker: WorkerRecord,
        limit: int,
        tenants: Sequence[str] = (),
        *,
        only: str | None = None,
    ) -> list[Claimed]:
        """See GatewayQueue."""
        target = (worker.id, worker.epoch, only or "")
        reply = await self._scripts.run(
            "claim", self._gateway, _nonce(), *target, limit, LOOK_AHEAD, *tenants
        )
        return [
            Claimed(id, Claim(int(fence), int(attempt)), int(level), int(generated))
            for id, fence, level, generated, attempt in _rows(reply, 5)
        ]

    async def next_up(self, limit: int, tenants: Sequence[str] = ()) -> list[str]:
        """See GatewayQueue."""
        nobody = ("", 0, "")
        ids: list[str] = await self._scripts.run(
            "claim", self._gateway, _nonce(), *nobody, limit, LOOK_AHEAD, *tenants
        )
        return ids

    async def handoff(self, request_id: str, claim: Claim, to: WorkerRecord) -> Claim | None:
        """See GatewayQueue."""
        reply = await self._scripts.run("handoff", request_id, claim.fence, to.id, to.epoch)
        return Claim(int(reply[0]), int(reply[1])) if reply else None

    async def give_back(
        self, request_id: str, claim: Claim, generated: int, *, fault: bool
    ) -> bool:
        """See GatewayQueue."""
        return bool(
            await self._scripts.run("give_back", request_id, claim.fence, generated, int(fault))
        )

    async def finish(
        self, request_id: str, outcome: Outcome, generated: int, claim: Claim | None = None
    ) -> bool:
        """See GatewayQueue."""
        fence = "" if claim is None else claim.fence
        return bool(
            await self._scripts.run(
                "finish", self._gateway, request_id, _nonce(), outcome.value, generated, fence
            )
        )

    def measured(self, prefill_base: float, prefill_per_token: float) -> None:
        """See GatewayQueue."""
        self._settings = replace(
            self._settings,
            prefill_seconds_base=prefill_base,
            prefill_seconds_per_token=prefill_per_token,
        )

    async def workers(self) -> list[WorkerRecord]:
        """See GatewayQueue."""
        workers, _ = await self._scripts.run("snapshot")
        return [_worker(id, dict(_pairs(fields))) for id, *fields in workers]

    async def depth(self) -> list[LevelDepth]:
        """See GatewayQueue."""
        _, levels = await self._scripts.run("snapshot")
        return [
            LevelDepth(level, requests, tokens, max(0.0, age / 1e6))
            for level, (requests, tokens, age) in enumerate(levels)
        ]

    async def promote(self) -> int:
        """See GatewayQueue."""
        return int(await self._scripts.run("promote", SWEEP_LIMIT))

    async def reap(self) -> Reaped:
        """See GatewayQueue."""
        workers, news, last, timed_out = await self._scripts.run(
            "reap", self._gateway, self._news_read, SWEEP_LIMIT
        )
        self._news_read = last
        return Reaped(
            requeued=tuple(item[1:] for item in news if item[0] == "Q"),
            failed=tuple(item[1:] for item in news if item[0] == Outcome.ERROR.value),
            timed_out=tuple(timed_out),
            workers=tuple(workers),
        )

    async def reconcile(self, live: Sequence[Live]) -> int:
        """See GatewayQueue."""
        created = 0
        for start in range(0, len(live), RECONCILE_BATCH):
            batch = live[start : start + RECONCILE_BATCH]
            arguments = [argument for one in batch for argument in _spell(one)]
            created += await self._scripts.run("reconcile", self._gateway, *arguments)
        return created

    async def heartbeat(self) -> bool:
        """See GatewayQueue."""
        known = await self._announce() and not self._lost
        self._lost = False
        return known

    async def _announce(self) -> bool:
        settings = asdict(self._settings)
        fields = [part for name, value in settings.items() for part in (name, str(value))]
        lifetime = _microseconds(self._settings.gateway_ttl)
        return bool(
            await self._scripts.run("heartbeat", self._gateway, _nonce(), lifetime, *fields)
        )


class RedisWorkerQueue:
    """WorkerQueue on Redis."""

    def __init__(
        self,
        url: str,
        pool: str,
        registration: Registration,
        *,
        worker_ttl: float = 5.0,
        clock: Clock | None = None,
    ) -> None:
        """Does not connect yet. A worker silent for `worker_ttl` seconds is gone.

        Raises ConfigError for a URL or a pool name that cannot work.
        """
        self._scripts = Scripts(url, pool, clock)
        self._registration = registration
        self._lifetime = _microseconds(worker_ttl)
        self._epoch = 0

    async def close(self) -> None:
        """Close the connections."""
        await self._scripts.close()

    async def register(self) -> int:
        """See WorkerQueue."""
        it = self._registration
        fields: dict[str, str | int] = {
            "role": it.role.value,
            "address": it.address,
            "layout_digest": it.layout_digest,
            "model": it.model,
            "capacity_tokens": it.capacity_tokens,
            "capacity_blocks": it.capacity_blocks,
            "max_context": it.max_context,
            "weight_dtype": it.weight_dtype,
            "kv_dtype": it.kv_dtype,
            "batch_sequences": "" if it.batch_sequences is None else it.batch_sequences,
            "prefix_block_size": it.prefix_block_size,
        }
        flat = [part for pair in fields.items() for part in pair]
        self._epoch = int(
            await self._scripts.run("register", it.id, _nonce(), self._lifetime, *flat)
        )
        return self._epoch

    async def report(self, progress: Sequence[Progress], load: Load) -> list[ProgressReply] | None:
        """See WorkerQueue."""
        entries = [
            part
            for one in progress
            for part in (one.request_id, one.fence, one.generated, one.served)
        ]
        reply = await self._scripts.run(
            "report", self._registration.id, self._epoch, json.dumps(asdict(load)), *entries
        )
        if reply is None:
            return None
        return [ProgressReply(Verdict(verdict), int(level)) for verdict, level in _rows(reply, 2)]

    async def drain(self) -> None:
        """See WorkerQueue."""
        await self._scripts.run("drain", self._registration.id, self._epoch)

    async def deregister(self) -> None:
        """See WorkerQueue."""
        await self._scripts.run("deregister", self._registration.id, self._epoch)


def _rows(flat: Sequence[str], width: int) -> Iterator[Sequence[str]]:
    return (flat[i : i + width] for i in range(0, len(flat), width))


def _pairs(flat: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _worker(id: str, fields: dict[str, str]) -> WorkerRecord:
    return WorkerRecord(
        id=id,
        epoch=int(fields["epoch"]),
        role=Role(fields["role"]),
        address=fields["address"],
        layout_digest=fields["layout_digest"],
        model=fields["model"],
        capacity_tokens=int(fields["capacity_tokens"]),
        capacity_blocks=int(fields["capacity_blocks"]),
        max_context=int(fields["max_context"]),
        draining=fields["draining"] == "1",
        load=Load(**json.loads(fields["load"])) if fields["load"] else None,
        weight_dtype=fields["weight_dtype"],
        kv_dtype=fields["kv_dtype"],
        batch_sequences=int(fields["batch_sequences"]) if fields.get("batch_sequences") else None,
        prefix_block_size=int(fields.get("prefix_block_size", 0)),
    )


def _spell(live: Live) -> list[str | int]:
    submission = live.submission
    held = live.worker_id is not None and live.claim is not None
    return [
        submission.request_id,
        submission.tenant,
        submission.prompt_tokens,
        submission.cached_tokens,
        submission.priority,
        _microseconds(submission.time_to_live),
        live.level,
        live.generated,
        live.worker_id if held and live.worker_id else "",
        live.claim.fence if held and live.claim else "",
        live.claim.attempt if live.claim else 1,
        _microseconds(live.age),
        *_order(submission),
    ]


def _order(submission: Submission) -> list[str | int]:
    """What decides the place, besides level and age, and what its lane pays."""
    predicted = submission.predicted_tokens
    return [
        _microseconds(submission.handicap),
        _microseconds(submission.cost),
        "" if predicted is None else predicted,
        _microseconds(submission.token_cost),
        submission.expected_tokens,
        submission.max_tokens,
    ]
