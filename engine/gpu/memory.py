"""How much of a GPU's memory the KV cache may take: what is left when a worker is warm.

Measured, not estimated: the weights are there, and a trial with a small pool runs the largest
passes and records the graphs. What that leaves of a share of the device is for KV; the rest of the
device is the margin for fragments, and for libraries that take memory late.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.errors import ConfigError

_log = logging.getLogger(__name__)

_MARGIN = 0.05  # of the device


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory around a trial, in bytes."""

    total: int
    others: int  # taken by other processes, and by libraries of this one
    peak: int  # the most that this process's tensors took
    trial: int  # of that, the pool that the trial made

    @property
    def taken(self) -> int:
        """By weights and passes."""
        return self.peak - self.trial

    def room(self, share: float) -> int:
        """What KV may take if this worker may have `share` of the device, and what others leave:
        of that a margin stays free, unless the share is all but everything."""
        margin = int(self.total * min(_MARGIN, 1 - share))
        return min(int(self.total * share), self.total - self.others - margin) - self.taken

    def kv_room(self, share: float) -> int:
        """`room`, told to people. Raises ConfigError if nothing is left."""
        room = self.room(share)
        _log.info(
            "GPU memory: %.1f GiB in all, %.1f of others, %.1f for weights and passes, %.1f for KV",
            self.total / 2**30,
            self.others / 2**30,
            self.taken / 2**30,
            room / 2**30,
        )
        if room <= 0:
            raise ConfigError(
                f"--device-memory {share}: weights and passes take "
                f"{self.taken / 2**30:.1f} of {self.total / 2**30:.1f} GiB, others "
                f"{self.others / 2**30:.1f}: no KV fits"
            )
        return room


def begin_trial(device: torch.device) -> None:
    """From now on, what this process takes of `device` is measured."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def end_trial(device: torch.device, trial_bytes: int) -> Memory:
    """What was taken since the trial began, for one whose pool had `trial_bytes` and is gone."""
    gc.collect()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return Memory(total, others, peak, trial_bytes)


def room_for_kv(trial: Callable[[], int], device: torch.device, share: float) -> int:
    """Bytes for KV. `trial` runs the largest passes over a pool of its own, whose bytes it returns,
    and keeps nothing.

    Raises ConfigError if nothing is left.
    """
    begin_trial(device)
    return end_trial(device, trial()).kv_room(share)
