"""Where transformers' models meet paged attention: a function in its attention interface.

The function knows which pass it belongs to from a context variable, not from keyword arguments,
because some models do not hand those down to their attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# The name is not registered for masks: transformers then makes none and leaves masking to us.
IMPLEMENTATION = "baton"

# Arguments that some models hand down and that do not change what attention computes.
_HARMLESS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)


class UnsupportedAttention(Exception):
    """A model asks its attention for something that paged attention does not do."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention over the T tokens of a pass, keys rotated already."""

    layer: int
    q: Tensor  # [T, heads, head_dim]
    k: Tensor  # [T, kv_heads, head_dim]
    v: Tensor  # [T, kv_heads, value_dim]
    scale: float
    window: int | None
    softcap: float | None


Attend = Callable[[AttentionCall], Tensor]  # returns [T, heads, value_dim]

_attend: ContextVar[Attend] = ContextVar("attend")


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Send the attention of transformers' models in this context to `attend`."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' signature: query [1, heads, T, head_dim] -> [1, T, heads, value_dim].

    Raises UnsupportedAttention for what it would otherwise have to ignore.
    """
    unknown = sorted(k for k, v in others.items() if v is not None and k not in _HARMLESS)
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if is_causal is False or not getattr(module, "is_causal", True):
        unknown.append("attention that is not causal")
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise UnsupportedAttention(f"its attention uses {', '.join(unknown)}")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedAttention("its attention does not say which layer it is")
    call = AttentionCall(
        layer=layer,
        q=query[0].transpose(0, 1),
        k=key[0].transpose(0, 1),
        v=value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
    )
    return _attend.get()(call)[None], None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_forward)
