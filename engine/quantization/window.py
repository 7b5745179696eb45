"""A part of a weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """Outputs and inputs of a weight [out, in], without gaps."""

    outputs: range
    inputs: range

    @classmethod
    def whole(cls, out: int, into: int) -> Window:
        """All of it."""
        return cls(range(out), range(into))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the part."""
        return len(self.outputs), len(self.inputs)


def span(of: range) -> slice:
    """The same as an index."""
    return slice(of.start, of.stop)
