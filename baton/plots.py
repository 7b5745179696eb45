"""matplotlib, which is optional: the dependency group `bench`."""

from __future__ import annotations

from typing import Any

from baton.errors import ConfigError


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only. Raises ConfigError, with what to do about it, if
    matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            'plots need matplotlib, which is not installed: pip install "baton-serve[bench]", '
            "or leave them out with --no-plots"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
