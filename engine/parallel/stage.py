"""One rank's work in a pass: its layers, between the stage before and the stage after."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from baton.errors import ConfigError
from engine.attention.contract import Batch, KvCache
from engine.attention.select import select_attention
from engine.model.config import ModelConfig
from engine.model.model import Output
from engine.model.pool import KvGeometry
from engine.model.weights import Checkpoint
from engine.parallel.group import Group, Rendezvous
from engine.parallel.shard import Shard, ShardedCheckpoint
from engine.parallel.topology import Topology

if TYPE_CHECKING:
    from engine.gpu.model import GpuLlama

MODELS = {
    "LlamaForCausalLM": "engine.model.llama:Llama",
    "MistralForCausalLM": "engine.model.llama:Llama",
    "Qwen2ForCausalLM": "engine.model.llama:Llama",
    "Qwen3ForCausalLM": "engine.model.llama:Llama",
}
"""Those whose layers know of parts (engine/model/part.py)."""


Weights = Callable[[Path, torch.dtype, torch.device, Topology], Checkpoint]
"""Of the directory, the format, the device and the rank."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every rank is told once, as it starts."""

    topology: Topology
    config: ModelConfig
    dtype: torch.dtype
    device: str  # of this rank
    attention_backend: str
    fused: bool  # the model is an engine.gpu.model.GpuLlama
    quantization: str
    lockstep: bool  # ranks are shards that run the same launches (engine/parallel/lockstep.py)
    geometry: KvGeometry  # of whole blocks
    own_pools: bool  # each rank has a pool of its own (engine/parallel/store.py)
    threads: int
    patience: float  # longest wait for another rank in a pass, seconds
    weights: Weights = ShardedCheckpoint  # makes what the rank's tensors are read from
    rendezvous: Path | None = None  # the file where the ranks find each other


class StagedModel(Protocol):
    """A part of a model; see engine.model.llama.Llama."""

    def embed(self, batch: Batch) -> Tensor: ...

    def run(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor: ...

    def logits(self, x: Tensor, batch: Batch) -> Tensor: ...


class Stage:
    """A part of a model with its place among the others. Errors of other ranks, and their silence,
    are RuntimeErrors here."""

    def __init__(self, setup: Setup) -> None:
        """Read the weights and meet the other ranks. Raises ModelError."""
        topology, config = setup.topology, setup.config
        self.device = device = torch.device(setup.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        checkpoint = setup.weights(config.path, setup.dtype, device, topology)
        assert setup.rendezvous is not None
        meeting = Rendezvous(setup.rendezvous, topology.ranks, device, setup.patience)
        self.shards = _group(meeting, f"stage-{topology.stage}", topology.shard, topology.tensor)
        self._line = _group(meeting, f"shard-{topology.shard}", topology.stage, topology.pipeline)
        self._connected = tuple(group for group in (self.shards, self._line) if group is not None)
        self._part = Shard(topology, self.shards)
        self._model = _model(setup, checkpoint, self._part)
        self._topology, self.dtype = topology, setup.dtype
        self._hidden, self._vocab_size = config.hidden_size, config.vocab_size
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def run(self, batch: Batch, cache: KvCache) -> Output | None:
        """This rank's share of a pass, of which the batch lies on its device. The output, on the
        teller."""
        x = self._model.embed(batch) if self._topology.first else self._receive(batch)
        x = self._model.run(x, batch, cache)
        if not self._topology.last:
            self._send(x.contiguous())
            return None
        if not len(batch.logit_rows):
            return Output.of(x[:0], batch)
        return self._part.output(self._model.logits(x, batch), batch, self._vocab_size)

    def abort(self) -> None:
        """Leave the other ranks, or stop waiting for one that is lost: on a GPU nothing else would.
        Gloo sees broken connections by itself. Idempotent."""
        groups, self._connected = self._connected, ()
        if self.device.type == "cuda":
            for group in groups:
                group.abort()

    def fused_model(self) -> GpuLlama:
        """Its part of a model whose ranks are `fused`."""
        from engine.gpu.model import StagedGpuLlama

        assert isinstance(self._model, StagedGpuLlama)
        return self._model.model

    def _receive(self, batch: Batch) -> Tensor:
        shape = (len(batch.token_ids), self._hidden)
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        assert self._line is not None
        return self._line.receive(x, self._topology.stage - 1)

    def _send(self, x: Tensor) -> None:
        """Send on, without waiting for a stage that is still busy with an earlier pass. No more
        passes are under way than there are stages."""
        assert self._line is not None
        while len(self._sending) >= self._topology.pipeline:
            self._sending.popleft()[0].wait()
        self._sending.append((self._line.send(x, self._topology.stage + 1), x))


def model_module(config: ModelConfig, *, fused: bool) -> str:
    """Where the code of an architecture is. Raises ConfigError if it knows no parts."""
    return "engine.gpu.model" if fused else _named(config)[0]


def _named(config: ModelConfig) -> tuple[str, str]:
    """Module and class of an architecture."""
    found = MODELS.get(config.architecture)
    if found is None:
        raise ConfigError(
            f"--tensor-parallel, --pipeline-parallel: not for {config.architecture}, "
            f"only for {', '.join(MODELS)}"
        )
    module, _, name = found.partition(":")
    return module, name


def _model(setup: Setup, checkpoint: Checkpoint, part: Shard) -> StagedModel:
    if setup.fused:
        from engine.gpu.model import StagedGpuLlama

        return StagedGpuLlama(setup.config, checkpoint, setup.quantization, part)
    attention = select_attention(setup.attention_backend, setup.device)
    module, name = _named(setup.config)
    make: Callable[..., StagedModel] = getattr(importlib.import_module(module), name)
    return make(setup.config, checkpoint, attention, part)


def _group(meeting: Rendezvous, name: str, rank: int, size: int) -> Group | None:
    return meeting.group(name, rank, size) if size > 1 else None
