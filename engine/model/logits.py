"""From the model's logits to the distribution that a request asks for.

Knows the order that baton.types.Sampling documents; knows nothing of randomness. Adjustments
(penalties, bias, allowed tokens, min tokens) look at each sequence's own tokens and run row by
row, only for the rows that ask for them; temperature and truncation run on many rows at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from baton.types import Sampling
from scheduling.sequence import Sequence

# Nucleus search looks at this many tokens first, which is nearly always enough and far cheaper than
# sorting a vocabulary, and at this many times more whenever it is not.
_HEAD = 1024
_HEAD_GROWTH = 8
# Temperatures below this differ from greedy in nothing but their risk of overflow.
COLDEST = 1e-6


def finite(logits: Tensor) -> Tensor:
    """The logits [S, vocab] as float32 numbers that can be compared.

    NaN counts as impossible (-inf) and +inf as the largest float, so that one broken row harms
    neither the others nor the process. Returns its argument where nothing has to change.
    """
    logits = logits.float()
    if bool((logits.amax(dim=-1) < math.inf).all()):  # a NaN anywhere makes its maximum NaN
        return logits
    return bounded(logits)


def bounded(logits: Tensor) -> Tensor:
    """The same without a look at them from the host; always a copy."""
    most = torch.finfo(torch.float32).max
    return torch.nan_to_num(logits.float(), nan=-math.inf, posinf=most, neginf=-math.inf)


def best_tokens(logits: Tensor) -> Tensor:
    """The token with the largest of each row's logits [S, vocab], the lowest where some tie: [S].

    NaN and +inf count as in `finite`; -1 where no token is possible.
    """
    best = logits.max(dim=-1)
    if bool(best.values.isfinite().all()):
        return best.indices
    best = finite(logits).max(dim=-1)
    return best.indices.masked_fill(best.values == -math.inf, -1)


def needs_adjustment(sequence: Sequence, ahead: int = 0) -> bool:
    """True if the logits of this sequence's next token must change before any choice. `ahead`:
    tokens before it that the sequence does not know yet."""
    sampling = sequence.request.sampling
    return bool(
        penalizes(sampling)
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or forbidden_ends(sequence, ahead)
    )


def penalizes(sampling: Sampling) -> bool:
    """Whether logits depend on which tokens a sequence has already."""
    return bool(
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty
        or sampling.frequency_penalty
    )


def adjust(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Penalties, bias, allowed tokens and min tokens on finite float32 logits [S, vocab].

    Where min tokens would forbid the last token that is allowed, it yields: `Sequence.append`
    does not end a sequence before its min tokens anyway. Returns its argument, or a changed copy.
    """
    rows = [row for row, sequence in enumerate(sequences) if needs_adjustment(sequence)]
    if not rows:
        return logits
    scores = logits.clone()
    for row in rows:
        _penalize(scores[row], sequences[row])
        _constrain(scores[row], sequences[row])
    return scores


def warp(scores: Tensor, samplings: list[Sampling]) -> Tensor:
    """Temperature, top-k, top-p and min-p, for rows [S, vocab] with temperature above 0.

    Returns unnormalized log probabilities with a maximum of 0; what cannot be sampled is -inf.
    A token is cut by its value, so tokens that tie with the last one kept are kept too.
    """
    temperatures = [max(sampling.temperature, COLDEST) for sampling in samplings]
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / _column(temperatures, scores)

    rows = [row for row, sampling in enumerate(samplings) if sampling.top_k > 0]
    if rows:
        top_k = [min(samplings[row].top_k, scores.shape[-1]) for row in rows]
        scores[rows] = _cut_below(scores[rows], _kth_largest(scores[rows], top_k))

    rows = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1.0]
    if rows:
        top_p = _column([samplings[row].top_p for row in rows], scores).double()
        scores[rows] = _cut_below(scores[rows], _nucleus_edge(scores[rows], top_p, _HEAD))

    rows = [row for row, sampling in enumerate(samplings) if sampling.min_p > 0.0]
    if rows:  # relative to the best token, whose score is 0
        edges = _column([math.log(samplings[row].min_p) for row in rows], scores)
        scores[rows] = _cut_below(scores[rows], edges)
    return scores


def _penalize(row: Tensor, sequence: Sequence) -> None:
    """Repetition penalty (Keskar et al. 2019, section 4.1), OpenAI's penalties, and bias."""
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = _ids(set(sequence.tokens), row)
        score, penalty = row[seen], sampling.repetition_penalty
        row[seen] = torch.where(score < 0, score * penalty, score / penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(sequence.tokens[sequence.prompt_length :])
        _add(
            row,
            {
                token: -sampling.presence_penalty - sampling.frequency_penalty * count
                for token, count in counts.items()
            },
        )
    _add(row, dict(sampling.logit_bias))


def _constrain(row: Tensor, sequence: Sequence) -> None:
    """Allowed tokens, then min tokens."""
    allowed = sequence.request.sampling.allowed_token_ids
    if allowed:
        ids = _ids(allowed, row)
        kept = row[ids]
        row.fill_(-math.inf)
        row[ids] = kept
    ends = _ids(forbidden_ends(sequence), row)
    kept = row[ends]
    row[ends] = -math.inf
    if bool(row.amax() == -math.inf):
        row[ends] = kept


def forbidden_ends(sequence: Sequence, ahead: int = 0) -> frozenset[int]:
    """Tokens that would end the sequence before it has its min tokens; `ahead` as above."""
    stopping = sequence.request.stopping
    if sequence.generated + ahead >= stopping.min_tokens:
        return frozenset()
    return stopping.eos_token_ids | stopping.stop_token_ids


def _ids(tokens: Iterable[int], row: Tensor) -> Tensor:
    """Those of the tokens that the logits cover, as an index."""
    covered = [token for token in tokens if token < row.shape[0]]
    return torch.tensor(covered, dtype=torch.int64, device=row.device)


def _add(row: Tensor, amounts: dict[int, float]) -> None:
    ids = _ids(amounts, row)
    row[ids] += torch.tensor([amounts[token] for token in ids.tolist()]).to(row)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _cut_below(scores: Tensor, edges: Tensor) -> Tensor:
    return scores.masked_fill(scores < edges, -math.inf)


def _kth_largest(scores: Tensor, ranks: list[int]) -> Tensor:
    """The value at each row's own rank: [R, 1]."""
    head = scores.topk(max(ranks), dim=-1).values
    return head.gather(-1, torch.tensor(ranks, device=scores.device)[:, None] - 1)


def _nucleus_edge(scores: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Value of the last token of the smallest set that holds `top_p` of the mass: [R, 1].

    Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), section 3.1.
    """
    width = min(width, scores.shape[-1])
    total = scores.logsumexp(dim=-1, keepdim=True).double()
    head = scores.topk(width, dim=-1).values  # [R, width], descending
    mass = (head.double() - total).exp()
    before = mass.cumsum(dim=-1) - mass
    size = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    edge = head.gather(-1, size - 1)
    if width < scores.shape[-1]:
        wide = ((size == width) & (edge > -math.inf)).squeeze(-1)
        if bool(wide.any()):
            edge[wide] = _nucleus_edge(scores[wide], top_p[wide], width * _HEAD_GROWTH)
    return edge
