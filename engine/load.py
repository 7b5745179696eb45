"""From a model directory to an executor that is ready to run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import demo_model
from baton.config import DecodeConfig, WorkerConfig
from baton.errors import ConfigError
from engine.model.config import read_config
from engine.model.memory import Memory, OwnMemory
from engine.model.model import PagedModel
from engine.model.options import ModelOptions
from engine.model.pool import KvGeometry, KvPool
from engine.model.rope import safe_context
from engine.model.runner import Threads, TorchExecutor
from engine.model.weights import fingerprint
from engine.select import Built, build_model
from scheduling.plan import Capacity

if TYPE_CHECKING:
    from engine.parallel.model import ParallelModel

_logger = logging.getLogger(__name__)

_KV_MEMORY = 512 * 2**20  # on a CPU, and where nothing was measured

Share = Callable[[int], Memory]


def load_executor(
    path: Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    block_size: int = 16,
    kv_blocks: int = 0,
    kv_memory: int = 0,
    device_memory: float = 0.9,
    host_kv_memory: int = 0,
    swap_bandwidth: float = 0.0,
    max_batch_tokens: int = 512,
    max_batch_sequences: int = 64,
    max_context: int = 0,
    attention_backend: str = "auto",
    quantization: str = "none",
    kv_dtype: str = "auto",
    instruction_set: str = "auto",
    threads: int = 0,
    ahead: bool = True,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    share: Share | None = None,
) -> TorchExecutor:
    """Load a model and allocate its KV cache. Parameters as in WorkerConfig; `ahead`: on a GPU,
    passes may begin before they are planned.

    `share(bytes)` provides the memory of a KV pool on the host; it is allocated if None. With
    `kv_blocks` 0 the pool takes `kv_memory` bytes, or what fits, but never more than
    `max_batch_sequences` sequences of `max_context` tokens can fill.

    Raises ModelError if the directory cannot be served, ConfigError if the parameters make no
    sense together.
    """
    _require(device)
    Threads(threads).apply()  # torch's threads read and convert weights, too
    options = ModelOptions(
        attention_backend=attention_backend,
        dtype=dtype,
        device=device,
        quantization=quantization,
        kv_dtype=kv_dtype,
        instruction_set=instruction_set,
        threads=threads,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    built = build_model(read_config(path), options)
    geometry = _geometry(path, built, options)
    context = _context(built.model, max_context)
    capacity = Capacity(
        blocks=kv_blocks,
        block_size=block_size,
        max_tokens=max_batch_tokens,
        max_sequences=max_batch_sequences,
        max_context=context,
        host_blocks=host_kv_memory // geometry.block_bytes,
        depth=pipeline_parallel,
    )
    model = _Loaded(built, geometry, torch.device(device), swap_bandwidth, ahead)
    with _started(built, geometry):
        if not kv_blocks:
            if not kv_memory and model.device.type == "cuda":
                kv_memory = model.free_memory(capacity, device_memory)
            blocks = _blocks(geometry, kv_memory or _KV_MEMORY, max_batch_sequences, context)
            capacity = replace(capacity, blocks=blocks)
        return model.executor(capacity, share)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model, over which executors with pools of different sizes are made."""

    built: Built
    geometry: KvGeometry
    device: torch.device
    swap_bandwidth: float
    ahead: bool

    def executor(self, capacity: Capacity, share: Share | None) -> TorchExecutor:
        """One over a new pool; if the model has ranks, in the place of the last one."""
        if self.built.ranks > 1:
            return self._over_ranks(capacity, share)
        on_cpu, size = self.device.type == "cpu", capacity.blocks * self.geometry.block_bytes
        buffer = share(size).buffer if share and on_cpu else None
        pool = KvPool(self.geometry, capacity.blocks, device=self.device, buffer=buffer)
        if not self.built.fused:
            return self._plain(TorchExecutor, pool, capacity)
        from engine.gpu.executor import GpuExecutor
        from engine.gpu.model import GpuLlama

        assert isinstance(self.built.model, GpuLlama)
        return GpuExecutor(
            self.built.model,
            pool,
            capacity,
            weight_dtype=self.built.weight_dtype,
            swap_bandwidth=self.swap_bandwidth,
            ahead=self.ahead,
        )

    def free_memory(self, capacity: Capacity, share: float) -> int:
        """Bytes of a GPU, or of those of all ranks, that are left for KV, by a trial with a pool
        for one full pass; 0 if that is not known."""
        least = max(capacity.blocks_for(capacity.max_tokens), capacity.max_sequences)
        capacity = replace(capacity, blocks=least, host_blocks=0)
        if self.built.ranks > 1:
            from engine.parallel.load import room_for_blocks

            model = _parallel(self.built.model)
            blocks = room_for_blocks(model, lambda: self.executor(capacity, None), share)
            return blocks * self.geometry.block_bytes
        if not self.built.fused:
            return 0
        from engine.gpu.memory import room_for_kv

        def trial() -> int:
            executor = self.executor(capacity, None)
            executor.warm_up()
            executor.close()
            return executor.pool.blocks * executor.pool.block_bytes

        return room_for_kv(trial, self.device, share)

    def _over_ranks(self, capacity: Capacity, share: Share | None) -> TorchExecutor:
        from engine.parallel.executor import ParallelExecutor
        from engine.parallel.store import Room

        model, weights = _parallel(self.built.model), self.built.weight_dtype
        memory = (share or OwnMemory)(capacity.blocks * self.geometry.block_bytes)
        model.open(memory, Room(capacity, self.swap_bandwidth))
        pool = KvPool(self.geometry, capacity.blocks, buffer=memory.buffer)
        if model.lockstep:
            from engine.parallel.leading import LeadingExecutor

            return LeadingExecutor(model, pool, capacity, weight_dtype=weights, ahead=self.ahead)
        return self._plain(ParallelExecutor, pool, capacity)

    def _plain(
        self, make: Callable[..., TorchExecutor], pool: KvPool, capacity: Capacity
    ) -> TorchExecutor:
        """One whose tokens `built.choice` takes."""
        return make(
            self.built.model,
            pool,
            capacity,
            Threads(self.built.torch_threads),
            weight_dtype=self.built.weight_dtype,
            choice=self.built.choice,
            swap_bandwidth=self.swap_bandwidth,
        )


