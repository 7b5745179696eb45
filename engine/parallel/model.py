"""A model over several ranks, as the executor in rank 0 sees it."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.attention.contract import Batch, KvCache
from engine.executor import ExecutorBroken
from engine.model.config import ModelConfig
from engine.model.llama import Shape
from engine.model.memory import Memory
from engine.model.model import Output
from engine.model.options import ModelOptions
from engine.model.pool import KvPool
from engine.parallel.cache import PartialCache
from engine.parallel.message import pack, unpack_output
from engine.parallel.stage import Setup, Stage
from engine.parallel.team import Team
from engine.parallel.topology import Topology


class ParallelModel:
    """A PagedModel (engine/model/model.py): each pass runs on all ranks. First `start`, then
    passes; at the end `close`.

    A pass that breaks leaves the ranks out of step, so it breaks the executor.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: Shape,
        options: ModelOptions,
        dtype: torch.dtype,
        *,
        threads: int,
        patience: float,
    ) -> None:
        """`threads` of each rank; `patience`: longest wait for another rank in a pass, seconds.
        Raises ConfigError where the model cannot be divided as the options say."""
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
        self._config, self._options, self._dtype = config, options, dtype
        self.threads, self._patience = threads, patience
        self._team: Team | None = None
        self._stage: Stage | None = None
        self._cache: KvCache | None = None

    def start(self, pool: KvPool, memory: Memory) -> None:
        """Start the other ranks over the worker's pool, which lies in `memory`, and read the
        weights. Raises ModelError, and ExecutorBroken if a rank does not start."""
        setup = Setup(
            topology=self.topology,
            config=self._config,
            dtype=self._dtype,
            device=self._options.device,
            attention_backend=self._options.attention_backend,
            geometry=pool.geometry,
            blocks=pool.blocks,
            threads=self.threads,
            patience=self._patience,
        )
        self._team = Team(setup, memory.fd)
        try:
            self._stage = Stage(replace(setup, rendezvous=self._team.rendezvous))
            self._cache = PartialCache(pool, self.topology)
            self._team.wait_ready()
        except BaseException:
            self.close()
            raise

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass, through all stages. `cache` is the pool that they were started over. Raises
        ExecutorBroken."""
        return self.finish(batch, self.begin(batch))

    def begin(self, batch: Batch) -> Output | None:
        """Tell all ranks of a pass, and run rank 0's share. The output, if it is here already;
        else `finish` fetches it, in the order of the passes. Raises ExecutorBroken."""
        assert self._team is not None and self._stage is not None and self._cache is not None
        self._team.begin(pack(batch))
        try:
            return self._stage.run(batch, self._cache)
        except RuntimeError as error:
            raise ExecutorBroken(self._team.obituary()) from error

    def finish(self, batch: Batch, output: Output | None) -> Output:
        """The output of a pass that has begun. Raises ExecutorBroken."""
        if output is not None:
            return output
        assert self._team is not None
        return unpack_output(self._team.output(), batch, self.vocab_size, self._dtype)

    def close(self) -> None:
        """End the other ranks. Idempotent."""
        if self._team is not None:
            self._team.close()
