"""Times on a device that works behind the host's back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch


def seconds(call: Callable[[], object], device: torch.device, *, repeats: int = 20) -> float:
    """Median seconds of the device for one call. The level-two cache is written over before each
    one, as a model's next layer would."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return statistics.median(_host_seconds(call) for _ in range(repeats))
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        call()
        ended.record()
        pairs.append((begun, ended))
    torch.cuda.synchronize(device)
    return statistics.median(begun.elapsed_time(ended) / 1e3 for begun, ended in pairs)


def _host_seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end) spans."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def idle_share(call: Callable[[], object], device: torch.device) -> float:
    """Share of the time from the first kernel of `call` to the end of its last in which the device
    runs none and copies nothing."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type is torch.autograd.DeviceType.CUDA
    ]
    begun, ended = min(begin for begin, _ in spans), max(end for _, end in spans)
    return 1 - covered(spans) / (ended - begun)
