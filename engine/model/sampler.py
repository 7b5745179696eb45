"""From logits to tokens, and the log probabilities that requests ask for.

A sampled token depends on its own row of logits and on (seed, sequence index, position), never
on the batch around it: the noise comes from a counter, not from a generator with state. It is
Gumbel noise rather than one point on a cumulative sum, so logits that differ in their last bits,
as those of differently shaped batches do, change a token only where the two best candidates
nearly tie, and cutting unlikely tokens changes a choice only if it cuts the choice itself.
"""

from __future__ import annotations

import logging
import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from baton.types import Logprob
from engine.model.logits import adjust, best_tokens, finite, needs_adjustment, warp
from engine.model.philox import uniforms
from scheduling.plan import Sampled
from scheduling.sequence import Sequence

_logger = logging.getLogger(__name__)

# Tokens per block of the two-stage draw. Part of what a seed means: changing it changes samples.
_BLOCK = 256
# Rows of logits turned into log probabilities at once, which bounds the float32 copy.
_LOGPROB_ROWS = 64


class Choice(Protocol):
    """Who chooses tokens: `choose`, or a backend that gives the same in its own way."""

    def __call__(self, scores: Tensor, sequences: list[Sequence]) -> list[int]:
        """A token for each row of adjusted scores [S, vocab] of any float type; -1 where none is
        possible. NaN and +inf count as in `logits.finite`."""
        ...


@runtime_checkable
class Reporter(Protocol):
    """A Choice that also gives log probabilities in its own way, as `torch_logprobs` does."""

    def logprobs(
        self, logits: Tensor, places: list[int], targets: list[int], alternatives: list[int]
    ) -> list[Logprob]:
        """Logprob of each target under row `places[i]` of the logits [*, vocab], with that many
        alternatives, the likeliest first and the lowest token first where logits tie."""
        ...


@torch.inference_mode()
def choose(scores: Tensor, sequences: list[Sequence]) -> list[int]:
    """The Choice for any device."""
    scores = finite(scores)
    best = scores.max(dim=-1)
    chosen = best.indices
    drawn = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0]
    if drawn:
        rows = scores if len(drawn) == len(sequences) else scores[drawn]
        samplers = [sequences[row] for row in drawn]
        chosen[drawn] = _draw(warp(rows, [s.request.sampling for s in samplers]), samplers)
    tokens: list[int] = chosen.masked_fill(best.values == -math.inf, -1).tolist()
    return tokens


@torch.inference_mode()
def sample(logits: Tensor, sequences: list[Sequence], choice: Choice = choose) -> list[Sampled]:
    """The next token of each sequence, given its logits [S, vocab] of any float type.

    Logits that are NaN count as -inf, and +inf as the largest float. Where no token is left (the
    model is broken, or nothing allowed is possible) the token is one that ends the sequence if it
    may, else the first one allowed, else 0; a warning is logged, and other rows are unharmed.
    """
    if all(is_plain_greedy(sequence) for sequence in sequences):
        return pick(best_tokens(logits), sequences)
    tokens = _possible(_choose(logits, sequences, choice), sequences)
    reports = _reports(logits, tokens, sequences, choice)
    return [Sampled(token, reports.get(row)) for row, token in enumerate(tokens)]


def _choose(logits: Tensor, sequences: list[Sequence], choice: Choice) -> list[int]:
    """A token for each row, of its adjusted logits where a sequence asks for that. Those take the
    place of the others in the tensor for as long as that lasts: only they are copied."""
    rows = [row for row, sequence in enumerate(sequences) if needs_adjustment(sequence)]
    if not rows:
        return choice(logits, sequences)
    scores = logits.float()
    raw = scores[rows]
    scores[rows] = adjust(finite(raw), [sequences[row] for row in rows])
    try:
        return choice(scores, sequences)
    finally:
        scores[rows] = raw


