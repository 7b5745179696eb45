"""Output lengths, predicted from the prompt and learnt from every request that ends (S3).

A classifier over buckets of lengths, trained online. Three parts answer together:

- how often each bucket came up lately, which is all that can be said of a prompt never seen;
- an ordinal regression on the prompt's hashed n-grams, which tilts those frequencies: softmax of
  their logarithms plus a few smooth curves over the buckets, with AdaGrad. Its tilt is applied at
  several strengths, none among them, weighted by how well each has predicted lately (a Bayesian
  mixture): where prompts tell nothing, the frequencies are all that is left;
- a table of prompts seen before, whose last output was so long. It is believed as often as it
  was right lately.

Knows no clock and does no I/O. Nothing here is random: the same requests in the same order give
the same predictions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from baton.types import LengthEstimate
from scheduling.length_buckets import Buckets
from scheduling.length_features import SIZE_ROWS, FeatureHasher, Features
from scheduling.length_report import TALLIES, Judged, LengthReport, report
from scheduling.length_state import LengthState, Shape, from_bytes, merged, to_bytes

_TILTS = np.array((0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5))
_SMOOTHING = 0.05  # of the frequencies: requests that each bucket has for a start
_FADE_EVERY = 256  # requests after which the steps of the regression grow a little again
_FADE = np.float32(0.98)
_MOST = 1e9  # no probability, however it is scaled
_LEAST = 1e-9  # a probability whose logarithm is still worth telling apart

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PredictorSettings:
    """`quantile`: the allotment ends the bucket that the output stays within with this
    probability. `warm_up`: sequences learnt from before anything is predicted. `half_life`: in
    sequences, of all averages. `rows`, `rank` and `recalled` set the size of the state: n-gram
    rows, curves per row, prompts known again. `salt` enters every hash."""

    buckets: Buckets
    quantile: float = 0.9
    warm_up: int = 32
    half_life: float = 1000.0
    learning_rate: float = 0.1
    rows: int = 32768
    rank: int = 4
    recalled: int = 8192
    salt: str = ""

    def shape(self) -> Shape:
        """Of the state."""
        said = f"{self.buckets.edges} {self.rows} {self.rank} {self.recalled} {self.half_life}"
        digest = hashlib.blake2b(f"{said} {self.salt}".encode(), digest_size=8, person=b"shape")
        return Shape(
            rows=self.rows + SIZE_ROWS,
            rank=min(self.rank, len(self.buckets)),
            recalled=self.recalled,
            tallies=2 * len(self.buckets) + len(_TILTS) + 4 + TALLIES,
            keep=float(0.5 ** (1 / self.half_life)),
            identity=digest.hexdigest(),
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was said of a request before it ran, and what is needed to learn from it.

    `guess` is made in any case; it is worth telling (`estimate`) once it is `ripe`, after
    warm-up. `probabilities` are those of the buckets, cut at `max_tokens`.
    """

    guess: LengthEstimate
    ripe: bool
    probabilities: Floats = field(repr=False)
    features: Features = field(repr=False)
    max_tokens: int
    mean: float  # what is expected of a request that nothing is known of
    majority: int  # the most frequent bucket
    rivals: tuple[Floats, Floats] | None = field(default=None, repr=False)  # see `adopted`

    @property
    def estimate(self) -> LengthEstimate | None:
        """What schedulers are told; None during warm-up."""
        return self.guess if self.ripe else None


