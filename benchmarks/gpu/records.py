"""What was measured, as flat records: one JSON file per device, into which later runs go, too."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch as _torch


@dataclass(frozen=True, slots=True)
class Record:
    """One metric of one workload. Units are in the metric's name; shares are of the ceilings that
    were measured in the same run."""

    device: str
    date: str
    torch: str
    section: str  # ceilings, kernels, attention, handoff, passes, parallel or serving
    shape: str  # of the model; empty where there is none
    format: str  # of weights, or of KV for attention; empty where there is none
    workload: str
    metric: str
    value: float

    @property
    def series(self) -> tuple[str, str, str, str]:
        """What a new run of the same replaces."""
        return self.section, self.shape, self.format, self.workload


@dataclass(frozen=True, slots=True)
class Source:
    """The machine and the day."""

    device: str
    date: str
    torch: str

    @classmethod
    def here(cls, device: _torch.device) -> Source:
        """This machine, today."""
        name = _torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return cls(name, today, _torch.__version__)

    @property
    def file(self) -> str:
        """Name of the device's file."""
        return self.device.lower().replace(" ", "-") + ".json"

    def records(
        self,
        section: str,
        workload: str,
        values: dict[str, float],
        *,
        shape: str = "",
        form: str = "",
    ) -> list[Record]:
        """One for each metric."""
        where = (self.device, self.date, self.torch, section, shape, form, workload)
        return [Record(*where, metric, float(value)) for metric, value in values.items()]


def load(file: Path) -> list[Record]:
    """All records of a file; none if it is not there."""
    if not file.is_file():
        return []
    return [Record(**each) for each in json.loads(file.read_text())]


def save(file: Path, new: Iterable[Record]) -> None:
    """Put the new records into the file, in the place of those that they replace."""
    fresh = list(new)
    replaced = {record.series for record in fresh}
    kept = [record for record in load(file) if record.series not in replaced]
    lines = ",\n ".join(json.dumps(asdict(record)) for record in kept + fresh)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(".new")
    written.write_text(f"[\n {lines}\n]\n")
    written.replace(file)
