"""What one tensor shard has of a model, and how the shards add up to it.

Shoeybi et al., "Megatron-LM" (2019), section 3: projections out of the residual stream are divided
by columns (whole heads, for attention), those back into it by rows, so that each of the two needs
one sum over the shards. Embedding and head are divided by rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from baton.errors import ModelError
from engine.attention.contract import Batch
from engine.model.logits import finite
from engine.model.model import Output
from engine.model.weights import Checkpoint
from engine.parallel.group import Group
from engine.parallel.topology import Topology
from engine.quantization.groupwise import Fp8Quantized, GroupQuantized
from engine.quantization.window import Window, span

_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_REPEATED = ("k_proj", "v_proj")  # where there are more shards than key heads
_ROWS = ("o_proj", "down_proj")
_VOCABULARY = ("embed_tokens", "lm_head")
_VOCABULARY_MULTIPLE = 16


class Shard:
    """A Part (engine/model/part.py)."""

    def __init__(self, topology: Topology, group: Group | None) -> None:
        """`group`: the shards of this stage, None if it is the only one."""
        self.topology = topology
        self._group = group

    @property
    def first(self) -> bool:
        """See Part."""
        return self.topology.first

    @property
    def last(self) -> bool:
        """See Part."""
        return self.topology.last

    def layers(self, total: int) -> range:
        """See Part."""
        return self.topology.layers(total)

    def share(self, count: int) -> int:
        """See Part."""
        return count // self.topology.tensor

    def kv_heads(self, count: int) -> int:
        """See Part."""
        return len(self.topology.kv_heads(count))

    def vocabulary(self, size: int) -> int:
        """See Part. The same on all shards."""
        tensor = self.topology.tensor
        if tensor == 1:
            return size
        return -(-size // (tensor * _VOCABULARY_MULTIPLE)) * _VOCABULARY_MULTIPLE

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """See Part: each shard gives its own rows, and zeros for the others'."""
        if self._group is None:
            return F.embedding(token_ids, weight)
        rows = len(weight)
        local = token_ids - self.topology.shard * rows
        others = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(others, 0), weight)
        return self.reduce(found.masked_fill_(others[:, None], 0.0))

    def reduce(self, x: Tensor) -> Tensor:
        """See Part."""
        return x if self._group is None else self._group.sum(x.contiguous())

    def output(self, logits: Tensor, batch: Batch, vocab_size: int) -> Output | None:
        """What the pass gives, from each shard's columns of the logits [R, vocabulary]; None on all
        shards but the first."""
        if self._group is None:
            return Output.of(logits, batch)
        rows, width = logits.shape
        begin = self.topology.shard * width
        real = max(0, min(width, vocab_size - begin))
        whole = batch.whole_rows
        parts = self._group.gather(logits[:whole].contiguous()) if whole else []
        pairs = self._group.gather(_best(logits[whole:, :real], begin)) if rows > whole else []
        if self.topology.shard:
            return None
        all_logits = torch.cat(parts, -1)[:, :vocab_size] if parts else logits[:0, :0]
        best = _best_of(torch.stack(pairs)) if pairs else batch.logit_rows[:0]
        return Output(all_logits, best)


def _best(logits: Tensor, begin: int) -> Tensor:
    """Value and token of each row's largest logit, as float64 [R, 2]; -inf where none is possible
    in these columns, the first of which is token `begin`."""
    if not logits.shape[1]:
        return logits.new_tensor([[-torch.inf, -1.0]], dtype=torch.float64).repeat(len(logits), 1)
    best = finite(logits).max(dim=-1)
    return torch.stack((best.values.double(), (best.indices + begin).double()), dim=-1)


def _best_of(pairs: Tensor) -> Tensor:
    """As `logits.best_tokens`, from `_best` of each shard, in order: [shards, R, 2] -> [R]."""
    values, tokens = pairs.unbind(-1)
    best = values.amax(dim=0)
    lowest = tokens.masked_fill(values < best, torch.inf).amin(dim=0)
    return lowest.masked_fill(best == -torch.inf, -1.0).long()