class LengthPredictor:
    """Predicts, learns, reports. `state` may be replaced by another of the same shape."""

    def __init__(self, settings: PredictorSettings) -> None:
        self.settings = settings
        self.shape = settings.shape()
        self.state = LengthState.empty(self.shape)
        self._hasher = FeatureHasher(settings.rows, settings.salt)
        buckets = settings.buckets
        count = len(buckets)
        self._edges = np.array(buckets.edges, float)
        self._middles = np.array([buckets.middle(i) for i in range(count)])
        curves = [
            math.sqrt(2) * np.cos(np.pi * (np.arange(count) + 0.5) * k / count)
            for k in range(1, self.shape.rank + 1)
        ]
        self._curves = np.array(curves, np.float32)  # [rank, buckets]
        self._of_losses = 2 * count
        self._of_recall = self._of_losses + len(_TILTS)
        self._of_rivals = self._of_recall + 2
        self._of_report = self._of_rivals + 2

    # -- Predicting ------------------------------------------------------------------------

    def predict(self, prompt_ids: Sequence[int], max_tokens: int) -> Prediction:
        """How long an output of this prompt will be, at most `max_tokens`."""
        features = self._hasher.features(prompt_ids, max_tokens)
        blend = self._weights() @ self._tilted(self._frequencies(), features)
        recalled = self._recalled(features)
        if recalled is None:
            return self._said(features, max_tokens, blend, self._expected(blend, max_tokens))
        trust = self._trust()
        recalled = min(recalled, max_tokens)
        blend *= 1 - trust
        expected = trust * recalled + self._expected(blend, max_tokens)
        blend[self.settings.buckets.of(recalled)] += trust
        return self._said(features, max_tokens, blend, expected)

    def adopted(self, prediction: Prediction, probabilities: Sequence[float]) -> Prediction:
        """`prediction`, mixed with the probabilities that another classifier gives the same
        buckets, each weighted by how well it predicted lately. During warm-up the other's alone.

        Raises ValueError if they are not probabilities of these buckets.
        """
        blend = np.array(probabilities, float)
        if (
            blend.shape != self._edges.shape
            or not (blend >= 0).all()
            or not 0 < blend.max() < _MOST
        ):
            raise ValueError("not the probabilities of these buckets")
        blend /= blend.sum()
        most = prediction.max_tokens
        rivals = (prediction.probabilities, self._cut(blend, most))
        ours, theirs = 0.0, 1.0
        if prediction.ripe:
            ours, theirs = _softmax(-self.state.tallies[self._of_rivals : self._of_report])
        mixed = np.zeros(len(self._edges))
        mixed[: len(rivals[0])] = ours * rivals[0] + theirs * rivals[1]
        expected = ours * prediction.guess.tokens + theirs * self._expected(blend, most)
        said = self._said(prediction.features, most, mixed, float(expected))
        return replace(said, ripe=True, rivals=rivals)

    def _expected(self, probabilities: Floats, max_tokens: int) -> float:
        return float(probabilities @ np.minimum(self._mean_lengths(), max_tokens))

    def _said(
        self, features: Features, max_tokens: int, blend: Floats, expected: float
    ) -> Prediction:
        probabilities = self._cut(blend, max_tokens)
        enough = int(np.searchsorted(probabilities.cumsum(), self.settings.quantile - 1e-12))
        within = enough < len(probabilities) - 1
        allotment = self.settings.buckets.edges[enough] if within else max_tokens
        frequencies = self._frequencies()
        return Prediction(
            guess=LengthEstimate(max(1, round(expected)), min(allotment, max_tokens)),
            ripe=self.state.seen >= self.settings.warm_up,
            probabilities=probabilities,
            features=features,
            max_tokens=max_tokens,
            mean=self._expected(frequencies, max_tokens),
            majority=int(self._cut(frequencies, max_tokens).argmax()),
        )

    def _frequencies(self) -> Floats:
        counts = self.state.tallies[: len(self._edges)] + _SMOOTHING
        frequencies: Floats = counts / counts.sum()
        return frequencies

    def _mean_lengths(self) -> Floats:
        """Mean length of the outputs in each bucket; its middle where there were none."""
        count = len(self._edges)
        counts, sums = self.state.tallies[:count], self.state.tallies[count : 2 * count]
        lengths: Floats = (sums + _SMOOTHING * self._middles) / (counts + _SMOOTHING)
        return lengths

    def _tilted(self, frequencies: Floats, features: Features) -> Floats:
        """Probabilities of the buckets at each strength of the tilt, [tilts, buckets]."""
        tilt = (features.values @ self.state.weights[features.rows]) @ self._curves
        return _softmax(np.log(frequencies) + np.outer(_TILTS, tilt))

    def _weights(self) -> Floats:
        losses = self.state.tallies[self._of_losses : self._of_recall]
        return _softmax(-losses)

    def _trust(self) -> float:
        """Share of prompts known again whose output was in the bucket of the last one."""
        right, wrong = self.state.tallies[self._of_recall : self._of_rivals]
        return float((right + 0.5) / (right + wrong + 1.0))

    def _recalled(self, features: Features) -> int | None:
        """The last output of this very prompt."""
        place, tag = self._place(features)
        return int(self.state.lengths[place]) if self.state.tags[place] == tag else None

    def _place(self, features: Features) -> tuple[int, int]:
        high, low = divmod(features.identity, 2**32)
        return low % self.settings.recalled, 1 + high % 65535

    def _cut(self, probabilities: Floats, max_tokens: int) -> Floats:
        """No output is longer than `max_tokens`: what lies beyond ends there."""
        last = self.settings.buckets.of(max_tokens)
        cut = probabilities[: last + 1].copy()
        cut[last] += probabilities[last + 1 :].sum()
        return cut

    # -- Learning --------------------------------------------------------------------------

    def learn(self, prediction: Prediction, tokens: int) -> None:
        """An output of the request ended by itself after `tokens`."""
        self._judge(prediction, tokens)
        bucket = self.settings.buckets.of(tokens)
        truth = np.zeros(len(self._edges))
        truth[bucket] = 1.0
        self._compare(prediction, truth)
        self._recall(prediction.features, tokens, bucket)
        self._update(prediction.features, truth, tokens)

    def learn_cut(self, prediction: Prediction, tokens: int) -> None:
        """An output was cut off after `tokens`: by `max_tokens`, the client, a time limit.

        It would have gone on, nobody knows for how long: all that is learnt is that its length is
        in the bucket of `tokens` or beyond (a censored observation). Leaving such outputs out
        would teach that outputs are short, because long ones are cut more often. Only one that
        `max_tokens` cut is judged in the report: there the true length was served.
        """
        if tokens >= prediction.max_tokens:
            self._judge(prediction, prediction.max_tokens)
        elif tokens < 1:
            return
        least = self.settings.buckets.of(tokens)
        possible = np.zeros(len(self._edges))
        possible[least:] = 1.0
        self._compare(prediction, possible)
        self._update(prediction.features, possible, None)

    def judged(self, prediction: Prediction, tokens: int) -> Judged:
        """The prediction beside the true length, `max_tokens` at most."""
        named = int(prediction.probabilities.argmax())
        return Judged(
            bucket=min(self.settings.buckets.of(tokens), len(prediction.probabilities) - 1),
            named=named,
            majority=prediction.majority,
            confidence=float(prediction.probabilities[named]),
            tokens=tokens,
            expected=prediction.guess.tokens,
            mean=prediction.mean,
            allotment=prediction.guess.allotment,
        )

    def _judge(self, prediction: Prediction, tokens: int) -> None:
        """Note how good a prediction was, if it was told."""
        if prediction.ripe:
            self.state.tallies[self._of_report :] += self.judged(prediction, tokens).tally()

    def _compare(self, prediction: Prediction, possible: Floats) -> None:
        """Note how well each of two rivals has predicted."""
        if prediction.rivals is None:
            return
        possible = (self._cut(possible, prediction.max_tokens) > 0).astype(float)
        for number, probabilities in enumerate(prediction.rivals):
            loss = -math.log(max(float(probabilities @ possible), _LEAST))
            self.state.tallies[self._of_rivals + number] += loss

    def _recall(self, features: Features, tokens: int, bucket: int) -> None:
        place, tag = self._place(features)
        state = self.state
        if state.tags[place] == tag:
            wrong = self.settings.buckets.of(int(state.lengths[place])) != bucket
            state.tallies[self._of_recall + wrong] += 1.0
        state.tags[place], state.lengths[place] = tag, min(tokens, 2**32 - 1)

    def _update(self, features: Features, possible: Floats, tokens: int | None) -> None:
        """One step toward the buckets that are `possible` (1 or 0). The gradient is as large as
        the prediction was wrong: mispredicted requests weigh more by themselves."""
        state, count = self.state, len(self._edges)
        frequencies = self._frequencies()
        tilted = self._tilted(frequencies, features)
        losses = -np.log(np.maximum(tilted @ possible, _LEAST))
        plain = tilted[_TILTS == 1.0][0]
        target = plain * possible / max(float(plain @ possible), _LEAST)
        gradient = self._curves @ (plain - target).astype(np.float32)
        rows, values = features.rows, features.values
        state.squares[rows] += values * values * float(gradient @ gradient / len(gradient))
        steps = self.settings.learning_rate * values / np.sqrt(state.squares[rows] + 1e-3)
        state.weights[rows] -= np.outer(steps, gradient)

        share = frequencies * possible / max(float(frequencies @ possible), _LEAST)
        lengths = self._mean_lengths() if tokens is None else float(tokens)
        # Once per sequence: `merged` relies on it.
        state.tallies *= self.shape.keep
        state.tallies[:count] += share
        state.tallies[count : 2 * count] += share * lengths
        state.tallies[self._of_losses : self._of_recall] += losses
        state.seen += 1
        if state.seen % _FADE_EVERY == 0:
            state.squares *= _FADE

    # -- What was learnt -------------------------------------------------------------------

    def report(self) -> LengthReport | None:
        """How good recent predictions were; None before the first one was judged."""
        return report(self.state.tallies[self._of_report :], self.state.seen)

    def to_bytes(self, state: LengthState | None = None) -> bytes:
        """`state`, or its own: for a file, or for other learners."""
        return to_bytes(state or self.state, self.shape)

    def from_bytes(self, data: bytes) -> LengthState:
        """The state in `data`. Raises StateError."""
        return from_bytes(data, self.shape)

    def merged(self, mine: LengthState, base: LengthState, shared: LengthState) -> LengthState:
        """`shared` and what `mine` has learnt since it was `base`."""
        return merged(mine, base, shared, self.shape.keep)


def _softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: Floats = raised / raised.sum(-1, keepdims=True)
    return probabilities
