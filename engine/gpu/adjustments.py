"""What requests want changed about their logits, as tables on the device (kernels/adjust.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.gpu.kernels.adjust import Tables
from engine.gpu.transfer import to_device
from scheduling.sequence import Sequence


def tables_of(sequences: list[Sequence], device: torch.device, *, room: int = 0) -> Tables:
    """The tables of these sequences' next tokens, with room for so many tokens that are new to
    them. Copied to the device without waiting."""
    samplings = [sequence.request.sampling for sequence in sequences]
    outputs = [Counter(s.tokens[s.prompt_length :]) for s in sequences]
    seen = [list(dict.fromkeys(s.tokens)) if _penalizes(s) else [] for s in sequences]
    counts = [[found[token] for token in row] for row, found in zip(seen, outputs, strict=True)]
    biases = [dict(sampling.logit_bias) for sampling in samplings]
    stoppings = [sequence.request.stopping for sequence in sequences]

    def words(rows: Items[Iterable[int]], room: int = 0) -> torch.Tensor:
        return to_device(_table(rows, np.int32, -1, room), device)

    return Tables(
        seen=words(seen, room),
        counts=words(counts, room),
        lengths=to_device(np.array([len(row) for row in seen], np.int32), device),
        penalties=to_device(
            np.array(
                [
                    [s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
                    for s in samplings
                ],
                np.float32,
            ).reshape(-1, 3),
            device,
        ),
        bias_tokens=words(biases),
        biases=to_device(_table([b.values() for b in biases], np.float32, 0), device),
        allowed=words([sampling.allowed_token_ids for sampling in samplings]),
        ends=words([s.eos_token_ids | s.stop_token_ids if s.min_tokens else () for s in stoppings]),
        ends_from=to_device(
            np.array(
                [s.prompt_length + s.request.stopping.min_tokens for s in sequences], np.int32
            ),
            device,
        ),
        positions=to_device(np.array([len(s.tokens) for s in sequences], np.int32), device),
    )


def _penalizes(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def _table(
    rows: Items[Iterable[float]], dtype: type[np.generic], fill: int, room: int = 0
) -> NDArray[Any]:
    """The rows as one array, filled up to the longest and `room` beyond."""
    lists = [list(row) for row in rows]
    width = max((len(row) for row in lists), default=0) + room
    table = np.full((len(lists), width), fill, dtype=dtype)
    for row, found in zip(table, lists, strict=True):
        row[: len(found)] = found
    return table
