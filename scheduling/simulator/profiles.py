"""What a worker's device is to the simulator: a cost model, its KV memory, its links.

By name, by model and GPU (hardware.py), or from the file that `baton bench engine --profile`
writes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from baton.errors import ConfigError
from scheduling.cost import LinearCost
from scheduling.plan import Capacity
from scheduling.simulator.hardware import GPUS, SHAPES, Efficiency, Gpu, ModelShape, roofline
from scheduling.simulator.prefill_worker import Transfer

KV_MEMORY_SHARE = 0.9
"""Of what the weights leave free; the rest is for activations."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One device with one model. The first six numbers are those of LinearCost and of a swap, in
    seconds; a file may leave out what has a default.

    `blocks` is all the KV memory there is, in blocks of `block_size` tokens and `block_bytes`
    bytes. `transfer_bytes_per_second` is the way from a prefill to a decode worker.
    """

    name: str
    base: float
    per_token: float
    per_attention: float
    per_sequence: float
    per_context: float
    swap_seconds_per_block: float = 0.0
    block_size: int = 16
    block_bytes: int = 0
    blocks: int = 100_000
    max_context: int = 4096
    transfer_bytes_per_second: float = 25e9  # a network card of 200 Gbit/s
    transfer_latency: float = 0.002
    device: str = "cpu"  # torch's name of it
    weight_bytes: int = 0
    kv_dtype: str = "auto"  # as in WorkerConfig
    source: str = ""  # where the figures are from

    @property
    def cost(self) -> LinearCost:
        """The cost of passes."""
        return LinearCost(
            self.base, self.per_token, self.per_attention, self.per_sequence, self.per_context
        )

    @property
    def transfer(self) -> Transfer:
        """The way of KV to another device of this kind."""
        return Transfer(self.block_bytes, self.transfer_bytes_per_second, self.transfer_latency)

    def capacity(
        self,
        *,
        max_tokens: int,
        max_sequences: int,
        blocks: int | None = None,
        host_blocks: int = 0,
    ) -> Capacity:
        """A worker on this device; with all of its KV memory, or with `blocks` blocks."""
        return Capacity(
            blocks=self.blocks if blocks is None else blocks,
            block_size=self.block_size,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            max_context=self.max_context,
            host_blocks=host_blocks,
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read what `save` wrote; keys that it does not know are left alone. Raises
        ConfigError."""
        known = {field.name for field in fields(cls)}
        try:
            content = json.loads(path.read_text())
            return cls(**{key: value for key, value in content.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: not a profile: {error}") from None


def of_hardware(
    shape: ModelShape,
    gpu: Gpu,
    *,
    block_size: int = 16,
    efficiency: Efficiency | None = None,
) -> Profile:
    """A model on a GPU, by the roofline. Raises ConfigError if it does not fit."""
    reached = efficiency or Efficiency()
    block_bytes = shape.kv_bytes_per_token * block_size
    left = KV_MEMORY_SHARE * (gpu.memory - shape.weight_bytes)
    blocks = int(left // block_bytes)
    if blocks * block_size < shape.max_context // 4:
        raise ConfigError(f"{shape.name} does not fit in the memory of one {gpu.name}")
    cost = roofline(shape, gpu, reached)
    return Profile(
        name=f"{gpu.name}-{shape.name}",
        base=cost.base,
        per_token=cost.per_token,
        per_attention=cost.per_attention,
        per_sequence=cost.per_sequence,
        per_context=cost.per_context,
        swap_seconds_per_block=block_bytes / gpu.host_bandwidth,
        block_size=block_size,
        block_bytes=block_bytes,
        blocks=blocks,
        max_context=shape.max_context,
        device="cuda",
        weight_bytes=shape.weight_bytes,
        kv_dtype=shape.kv_dtype,
        source=f"roofline: data sheet of the {gpu.name}, {reached.bandwidth:.0%} of its bandwidth "
        f"and {reached.operations:.0%} of its operations",
    )


def _a100_opt_13b() -> Profile:
    """The profile that DistServe publishes for its simulator, fitted on an A100-80 (milliseconds:
    prefill 18.10 + 0.10191 per token + 7.12e-6 per squared length; decode 19.93 + 0.000627 per
    token of context + 0.0385 per sequence). A pass has one base here: that of prefill."""
    hardware = of_hardware(SHAPES["opt-13b"], GPUS["a100-80"])
    return replace(
        hardware,
        name="a100-opt-13b",
        base=18.10e-3,
        per_token=0.10191e-3,
        per_attention=7.12e-9,
        per_sequence=0.0385e-3,
        per_context=0.627e-6,
        source="DistServe's published profile of OPT-13B on an A100-80; memory and swap by the "
        "roofline",
    )


def profile(name: str) -> Profile:
    """A profile by name: "a100-opt-13b", or GPU-MODEL of hardware.GPUS and hardware.SHAPES, such
    as "h200-llama-3-8b"; or by the path of a file. Raises ConfigError."""
    if name == "a100-opt-13b":
        return _a100_opt_13b()
    for gpu in GPUS.values():
        shape = SHAPES.get(name.removeprefix(f"{gpu.name}-"))
        if shape is not None and name != shape.name:
            return of_hardware(shape, gpu)
    if Path(name).suffix == ".json":
        return Profile.load(Path(name))
    raise ConfigError(
        f"unknown profile {name!r}: a100-opt-13b, a JSON file, or GPU-MODEL with one of "
        f"{', '.join(GPUS)} and one of {', '.join(SHAPES)}"
    )
