"""Collectives among some ranks: gloo between processors, NCCL between GPUs.

Groups are made without torch.distributed's default group, which a process has only one of: a worker
may hold several engines, as tests do. Nothing listens beyond loopback.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store


class Rendezvous:
    """Where the ranks of one worker find each other: a file that all of them know."""

    def __init__(self, file: Path, ranks: int, device: torch.device, seconds: float) -> None:
        """`seconds`: longest wait in a collective, for ranks that are late or gone."""
        self._store = FileStore(str(file), ranks)
        self._device = device
        self._timeout = timedelta(seconds=seconds)
        self._store.set_timeout(self._timeout)

    def group(self, name: str, rank: int, size: int) -> Group:
        """The group called `name`, of which this process is number `rank`. All `size` of them have
        to call this."""
        store = PrefixStore(name, self._store)
        if self._device.type == "cuda":
            return Group(self._nccl(store, rank, size), rank, size)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = self._timeout
        return Group(gloo(store, rank, size, options), rank, size)

    def _nccl(self, store: Store, rank: int, size: int) -> Any:
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = self._timeout
        group = nccl(store, rank, size, options)
        group.eager_connect_single_device(self._device)  # not while a graph is recorded
        return group


class Group:
    """Some ranks. Calls must come in the same order on all of them. On CPUs they return when they
    are over, and a rank that is gone makes them raise RuntimeError, at the latest when the time is
    up; on GPUs they are work of the current stream, which waits for such a rank until `abort`."""

    def __init__(self, backend: Any, rank: int, size: int) -> None:
        """`backend`: a ProcessGroupGloo or ProcessGroupNCCL."""
        self._backend = backend
        self.rank, self.size = rank, size

    def abort(self) -> None:
        """Let what waits for other ranks end, on a GPU too; what it gives then means nothing."""
        self._backend.abort()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everybody's contiguous `x`, bit for bit the same on all ranks. In place."""
        return self._run(self._backend.allreduce, x, dist.AllreduceOptions())

    def broadcast(self, x: Tensor) -> Tensor:
        """What number 0 has in `x`, on all ranks. In place."""
        return self._run(self._backend.broadcast, x, dist.BroadcastOptions())

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Everybody's `x`, which have one shape, on number 0; None on the others."""
        outputs = [[torch.empty_like(x) for _ in range(self.size)]] if self.rank == 0 else []
        self._run(partial(self._backend.gather, outputs), x, dist.GatherOptions())
        return outputs[0] if outputs else None

    def send(self, x: Tensor, to: int) -> dist.Work:
        """Begin to send; `x` must stay as it is until the work was waited for."""
        work: dist.Work = self._backend.send([x], to, 0)
        return work

    def receive(self, x: Tensor, sender: int) -> Tensor:
        """Fill `x` with what number `sender` sends next."""
        self._backend.recv([x], sender, 0).wait()
        return x

    def _run(self, operation: Callable[..., dist.Work | None], x: Tensor, options: Any) -> Tensor:
        """With number 0 as the root, if there is one: torch's default."""
        options.asyncOp = False  # on NCCL's own stream, two events would be waited for
        work = operation([x], options)
        if work is not None:  # NCCL gives none
            work.wait()
        return x
