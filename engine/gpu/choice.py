"""Choosing tokens on the device: what `sampler.choose` does, without a look at the logits here."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.gpu.kernels.sample import Draws, Space, best_tokens, sample
from engine.gpu.transfer import to_device
from engine.model.logits import COLDEST
from scheduling.sequence import Sequence

_LOW_64 = 0xFFFFFFFFFFFFFFFF
_LOW_32 = 0xFFFFFFFF
_MOST = 2**31 - 1


class DeviceChoice:
    """A Choice (engine/model/sampler.py) in Triton, for logits on `device`.

    The same tokens as torch's, but where rounding decides: a token whose cumulative mass is top_p
    to the last digits, or two candidates that tie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._space: Space | None = None

    def __call__(self, scores: Tensor, sequences: list[Sequence]) -> list[int]:
        """As the protocol says. Waits for the device."""
        lengths = [len(sequence.tokens) for sequence in sequences]
        tokens: list[int] = self.draw(scores, sequences, lengths).tolist()
        return tokens

    def draw(self, scores: Tensor, sequences: list[Sequence], lengths: Items[int]) -> Tensor:
        """The same on the device, and without waiting for it: [S] int64. `lengths[i]` is how many
        tokens sequence i has before the one that is drawn, seen by the host or not."""
        space = self._space_for(scores)
        if all(sequence.request.sampling.temperature == 0 for sequence in sequences):
            return best_tokens(scores, space)
        return sample(scores, draws_of(sequences, lengths, self._device), space)

    def _space_for(self, scores: Tensor) -> Space:
        rows, vocabulary = scores.shape
        space = self._space
        if space is None or space.keys.shape[0] < rows or space.keys.shape[1] != vocabulary:
            space = self._space = Space(rows, vocabulary, self._device)
        return space


def draws_of(sequences: list[Sequence], lengths: Items[int], device: torch.device) -> Draws:
    """How the next token of each sequence is sampled; see `DeviceChoice.draw`."""
    samplings = [sequence.request.sampling for sequence in sequences]
    numbers = np.array(
        [
            [max(s.temperature, COLDEST) if s.temperature else 0.0 for s in samplings],
            [s.top_p for s in samplings],
            [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplings],
        ],
        dtype=np.float32,
    )
    words = np.array(
        [
            [min(s.top_k, _MOST) for s in samplings],
            [sequence.index & _LOW_32 for sequence in sequences],
            [length & _LOW_32 for length in lengths],
        ],
        dtype=np.int64,
    ).astype(np.int32)
    seeds: Any = np.array([s.seed & _LOW_64 for s in samplings], dtype=np.uint64).view(np.int64)
    temperatures, top_ps, min_scores = to_device(numbers, device)
    top_ks, streams, positions = to_device(words, device)
    return Draws(
        temperatures=temperatures,
        top_ks=top_ks,
        top_ps=top_ps,
        min_scores=min_scores,
        seeds=to_device(seeds, device),
        streams=streams,
        positions=positions,
    )
