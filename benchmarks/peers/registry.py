"""The systems that can be compared, and how each is started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.installing import environment
from benchmarks.peers.process import Peer

_SYSTEMS = Path(__file__).parent / "systems"


@dataclass(frozen=True, slots=True)
class System:
    """One system under test. `environment` names its requirements; none runs in Baton's own."""

    name: str
    script: str
    environment: str = ""
    precisions: tuple[str, ...] = ("bf16", "int8")
    options: dict[str, Any] = field(default_factory=dict)
    freeze: bool = True  # it can be stopped by a signal and go on as if nothing had been

    def start(self, cache: Path, log: Path, threads: int) -> Peer:
        """Install it if need be and start its process. Raises PeerError."""
        python = environment(self.environment, cache) if self.environment else sys.executable
        return Peer(
            [python, _SYSTEMS / self.script],
            log,
            environment={"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            freeze=self.freeze,
        )


# Workers lose their place in Redis when they are frozen for longer than their time to live; idle,
# they take next to no processor time, which is measured.
MODES = {
    "in-process": (System("baton", "peer_baton.py"),),
    "grpc": (
        System("baton grpc", "peer_baton_grpc.py", freeze=False),
        System(
            "baton grpc, prefill apart",
            "peer_baton_grpc.py",
            options={"prefill_workers": 1},
            freeze=False,
        ),
    ),
}
PEERS = {
    system.name: system
    for system in (
        System("openvino", "peer_openvino.py", "openvino"),
        System("llama.cpp", "peer_llama_cpp.py", "llama.cpp"),
        System("vllm", "peer_vllm.py", "vllm", precisions=("bf16",)),
        System("transformers", "peer_transformers.py", precisions=("bf16",)),
    )
}
Start = Callable[[System], Peer]