class ShardedCheckpoint(Checkpoint):
    """A Checkpoint that gives one shard of each tensor: asked for the narrow shape, it reads that
    much of the mapped file. Of weights that are stored quantized, too."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype | None,
        device: torch.device | str,
        topology: Topology,
    ) -> None:
        """As Checkpoint."""
        super().__init__(path, dtype, device)
        self._topology = topology

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The shard of tensor `name`, in memory of its own. Vocabularies are padded with zeros.
        Raises ModelError as Checkpoint does, and if `shape` is no shard of what is stored."""
        module, kind = _module(name)
        if self._topology.tensor > 1 and module in _VOCABULARY:
            return self._vocabulary(name, *shape)
        if self._topology.shard and module in _ROWS and kind == "bias":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)  # the first adds it
        cut = self._cut(name, shape)
        return super().__call__(name, *shape) if cut is None else self._read_cut(name, cut)

    def quantized(
        self, name: str, out: int, into: int, window: Window | None = None
    ) -> GroupQuantized | Fp8Quantized | None:
        """The shard [out, in] of weight `name`, as Checkpoint gives weights. No windows of it."""
        assert window is None
        cut = self._cut(name, (out, into)) if self.is_quantized(name) else None
        if cut is None:
            return super().quantized(name, out, into)
        out, into = cut.stored
        return super().quantized(name, out, into, cut.window)

    def with_all_inputs(self, name: str, out: int, into: int) -> tuple[Tensor, range]:
        """See Checkpoint."""
        cut = self._cut(name, (out, into))
        if cut is None or cut.axis == 0:
            return super().with_all_inputs(name, out, into)
        return super().__call__(name, *cut.stored), cut.part

    def _cut(self, name: str, shape: tuple[int, ...]) -> _Cut | None:
        """What of a tensor its shard is, given its shape; None for all of it."""
        module, kind = _module(name)
        if self._topology.tensor == 1:
            return None
        if module in _COLUMNS:
            axis = 0
        elif module in _ROWS and kind == "weight":
            axis = 1
        else:
            return None
        stored = self.stored_shape(name)
        shards, length = self._topology.tensor, shape[axis]
        pieces, over = divmod(stored[axis], length)
        repeated = module in _REPEATED and pieces and shards % pieces == 0
        same = stored[:axis] + stored[axis + 1 :] == shape[:axis] + shape[axis + 1 :]
        if over or not (pieces == shards or repeated) or not same:
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {stored}, "
                f"of which {shape} is no shard of {shards}"
            )
        begin = self._topology.shard * pieces // shards * length
        return _Cut(stored, axis, range(begin, begin + length))

    def _vocabulary(self, name: str, rows: int, hidden: int) -> Tensor:
        size = self.stored_shape(name)[0]
        begin = min(self._topology.shard * rows, size)
        part = range(begin, min(begin + rows, size))
        if not part:
            return torch.zeros((rows, hidden), dtype=self.dtype, device=self.device)
        found = self._read_cut(name, _Cut((size, hidden), 0, part))
        return F.pad(found, (0, 0, 0, rows - len(found)))

    def _read_cut(self, name: str, cut: _Cut) -> Tensor:
        """A contiguous copy of a part of a mapped tensor, whose pages are not needed any more."""
        if len(cut.stored) == 1:
            found = self.mapped(name, *cut.stored)[span(cut.part)]
        else:
            found = self.mapped(name, *cut.stored, window=cut.window)
        own = torch.empty(found.shape, dtype=self.dtype, device=self.device).copy_(found)
        self.forget(name)
        return own


@dataclass(frozen=True, slots=True)
class _Cut:
    """A part of a tensor of shape `stored`, along one axis."""

    stored: tuple[int, ...]
    axis: int
    part: range

    @property
    def window(self) -> Window:
        """The same of a matrix."""
        outputs, inputs = (range(size) for size in self.stored)
        return Window(outputs, self.part) if self.axis else Window(self.part, inputs)


def _module(name: str) -> tuple[str, str]:
    """The likes of "q_proj" and "weight", of a tensor's whole name."""
    parent, _, kind = name.rpartition(".")
    return parent.rpartition(".")[2], kind
