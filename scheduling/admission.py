"""Which requests a worker can serve at all: the others are refused at the door, so that whatever
got in can finish."""

from __future__ import annotations

from baton.errors import InvalidRequest, Violation
from baton.types import Request
from scheduling.plan import Capacity


def require_fit(request: Request, capacity: Capacity, max_kv_tokens: int) -> None:
    """Raise InvalidRequest, naming every reason, if this can never run here.

    `max_kv_tokens` is the most tokens whose KV one sequence of it will need at once.
    """
    prompt, most = len(request.prompt_ids), request.stopping.max_tokens
    violations = []
    if not prompt:
        violations.append(Violation("prompt", "is empty"))
    if most < 1:
        violations.append(Violation("stopping.max_tokens", "must be at least 1"))
    if request.sampling.n < 1:
        violations.append(Violation("sampling.n", "must be at least 1"))
    if prompt + most > capacity.max_context:
        violations.append(
            Violation(
                "stopping.max_tokens",
                f"{prompt} prompt tokens and {most} new ones exceed the context of "
                f"{capacity.max_context}",
            )
        )
    if capacity.blocks_for(max_kv_tokens) > capacity.blocks:
        violations.append(
            Violation(
                "stopping.max_tokens",
                f"the KV of {max_kv_tokens} tokens exceeds the memory of this worker "
                f"({capacity.blocks} blocks of {capacity.block_size} tokens)",
            )
        )
    if len(request.prior_outputs) not in (0, request.sampling.n):
        violations.append(Violation("prior_outputs", "must be one per sequence"))
    if any(len(p.token_ids) >= most for p in request.prior_outputs if not p.finished):
        violations.append(Violation("prior_outputs", "leave no token to generate"))
    if violations:
        raise InvalidRequest(violations)


def longest_kv(request: Request) -> int:
    """Tokens of KV when the last token is sampled: that token's own KV is never computed."""
    return len(request.prompt_ids) + request.stopping.max_tokens - 1
