"""Choosing tokens in the compiled library, and their log probabilities: what sampler.py does in
torch, a row per thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.types import Logprob
from engine.model.logits import COLDEST
from engine.native.library import DrawsView, ReportsView
from scheduling.sequence import Sequence

_LOW_32 = 0xFFFFFFFF
_LOW_64 = 0xFFFFFFFFFFFFFFFF


class CompiledChoice:
    """A Choice (engine/model/sampler.py) for logits in main memory that reports, too.

    The same tokens as torch's, but where rounding decides: a token whose cumulative mass is top_p
    to the last digits, or two candidates that tie.
    """

    def __init__(
        self, run: Callable[[DrawsView], None], report: Callable[[ReportsView], None]
    ) -> None:
        """`run` calls `baton_sample`, `report` calls `baton_report`."""
        self._run = run
        self._report = report

    def __call__(self, scores: Tensor, sequences: list[Sequence]) -> list[int]:
        """As the protocol says."""
        scores = scores.float().contiguous()
        samplings = [sequence.request.sampling for sequence in sequences]
        temperatures = [max(s.temperature, COLDEST) if s.temperature else 0.0 for s in samplings]
        vocabulary = scores.shape[-1]
        arrays: dict[str, NDArray[Any]] = {
            "temperatures": np.array(temperatures, np.float32),
            "top_ks": np.array([min(s.top_k, vocabulary) for s in samplings], np.int32),
            "top_ps": np.array([s.top_p for s in samplings], np.float32),
            "min_ps": np.array([s.min_p for s in samplings], np.float64),
            "seeds": np.array([s.seed & _LOW_64 for s in samplings], np.uint64),
            "streams": np.array([s.index & _LOW_32 for s in sequences], np.uint32),
            "positions": np.array([len(s.tokens) & _LOW_32 for s in sequences], np.uint32),
        }
        tokens = torch.empty(len(sequences), dtype=torch.int64)
        self._run(
            DrawsView(
                rows=len(sequences),
                vocabulary=vocabulary,
                logits=scores.data_ptr(),
                tokens=tokens.data_ptr(),
                **{name: array.ctypes.data for name, array in arrays.items()},
            )
        )
        chosen: list[int] = tokens.tolist()
        return chosen

    def logprobs(
        self, logits: Tensor, places: list[int], targets: list[int], alternatives: list[int]
    ) -> list[Logprob]:
        """As the protocol Reporter says."""
        logits = logits.float().contiguous()
        rows, vocabulary = len(places), logits.shape[-1]
        counts = [min(count, vocabulary) for count in alternatives]
        width = max(counts)
        given: dict[str, NDArray[Any]] = {
            "places": np.array(places, np.int64),
            "targets": np.array(targets, np.int64),
            "counts": np.array(counts, np.int32),
        }
        shares, top_shares = np.empty(rows, np.float32), np.empty((rows, width), np.float32)
        ranks, top_tokens = np.empty(rows, np.int64), np.empty((rows, width), np.int64)
        written: dict[str, NDArray[Any]] = {
            "shares": shares,
            "ranks": ranks,
            "top_tokens": top_tokens,
            "top_shares": top_shares,
        }
        self._report(
            ReportsView(
                rows=rows,
                vocabulary=vocabulary,
                width=width,
                logits=logits.data_ptr(),
                **{name: array.ctypes.data for name, array in (given | written).items()},
            )
        )
        columns = zip(
            targets,
            shares.tolist(),
            ranks.tolist(),
            top_tokens.tolist(),
            top_shares.tolist(),
            counts,
            strict=True,
        )
        return [
            Logprob(token, own, rank, tuple(zip(ids[:count], likely[:count], strict=True)))
            for token, own, rank, ids, likely, count in columns
        ]