def pick(best: Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """What `sample` gives for sequences that are plainly greedy, from their `best_tokens` [S]."""
    return [Sampled(token) for token in _possible(best.tolist(), sequences)]


@torch.inference_mode()
def prompt_logprobs(
    logits: Tensor, targets: list[int], alternatives: int, choice: Choice = choose
) -> tuple[Logprob, ...]:
    """Log probability of `targets[i]` under row i of the logits [len(targets), vocab]."""
    if not targets:
        return ()
    places, wanted = list(range(len(targets))), [alternatives] * len(targets)
    return tuple(_logprobs(logits, places, targets, wanted, choice))


def is_plain_greedy(sequence: Sequence) -> bool:
    """True if the largest of its logits is all that the sequence's next token depends on, and
    nothing else about them is wanted."""
    request = sequence.request
    return (
        request.sampling.temperature == 0
        and request.logprobs is None
        and not needs_adjustment(sequence)
    )


def _possible(tokens: list[int], sequences: list[Sequence]) -> list[int]:
    """The tokens, with a last resort in the place of each -1."""
    return [
        token if token >= 0 else _resort(sequence)
        for token, sequence in zip(tokens, sequences, strict=True)
    ]


def _draw(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """Sample from unnormalized log probabilities [S, vocab] by the Gumbel-max trick: [S].

    Two stages, exact in distribution: first a block of tokens by its total mass, then a token
    inside it. That takes vocab / 256 + 256 random numbers a row instead of one per token.
    """
    blocks = -(-scores.shape[-1] // _BLOCK)
    padding = blocks * _BLOCK - scores.shape[-1]
    grouped = pad(scores, (0, padding), value=-math.inf).reshape(-1, blocks, _BLOCK)
    points = uniforms(
        [s.request.sampling.seed for s in sequences],
        [s.index for s in sequences],
        [len(s.tokens) for s in sequences],
        _BLOCK + blocks,
        scores.device,
    )
    noise = -(-points.log()).log()  # [S, _BLOCK + blocks], standard Gumbel
    block = (grouped.logsumexp(dim=-1) + noise[:, _BLOCK:]).argmax(dim=-1)
    members = grouped[torch.arange(len(sequences), device=scores.device), block]  # [S, _BLOCK]
    offset = (members + noise[:, :_BLOCK]).argmax(dim=-1)
    return offset.add(block, alpha=_BLOCK)


def _resort(sequence: Sequence) -> int:
    _logger.warning("request %s: no token is possible at this step", sequence.request.id)
    return last_resort(sequence)


def last_resort(sequence: Sequence) -> int:
    """What to emit when no token is possible; see `sample`."""
    stopping = sequence.request.stopping
    allowed = sequence.request.sampling.allowed_token_ids
    ends = sorted(stopping.eos_token_ids) + sorted(stopping.stop_token_ids)
    possible = (token for token in ends if not allowed or token in allowed)
    return next(possible, allowed[0] if allowed else 0)


def _reports(
    logits: Tensor, tokens: list[int], sequences: list[Sequence], choice: Choice
) -> dict[int, Logprob]:
    """Logprobs of the chosen tokens, by row, for the requests that ask for them."""
    wanted = {
        row: sequence.request.logprobs
        for row, sequence in enumerate(sequences)
        if sequence.request.logprobs is not None
    }
    if not wanted:
        return {}
    rows = list(wanted)
    targets = [tokens[row] for row in rows]
    reports = _logprobs(logits, rows, targets, list(wanted.values()), choice)
    return dict(zip(rows, reports, strict=True))


def _logprobs(
    logits: Tensor, places: list[int], targets: list[int], alternatives: list[int], choice: Choice
) -> list[Logprob]:
    own = choice.logprobs if isinstance(choice, Reporter) else torch_logprobs
    return own(logits, places, targets, alternatives)


def torch_logprobs(
    logits: Tensor, places: list[int], targets: list[int], alternatives: list[int]
) -> list[Logprob]:
    """What Reporter says, on any device."""
    reports: list[Logprob] = []
    for start in range(0, len(targets), _LOGPROB_ROWS):
        rows = slice(start, start + _LOGPROB_ROWS)
        reports += _logprob_rows(logits[places[rows]], targets[rows], alternatives[rows])
    return reports


def _logprob_rows(logits: Tensor, targets: list[int], alternatives: list[int]) -> list[Logprob]:
    scores = finite(logits)
    total = scores.logsumexp(dim=-1, keepdim=True)
    chosen = scores.gather(-1, torch.tensor(targets, device=scores.device)[:, None])
    ranks = (scores > chosen).sum(dim=-1) + 1
    values, indices = _likeliest(scores, min(max(alternatives), scores.shape[-1]))

    def logprob(values: Tensor) -> list[list[float]]:
        # A row without any possible token has no distribution: -inf for all of it.
        shares = (values - total).nan_to_num(nan=-math.inf, neginf=-math.inf)
        told: list[list[float]] = shares.tolist()
        return told

    columns = zip(
        targets,
        logprob(chosen),
        ranks.tolist(),
        indices.tolist(),
        logprob(values),
        alternatives,
        strict=True,
    )
    return [
        Logprob(token, own, rank, tuple(zip(ids[:count], shares[:count], strict=True)))
        for token, (own,), rank, ids, shares, count in columns
    ]


def _likeliest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row and their tokens, the lowest token first where some tie:
    [S, count]. `topk` leaves open which of those that tie it takes."""
    if count == 0:
        none = scores[:, :0]
        return none, none.long()
    values, indices = scores.topk(count, dim=-1)
    enough = (scores >= values[:, -1:]).sum(dim=-1) == count
    clear = enough & (values[:, 1:] < values[:, :-1]).all(dim=-1)
    for row in (~clear).nonzero().flatten().tolist():
        among = (scores[row] >= values[row, -1]).nonzero().flatten()
        order = scores[row, among].sort(descending=True, stable=True).indices[:count]
        indices[row] = among[order]
    return values, indices
