"""Texts as training batches: whole documents packed into rows, answers counted and questions not.

Short texts go to short rows in which each text sees only itself; these are most of the work, and on
a CPU they are nearly twice as fast as long ones. The others share long rows under plain causal
attention, so the model also learns to work far from a sequence's start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_model.dialogue import ASSISTANT, END

BATCH_TOKENS = 4096
SHORT_ROW = 128
LONG_ROWS = (512, 1024)
IGNORED = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, labels: [rows, length]; labels are IGNORED where no loss is counted.

    `mask` is what `Llama.forward` takes.
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor | None


@dataclass(slots=True)
class Row:
    """A row being filled; `owner` numbers the text each position belongs to."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)

    def add(self, tokens: list[int], counted: list[bool]) -> None:
        number = self.owner[-1] + 1 if self.owner else 0
        self.ids += tokens[:-1]
        self.labels += [
            token if count else IGNORED
            for token, count in zip(tokens[1:], counted[1:], strict=True)
        ]
        self.owner += [number] * (len(tokens) - 1)


class Packer:
    """Fills rows of one length, first fit over a few open rows."""

    OPEN = 24

    def __init__(self, length: int) -> None:
        self.length = length
        self._open: list[Row] = []
        self._full: list[Row] = []

    def add(self, tokens: list[int], counted: list[bool]) -> None:
        tokens, counted = tokens[: self.length + 1], counted[: self.length + 1]
        room = self.length - len(tokens) + 1
        row = next((row for row in self._open if len(row.ids) <= room), None)
        if row is None:
            row = Row()
            self._open.append(row)
        row.add(tokens, counted)
        if len(self._open) > self.OPEN:
            self._open.sort(key=lambda r: len(r.ids))
            self._full.append(self._open.pop())

    def take(self, *, rest: bool) -> Iterator[list[Row]]:
        """The complete batches so far; with `rest`, all rows, the last batch perhaps short."""
        if rest:
            self._full += self._open
            self._open = []
        rows = BATCH_TOKENS // self.length
        while len(self._full) >= rows or (rest and self._full):
            yield self._full[:rows]
            del self._full[:rows]


def batches(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Batch]:
    """Every text once. Texts longer than the longest row lose their end."""
    short, long = Packer(SHORT_ROW), [Packer(length) for length in LONG_ROWS]
    vocabulary = tokenizer.get_vocab()
    assistant, end = vocabulary[ASSISTANT], vocabulary[END]
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    for index, encoding in enumerate(encoded):
        tokens = encoding.ids
        packer = short if len(tokens) <= SHORT_ROW + 1 else long[index % len(long)]
        packer = packer if len(tokens) <= packer.length + 1 else long[-1]
        packer.add(tokens, counted_tokens(tokens, assistant, end))
        for rows in packer.take(rest=False):
            yield collate(rows, packer.length, separate=packer is short)
    for packer in (short, *long):
        for rows in packer.take(rest=True):
            yield collate(rows, packer.length, separate=packer is short)


def counted_tokens(tokens: list[int], assistant: int, end: int) -> list[bool]:
    """Which tokens the loss counts: the answers and their ends, or all of a text without roles."""
    if assistant not in tokens:
        return [True] * len(tokens)
    counted, answering = [], False
    for token in tokens:
        counted.append(answering)
        answering = token == assistant or (answering and token != end)
    return counted


def collate(rows: list[Row], length: int, *, separate: bool) -> Batch:
    """Pad the rows at their ends, and the batch to its size.

    With `separate`, the texts of a row do not see each other.
    """
    shape = BATCH_TOKENS // length, length
    ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    owner = torch.full(shape, -1)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
        owner[index, : len(row.owner)] = torch.tensor(row.owner)
    if not separate:
        return Batch(ids, labels, None)
    visible = (owner[:, :, None] == owner[:, None, :]).tril()
    mask = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill_(~visible, -1e9)
    return Batch(ids, labels, mask)
