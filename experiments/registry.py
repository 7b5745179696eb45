"""The experiments by name. Modules are imported when they are asked for: some need torch."""

from __future__ import annotations

from importlib import import_module

from baton.errors import ConfigError
from experiments.experiment import Experiment

# Each module has a tuple EXPERIMENTS.
_MODULES = {
    "experiments.policies": ("B1", "B2", "B4", "B6", "BURSTS", "DEMO"),
    "experiments.rates": ("B3",),
    "experiments.ratios": ("B5",),
    "experiments.frontier": ("FRONTIER",),
    "experiments.swap": ("B7",),
    "experiments.admission": ("B8",),
    "experiments.predictor": ("B9",),
    "experiments.splitfuse": ("B10",),
    "experiments.promises": ("B11",),
    "experiments.tokens": ("B12",),
    "experiments.balancing": ("B13",),
    "experiments.batching": ("B15",),
    "experiments.fairness": ("FAIR",),
    "experiments.prefixes": ("PREFIX",),
}

NAMES = tuple(sorted((n for names in _MODULES.values() for n in names), key=lambda n: (len(n), n)))
"""All names, in the order in which they run."""


def experiment(name: str) -> Experiment:
    """The experiment called `name`. Raises ConfigError for others."""
    for module, names in _MODULES.items():
        if name in names:
            found: tuple[Experiment, ...] = import_module(module).EXPERIMENTS
            return next(each for each in found if each.name == name)
    raise ConfigError(f"--only {name}: unknown; there are {', '.join(NAMES)}")


def chosen(only: str | None) -> list[Experiment]:
    """The experiments of a comma-separated list, all of them for None, each once."""
    wanted = NAMES if only is None else [name.strip() for name in only.split(",") if name.strip()]
    if not wanted:
        raise ConfigError("--only: names no experiment")
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        experiment(unknown[0])
    return [experiment(name) for name in NAMES if name in wanted]
