"""What requests want changed about their logits, in tables that stay on the device.

A sequence has a row of a table when it first needs one, and keeps it from pass to pass: a row of
counts grows by each token as it comes, which may be one that the host has not seen yet. Rows go
from sequences that have ended, or else that were here longest ago, to those that come; who comes
back has its row made anew. So no more rows are kept than passes in flight can have sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.types import Sampling
from engine.gpu.kernels.adjust import WANTS, adjust, forbid
from engine.gpu.transfer import to_device
from engine.model.logits import forbidden_ends, needs_adjustment, penalizes
from scheduling.sequence import Sequence


class Adjustments:
    """What engine/model/logits.py's `adjust` does, without a look at the logits from the host."""

    def __init__(self, vocabulary: int, most: int, device: torch.device) -> None:
        """`most`: sequences in one call, or in as many calls as are of different ones in turn."""
        self._vocabulary, self._most, self._device = vocabulary, most, device
        self._counts = _Rows(vocabulary, torch.int32, most, device)
        self._biases = _Rows(vocabulary, torch.float32, most, device)

    def __call__(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        lengths: Items[int],
        newest: Tensor | None = None,
    ) -> Tensor:
        """The logits [S, vocabulary] that tokens are to be chosen from: the argument, if nobody
        wants them changed, or a copy in float32.

        `lengths[i]` is how many tokens sequence i has before the one that is chosen. Where the host
        does not know the last of them, `newest` [S] int64 does, on the device.
        """
        ahead = [n - len(s.tokens) for s, n in zip(sequences, lengths, strict=True)]
        rows = [row for row, s in enumerate(sequences) if needs_adjustment(s, ahead[row])]
        if not rows:
            return logits
        assert len(rows) <= self._most
        wants = np.zeros(len(sequences), dtype=WANTS)
        wants["counts"] = wants["biases"] = wants["newest"] = -1
        for row in rows:
            sampling = sequences[row].request.sampling
            if penalizes(sampling):
                counts, fresh = self._counted(sequences[row], lengths[row])
                penalties = (
                    sampling.repetition_penalty,
                    sampling.presence_penalty,
                    sampling.frequency_penalty,
                )
                wants[row] = (counts, -1, fresh, *penalties)
            if sampling.logit_bias or sampling.allowed_token_ids:
                wants["biases"][row] = self._biased(sequences[row])
        words = to_device(wants.view(np.int32).reshape(len(wants), -1), self._device)
        scores = adjust(logits, words, self._counts.table, self._biases.table, newest)
        self._forbid(scores, {row: forbidden_ends(sequences[row], ahead[row]) for row in rows})
        return scores

    def forget(self, sequence: Sequence) -> None:
        """Its newest token, as the device knows it, is not what it goes on with."""
        self._counts.drop(sequence)

    def _counted(self, sequence: Sequence, length: int) -> tuple[int, int]:
        """Its row of counts, and the token that is to be added to make it that of its first
        `length` tokens: any, if only the device knows it, -1 for none."""
        row, tokens = self._counts.of(sequence), sequence.tokens
        before, row.length = row.length, length
        if before != length and before != length - 1:
            before = min(length, len(tokens))
            self._count(self._counts.table[row.index], sequence, before)
        if before == length:
            return row.index, -1
        return row.index, tokens[length - 1] if length <= len(tokens) else 0

    def _count(self, counts: Tensor, sequence: Sequence, length: int) -> None:
        """Count its first `length` tokens."""
        prompt = self._ids(sequence.tokens[: min(length, sequence.prompt_length)])
        output = self._ids(sequence.tokens[sequence.prompt_length : length])
        counts.zero_()
        counts.index_fill_(0, prompt, 1)
        counts.index_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))

    def _biased(self, sequence: Sequence) -> int:
        """Its row of biases."""
        row = self._biases.of(sequence)
        if row.length is None:
            row.length = 0
            self._bias(self._biases.table[row.index], sequence.request.sampling)
        return row.index

    def _bias(self, biases: Tensor, sampling: Sampling) -> None:
        """Write down what it wants added to its logits."""
        biases.fill_(float("-inf") if sampling.allowed_token_ids else 0.0)
        if sampling.allowed_token_ids:
            biases.index_fill_(0, self._ids(sampling.allowed_token_ids), 0.0)
        added = {t: bias for t, bias in sampling.logit_bias if t < self._vocabulary}
        amounts = to_device(np.array(list(added.values()), np.float32), self._device)
        biases.index_add_(0, self._ids(list(added)), amounts)

    def _forbid(self, scores: Tensor, ends: dict[int, frozenset[int]]) -> None:
        """Let these rows not have these tokens."""
        early = {row: tokens for row, tokens in ends.items() if tokens}
        if early:
            table = np.full((len(early), max(map(len, early.values()))), -1, np.int32)
            for line, tokens in zip(table, early.values(), strict=True):
                line[: len(tokens)] = list(tokens)
            rows = to_device(np.array(list(early), np.int32), self._device)
            forbid(scores, rows, to_device(table, self._device))

    def _ids(self, tokens: Items[int]) -> Tensor:
        """Those of the tokens that the logits cover, as an index on the device."""
        ids: NDArray[Any] = np.array(tokens, dtype=np.int64)
        return to_device(ids[ids < self._vocabulary], self._device)


@dataclass(slots=True)
class _Row:
    """A sequence's row of a table."""

    index: int
    length: int | None = None  # tokens of the sequence that it knows; None: it is another's yet


class _Rows:
    """A table on the device, [rows, vocabulary], with a row for each of the sequences that needed
    one last. It grows as they come, to `most` rows."""

    def __init__(
        self, vocabulary: int, dtype: torch.dtype, most: int, device: torch.device
    ) -> None:
        self.table = torch.empty((0, vocabulary), dtype=dtype, device=device)
        self._most = most
        self._rows: dict[Sequence, _Row] = {}  # longest unused first
        self._free: list[int] = []

    def of(self, sequence: Sequence) -> _Row:
        """The row of this sequence; it may have been somebody's whom nobody has asked for since."""
        row = self._rows.pop(sequence, None)
        if row is None:
            row = _Row(self._take())
        self._rows[sequence] = row
        return row

    def drop(self, sequence: Sequence) -> None:
        """Forget what is known of it."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._free.append(row.index)

    def _take(self) -> int:
        if not self._free:
            for sequence in [each for each in self._rows if each.finish is not None]:
                self.drop(sequence)
        if not self._free:
            rows, vocabulary = self.table.shape
            if rows < self._most:
                new = min(self._most, max(4, 2 * rows)) - rows
                self._free = list(range(rows, rows + new))
                self.table = torch.cat((self.table, self.table.new_zeros(new, vocabulary)))
            else:
                self.drop(next(iter(self._rows)))
        return self._free.pop()
