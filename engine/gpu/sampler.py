"""From logits to tokens and log probabilities on the device: what `sampler.sample` does, without a
look at the logits from the host."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from engine.gpu.adjustments import Adjustments
from engine.gpu.choice import DeviceChoice
from engine.gpu.reports import Report
from engine.gpu.transfer import Arriving
from engine.model.sampler import pick
from scheduling.plan import Sampled
from scheduling.sequence import Sequence


class Drawn:
    """The next tokens of some sequences, which the device draws, and what is told of them."""

    def __init__(
        self,
        tokens: Tensor,
        sequences: list[Sequence],
        report: Report | None,
        forget: Callable[[Sequence], None],
    ) -> None:
        """`forget` is told of each sequence that does not go on with what `tokens` says."""
        self.tokens = tokens  # [S] int64 on the device; -1 where none is possible
        self.goes_on = True  # with these tokens; False once one was found that is none
        self._sequences, self._report, self._forget = sequences, report, forget
        self._arriving = Arriving(tokens)

    def sampled(self) -> list[Sampled]:
        """What the sequences get, when it is there."""
        tokens = self._arriving.wait()
        found = pick(tokens, self._sequences)
        for row, logprob in (self._report.wait() if self._report else {}).items():
            found[row] = Sampled(found[row].token_id, logprob)
        for row in np.flatnonzero(tokens.numpy() < 0).tolist():
            self.goes_on = False
            self._forget(self._sequences[row])
        return found


class DeviceSampler:
    """Draws the tokens of passes that have up to `most` different sequences, one after another."""

    def __init__(self, vocabulary: int, most: int, device: torch.device) -> None:
        self._choice = DeviceChoice(device)
        self._adjustments = Adjustments(vocabulary, most, device)

    def draw(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        lengths: Items[int],
        newest: Tensor | None = None,
    ) -> Drawn:
        """Have the device draw the next token of each sequence from its logits [S, vocabulary], of
        any float type; they may change when all that is queued by then is over.

        `lengths[i]` is how many tokens sequence i has before the one that is drawn. Where the host
        does not know the last of them, `newest` [S] int64 does, on the device.
        """
        scores = self._adjustments(logits, sequences, lengths, newest)
        tokens = self._choice.draw(scores, sequences, lengths)
        reports = any(sequence.request.logprobs is not None for sequence in sequences)
        report = Report(logits, tokens, sequences) if reports else None
        return Drawn(tokens, sequences, report, self._adjustments.forget)
