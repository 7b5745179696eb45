"""A model over several ranks, as the executor in rank 0 sees it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from baton.devices import device_of
from engine.attention.contract import Batch, KvCache
from engine.executor import ExecutorBroken
from engine.gpu import memory as gpu_memory
from engine.model.batch import BatchBuilder
from engine.model.config import ModelConfig
from engine.model.llama import Shape
from engine.model.memory import Memory
from engine.model.model import Output
from engine.model.options import ModelOptions
from engine.model.pool import KvGeometry
from engine.model.swap import Swapper
from engine.parallel.message import Kind, pack, say, unpack_output
from engine.parallel.shard import ShardedCheckpoint
from engine.parallel.stage import Setup, Stage, Weights
from engine.parallel.store import MappedStore, OwnStore, Room, open_store, portion_of
from engine.parallel.team import Team
from engine.parallel.topology import Topology
from scheduling.plan import Capacity

if TYPE_CHECKING:
    from engine.gpu.launcher import Launcher
    from engine.gpu.model import GpuLlama
    from engine.parallel.joint import JointStaging


class ParallelModel:
    """A PagedModel (engine/model/model.py): each pass runs on all ranks. First `start` and `open`,
    then passes; at the end `close`.

    A pass that breaks leaves the ranks out of step, so it breaks the executor.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: Shape,
        options: ModelOptions,
        dtype: torch.dtype,
        *,
        fused: bool,
        threads: int,
        patience: float,
        weights: Weights = ShardedCheckpoint,
    ) -> None:
        """`fused`: ranks run Triton's kernels. `threads` of each rank; `patience`: longest wait for
        another rank in a pass, seconds; `weights`: see Setup. Raises ConfigError where the model
        cannot be divided as the options say."""
        self.topology = Topology(options.tensor_parallel, options.pipeline_parallel)
        self.topology.require(
            layers=config.layers,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            intermediate=shape.intermediate,
        )
        self.vocab_size, self.layers = config.vocab_size, config.layers
        self.kv_heads, self.head_dim = shape.kv_heads, shape.head_dim
        self.max_context = config.max_context
        self.device = torch.device(device_of(options.device, 0))
        self._config, self._options, self._dtype = config, options, dtype
        self._fused, self.threads, self._patience = fused, threads, patience
        self._weights = weights
        self.lockstep = fused and self.topology.pipeline == 1
        self._team: Team | None = None
        self._stage: Stage | None = None
        self._store: MappedStore | OwnStore | None = None
        self.staging: JointStaging | None = None  # where ranks have pools of their own

    def start(self, geometry: KvGeometry) -> None:
        """Start the other ranks, and read the weights; `geometry` of the worker's pool. `open`
        follows. Raises ModelError, and ExecutorBroken if a rank does not start."""
        setup = Setup(
            topology=self.topology,
            config=self._config,
            dtype=self._dtype,
            device=str(self.device),
            attention_backend=self._options.attention_backend,
            fused=self._fused,
            quantization=self._options.quantization,
            lockstep=self.lockstep,
            geometry=geometry,
            own_pools=self.device.type != "cpu" or self._options.attention_backend == "triton",
            threads=self.threads,
            patience=self._patience,
            weights=self._weights,
        )
        self._team = Team(setup)
        try:
            self._setup = replace(setup, rendezvous=self._team.rendezvous)
            self._stage = Stage(self._setup)
            self._team.wait_ready()
            self._team.watch(self._stage.abort)
        except BaseException:
            self.close()
            raise

    def open(self, memory: Memory, room: Room) -> None:
        """Begin with new pools, as large as `room`; the worker's lies in `memory`. Gives up those
        that there were. Raises ExecutorBroken."""
        assert self._team is not None
        self._store = self.staging = None  # before the next ones take their memory
        self._team.open(room, memory.fd)
        self._store = open_store(self._setup, room, memory.buffer)
        if isinstance(self._store, OwnStore):
            from engine.parallel.joint import JointStaging

            self.staging = JointStaging(self._team, self._store.staging, self._patience)

    def swapper(self) -> Swapper | None:
        """What swaps in all ranks' pools; None if they compute in the worker's."""
        if not isinstance(store := self._store, OwnStore):
            return None
        from engine.parallel.joint import JointCopies

        team = self._team
        assert team is not None
        return Swapper(lambda on_end: JointCopies(team, store, on_end))

    def launcher(self, capacity: Capacity, batches: BatchBuilder) -> Launcher:
        """What gives passes to all ranks where they run in lockstep."""
        from engine.gpu.launcher import Launcher
        from engine.parallel.lockstep import Leader

        assert self._team is not None and isinstance(self._store, OwnStore)
        assert self._stage is not None and self._stage.shards is not None
        others = Leader(self._team.begin, self._stage.shards, self.vocab_size)
        return Launcher(self.fused_model(), self._store.pool, capacity, batches, others)

    def fused_model(self) -> GpuLlama:
        """Rank 0's part, where ranks run Triton's kernels."""
        assert self._stage is not None
        return self._stage.fused_model()

    def require_ranks(self) -> None:
        """Raise ExecutorBroken if a rank has ended: what a pass has given since means nothing."""
        assert self._team is not None
        if self._team.lost:
            raise ExecutorBroken(self._team.lost)

    def obituary(self) -> str:
        """What became of the other ranks, for people."""
        assert self._team is not None
        return self._team.obituary()

    def begin_trial(self) -> None:
        """From now on, what the ranks take of their GPUs is measured. Raises ExecutorBroken."""
        assert self._team is not None
        self._team.begin(say(Kind.TRIAL))
        gpu_memory.begin_trial(self.device)

    def end_trial(self, share: float) -> int:
        """Blocks that every rank has room for, where KV may take what the trial has left of
        `share` of its GPU. Gives up the pools. Raises ExecutorBroken, and ConfigError if nothing is
        left."""
        assert self._team is not None and isinstance(self._store, OwnStore)
        trial, others = self._store.pool.storage.nbytes, self._team.ask(say(Kind.MEASURE))
        self._store = self.staging = None
        memories: list[gpu_memory.Memory] = [
            gpu_memory.end_trial(self.device, trial),
            *map(pickle.loads, others),
        ]
        portions = (
            portion_of(self._setup.geometry, self.topology.at(r)) for r in range(len(memories))
        )
        return min(
            memory.kv_room(share) // portion.geometry().block_bytes
            for memory, portion in zip(memories, portions, strict=True)
        )

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass, through all stages. `cache` is the pool that they were opened over. Raises
        ExecutorBroken."""
        return self.finish(batch, self.begin(batch))

    def begin(self, batch: Batch) -> Output | None:
        """Tell all ranks of a pass, whose batch lies in host memory, and run rank 0's share. The
        output, if it is here already; else `finish` fetches it, in the order of the passes. Raises
        ExecutorBroken."""
        assert self._team is not None and self._stage is not None and self._store is not None
        self._team.begin(pack(batch))
        try:
            return self._stage.run(self._store.place(batch), self._store.cache)
        except RuntimeError as error:
            raise ExecutorBroken(self._team.obituary()) from error

    def ready(self) -> bool:
        """Wait until `finish` need not wait for an output that is not here yet; False if
        `interrupt` ends that. Raises ExecutorBroken."""
        assert self._team is not None
        return self._team.ready()

    def interrupt(self) -> None:
        """End the wait in `ready`, or the next one. Never blocks; on any thread."""
        assert self._team is not None
        self._team.interrupt()

    def finish(self, batch: Batch, output: Output | None) -> Output:
        """The output of a pass that has begun. Raises ExecutorBroken."""
        if output is not None:
            return output
        assert self._team is not None
        found = unpack_output(self._team.output(), batch, self.vocab_size, self._dtype)
        return replace(found, logits=found.logits.to(self.device))

    def close(self) -> None:
        """End the other ranks. Idempotent."""
        if self._team is not None:
            self._team.close()
        if self._stage is not None:
            self._stage.abort()