def executor_from(config: WorkerConfig, share: Share | None = None) -> TorchExecutor:
    """`load_executor` as a worker's configuration asks for, warmed up; the demo model if it names
    none."""
    decode = config if isinstance(config, DecodeConfig) else None
    started = time.perf_counter()
    executor = load_executor(
        config.model or demo_model.path(),
        dtype=config.dtype,
        device=config.device,
        block_size=config.block_size,
        kv_blocks=config.kv_blocks,
        kv_memory=config.kv_memory,
        device_memory=config.device_memory,
        host_kv_memory=decode.host_kv_memory if decode else 0,
        swap_bandwidth=decode.swap_bandwidth if decode else 0.0,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_sequences=config.max_batch_sequences,
        max_context=config.max_context,
        attention_backend=config.attention_backend,
        quantization=config.quantization,
        kv_dtype=config.kv_dtype,
        instruction_set=config.instruction_set,
        threads=config.threads,
        ahead=decode is not None,
        tensor_parallel=config.tensor_parallel,
        pipeline_parallel=config.pipeline_parallel,
        share=share,
    )
    loaded = time.perf_counter()
    executor.warm_up()
    warm = time.perf_counter()
    _logger.info("loaded in %.1f s, warmed up in %.1f s", loaded - started, warm - loaded)
    return executor


def reuses_prefixes(config: WorkerConfig, capacity: Capacity) -> bool:
    """Whether a worker may reuse the KV of a prefix: it is configured to, and the model's KV of a
    token depends on nothing that comes later."""
    if config.prefix_cache and capacity.max_context > safe_context(
        read_config(config.model or demo_model.path())
    ):
        _logger.warning("no prefix cache: KV of this model depends on the length of the prompt")
        return False
    return config.prefix_cache


@contextmanager
def _started(built: Built, geometry: KvGeometry) -> Iterator[None]:
    """Start the ranks, if there are any, and end them if what follows fails."""
    if built.ranks == 1:
        yield
        return
    model = _parallel(built.model)
    model.start(geometry)
    try:
        yield
    except BaseException:
        model.close()
        raise


def _parallel(model: PagedModel) -> ParallelModel:
    from engine.parallel.model import ParallelModel

    assert isinstance(model, ParallelModel)
    return model


def _require(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise ConfigError(f"--device {device}: not to be had here: {error}") from error


def _geometry(path: Path, built: Built, options: ModelOptions) -> KvGeometry:
    return KvGeometry.of(
        model_fingerprint=fingerprint(path, options.quantization),
        layers=built.model.layers,
        kv_heads=built.model.kv_heads,
        head_dim=built.model.head_dim,
        dtype=built.kv_dtype,
        block_size=options.block_size,
    )


def _context(model: PagedModel, max_context: int) -> int:
    if max_context > model.max_context:
        raise ConfigError(
            f"--max-context {max_context}: the model's limit is {model.max_context} tokens"
        )
    return max_context or model.max_context


def _blocks(geometry: KvGeometry, kv_memory: int, sequences: int, context: int) -> int:
    """Blocks that fit into `kv_memory` and could ever be used at once."""
    fit = kv_memory // geometry.block_bytes
    if fit < 1:
        raise ConfigError(f"--kv-memory {kv_memory}: one block takes {geometry.block_bytes} bytes")
    return min(fit, sequences * -(-context // geometry.block_size))
