"""Log probabilities of the tokens that the device draws, computed there and told with them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from baton.types import Logprob
from engine.gpu.transfer import Arriving, to_device
from engine.model.logits import bounded
from engine.model.sampler import last_resort
from scheduling.sequence import Sequence

_BLOCK = 256
_LOW_32 = 0xFFFFFFFF


class Report:
    """Those of the sequences that ask for them, on their way to the host."""

    def __init__(self, logits: Tensor, tokens: Tensor, sequences: list[Sequence]) -> None:
        """logits [S, vocabulary] as the model gave them, tokens [S] drawn after that, -1 where none
        was possible; some of the sequences want a report."""
        wanted = [(row, s) for row, s in enumerate(sequences) if s.request.logprobs is not None]
        self._counts = {row: s.request.logprobs or 0 for row, s in wanted}
        rows = np.array([[row for row, _ in wanted], [last_resort(s) for _, s in wanted]])
        places, resorts = to_device(rows, logits.device)
        if len(wanted) < len(sequences):
            logits, tokens = logits[places], tokens[places]
        targets = torch.where(tokens < 0, resorts, tokens)
        self._arriving = Arriving(report(logits, targets, max(self._counts.values())))

    def wait(self) -> dict[int, Logprob]:
        """By row, when they are there."""
        found = zip(self._counts.items(), self._arriving.wait().tolist(), strict=True)
        return {row: _told(numbers, count) for (row, count), numbers in found}


def _told(numbers: list[float], count: int) -> Logprob:
    """One row of `report`, with so many alternatives."""
    token, rank, own, *others = numbers
    half = len(others) // 2
    likeliest = zip(map(int, others[:half]), others[half:], strict=True)
    return Logprob(int(token), own, int(rank), tuple(likeliest)[:count])


def report(logits: Tensor, targets: Tensor, alternatives: int) -> Tensor:
    """What engine/model/sampler.py's `torch_logprobs` gives, without a look from the host.

    Of logits [R, vocabulary] of any float type and a target [R] for each: [R, 3 + 2 * k] float64.
    The target, its rank and log probability, then k tokens, then their log probabilities: the
    likeliest first, and the lowest token first where logits tie. k is `alternatives`, or the size
    of the vocabulary.
    """
    scores = bounded(logits)
    total = scores.logsumexp(dim=-1, keepdim=True)
    chosen = scores.gather(-1, targets.clamp(max=scores.shape[-1] - 1)[:, None])
    ranks = (scores > chosen).sum(dim=-1, keepdim=True) + 1
    likeliest = _likeliest(scores, min(alternatives, scores.shape[-1]))
    values = torch.cat((chosen, scores.gather(-1, likeliest)), dim=-1)
    # A row without any possible token has no distribution: -inf for all of it.
    shares = (values - total).nan_to_num(nan=-math.inf, neginf=-math.inf)
    columns = (targets[:, None], ranks, shares[:, :1], likeliest, shares[:, 1:])
    return torch.cat([column.double() for column in columns], dim=-1)


def _likeliest(scores: Tensor, count: int) -> Tensor:
    """The tokens of the `count` largest scores of each row, in order, the lowest first where some
    tie: [R, count] int64.

    They are all in the `count` blocks with the largest maxima, the lowest first where these tie: a
    block that is not among them is behind as many tokens as are wanted.
    """
    rows, vocabulary = scores.shape
    blocks = -(-vocabulary // _BLOCK)
    if vocabulary % _BLOCK:
        scores = pad(scores, (0, blocks * _BLOCK - vocabulary), value=-math.inf)
    grouped = scores.view(rows, blocks, _BLOCK)
    best = _first(grouped.amax(dim=-1), torch.arange(blocks, device=scores.device), count)
    members = grouped.gather(1, best[:, :, None].expand(-1, -1, _BLOCK))  # [R, <= count, _BLOCK]
    tokens = best[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=scores.device)
    return _first(members.flatten(1), tokens.flatten(1), count)


def _first(values: Tensor, numbers: Tensor, count: int) -> Tensor:
    """The numbers, each below 2^32, of the `count` largest values [R, N], or of all: the largest
    first, and the lowest number first where values tie. `topk` leaves open which of those it takes,
    so value and number are made one integer."""
    bits = (values + 0.0).view(torch.int32)  # one zero, not two
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    keys = (order.long() << 32) | (_LOW_32 - numbers)
    return _LOW_32 - (keys.topk(min(count, keys.shape[-1]), dim=-1).values & _LOW_32)
