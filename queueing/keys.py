"""Every Redis key, in one place: the Lua scripts get these names from `lua_names()`.

All keys of a pool start with `baton:{pool}:`; the braces are Redis Cluster's hash tag, so a pool
lives in one slot and a script may touch any of its keys.

| key | type | holds |
|---|---|---|
| config | hash | QueueSettings, as the gateways last wrote them |
| fence | integer | last claim fence or worker epoch given out |
| counts | hash | requests and prompt tokens waiting, per level: `n0`, `t0`, `n1` ... |
| tenants | hash | live requests per tenant |
| classes | zset | priorities that have waiting requests, highest first |
| virtual | hash | per priority: the largest tag that a claim began with |
| deadlines | zset | waiting requests by the time at which they become urgent |
| lanes:PRIORITY | zset | a class's lanes that have waiting requests, by tag and head |
| lane:PRIORITY/TENANT | hash | tag, live requests, place in `lanes`, era and surplus |
| queue:PRIORITY/TENANT | zset | waiting requests of a lane, in the policy's order |
| ages:LEVEL | zset | waiting requests of a level by arrival |
| leases | zset | claimed requests by expiry |
| workers | zset | workers by expiry |
| gateways | zset | gateways by expiry |
| request:ID | hash | one request; expires soon after its end |
| worker:ID | hash | registration, epoch, tokens in flight, last load |
| held:WORKER | set | requests claimed for a worker |
| live:GATEWAY | zset | a gateway's live requests by deadline |
| news:GATEWAY | zset | what sweeps did to a gateway's requests, until it has read it |
| answer:NONCE | string | what a recent call was told, for its retries |
| prefixes:WORKER | zset | keys of blocks in the worker's prefix cache, by when they were told |
| lengths:SHAPE | hash | what the length predictors of one shape learnt: version, data, nonce |

Times are microseconds on the server's clock: coarser ones would tie, and ties sort by id.
"""

from __future__ import annotations

from baton.errors import ConfigError

SINGLE = (
    "config",
    "fence",
    "counts",
    "tenants",
    "classes",
    "virtual",
    "deadlines",
    "leases",
    "workers",
    "gateways",
)
"""Keys of which a pool has one."""

FAMILIES = (
    "lanes",
    "lane",
    "queue",
    "ages",
    "request",
    "worker",
    "held",
    "live",
    "news",
    "answer",
    "prefixes",
    "lengths",
)
"""Keys of which a pool has one per id."""


def prefix(pool: str) -> str:
    """What all keys of `pool` start with. Raises ConfigError for a name that cannot be a tag."""
    if not pool or "{" in pool or "}" in pool:
        raise ConfigError(f"--pool {pool!r}: must not be empty or contain braces")
    return f"baton:{{{pool}}}:"


def key(pool: str, name: str, id: str | None = None) -> str:
    """One key, as the scripts spell it."""
    return f"{prefix(pool)}{name}" if id is None else f"{prefix(pool)}{name}:{id}"


def lua_names() -> str:
    """Lua source: an upper-case local per single key, a function per family.

    Expects the prefix in KEYS[1].
    """
    lines = ["local PREFIX = KEYS[1]"]
    lines += [f"local {name.upper()} = PREFIX .. '{name}'" for name in SINGLE]
    lines += [
        f"local function {name}_key(id) return PREFIX .. '{name}:' .. id end" for name in FAMILIES
    ]
    return "\n".join(lines) + "\n"
