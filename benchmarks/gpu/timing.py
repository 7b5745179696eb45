"""Times on a device that works behind the host's back."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

_CACHE = 2**28  # bytes; more than any level-two cache holds
_INSTANT = 1e-9  # seconds, where a difference of two times drowns in their noise
# A device that has work queued starts the next kernel within two microseconds. Longer gaps mean
# that the host has not brought it yet.
_QUEUED = 3e-6


def seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 20) -> float:
    """Median seconds of the device for one call, from cold caches. `call` must be one that a CUDA
    graph can record.

    Before each call another tensor is read, which fills the level-two cache with what nobody needs
    and need not be written back. Calls and reads are replayed as a CUDA graph, so that the host's
    launches cost nothing; what the same reads take alone is subtracted.
    """
    call()
    if device.type != "cuda":
        return min(_host_seconds(call) for _ in range(2))
    flush = _Flush.of(device)

    def both() -> None:
        flush()
        call()

    return max(_replayed(both, device, repeats) - flush.seconds(repeats), _INSTANT)


class _Flush:
    """Reads so much that nothing else is left in the level-two cache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._other = torch.ones(_CACHE // 4, dtype=torch.float32, device=device)
        self._total = torch.empty((), dtype=torch.float32, device=device)
        self._seconds: dict[int, float] = {}
        self()  # once outside of any recording

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> _Flush:
        """That of a device."""
        return cls(device)

    def __call__(self) -> None:
        torch.sum(self._other, dim=0, out=self._total)

    def seconds(self, repeats: int) -> float:
        """What it takes alone, measured once."""
        if repeats not in self._seconds:
            self()
            self._seconds[repeats] = _replayed(self, self._device, repeats)
        return self._seconds[repeats]


def _replayed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of one call among `repeats` in a graph."""
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    graph.replay()
    pairs = []
    for _ in range(7):
        begun, ended = (_event() for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        pairs.append((begun, ended))
    torch.cuda.synchronize(device)
    took: float = statistics.median(begun.elapsed_time(ended) / 1e3 for begun, ended in pairs)
    return took / repeats


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _host_seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@dataclass(frozen=True, slots=True)
class Waiting:
    """Shares of a stretch of time in which the device ran no kernel and copied nothing."""

    idle: float  # all of them, the steps from one kernel of a graph to the next among them
    host: float  # those in which it waited for the host


def covered(spans: Iterable[tuple[float, float]], *, joined: float = 0.0) -> float:
    """Length of the union of (begin, end) spans, and of the gaps between them that are no longer
    than `joined`."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        if begin - until <= joined:
            begin = until
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def waiting(spans: Sequence[tuple[float, float]]) -> Waiting:
    """Of the spans in seconds in which the device worked, from the first to the last."""
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return Waiting(1 - covered(spans) / whole, 1 - covered(spans, joined=_QUEUED) / whole)


def watched(call: Callable[[], object], device: torch.device) -> Waiting | None:
    """How the device waited from the first kernel of `call` to the end of its last; None if torch's
    profiler does not work there, or saw no kernel."""
    # Without these, CUPTI may stop seeing into graphs when a profile ends and another begins.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize(device)
        events = profile.events() or ()
    except RuntimeError:
        return None
    cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    spans = [
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in events
        if event.device_type == cuda and not event.is_user_annotation
    ]
    return waiting(spans) if spans else None
