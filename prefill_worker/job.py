"""One prefill, from the gateway's call to its first token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.types import Claim, KvRef, Request
from scheduling.events import Prefilled


@dataclass(slots=True, eq=False)
class Job:
    """Owned by the worker. `news` has one reader, the RPC handler: a KvRef, then a Prefilled; or
    an exception, which ends it."""

    request_id: str  # the caller's, for Redis; the scheduler knows `request.id`
    request: Request
    claim: Claim
    news: asyncio.Queue[KvRef | Prefilled | Exception] = field(default_factory=asyncio.Queue)
    lease: bytes = b""  # none before the first pass
    blocks: list[int] = field(default_factory=list)  # under the lease
    freed: asyncio.Event = field(default_factory=asyncio.Event)  # nobody reads them any more
    served: float = 0.0  # seconds of passes it took part in
    level: int = 0  # MLFQ level last seen

    @property
    def prior_tokens(self) -> int:
        """Output tokens of earlier attempts, which are prefilled like the prompt."""
        return len(self.request.prior(0).token_ids)
