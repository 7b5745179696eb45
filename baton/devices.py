"""Names of the devices that workers compute on: cpu, cuda, cuda:N."""

from __future__ import annotations

from baton.errors import ConfigError


def device_of(device: str, rank: int) -> str:
    """The device of a rank, where `device` is rank 0's: GPUs are taken in order, and cuda is the
    first. Raises ConfigError for a GPU without a number that it could have."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return device
    if not (number or "0").isdecimal():
        raise ConfigError(f"--device {device}: must be cuda:N")
    return f"cuda:{int(number or 0) + rank}"
