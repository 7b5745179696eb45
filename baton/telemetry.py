"""Logs and Prometheus metrics, set up the same way in every process.

Logs carry ids and counts, never prompt or output text.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import yaml
from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from baton.addresses import host_of
from baton.config import ProcessConfig
from baton.errors import ConfigError

# fmt: off
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    20, 40, 80, 160, 640, 2560,
)
TPOT_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1,
    2.5, 5, 10, 20, 40, 80,
)
LATENCY_BUCKETS = (
    0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480,
    960, 1920, 7680,
)
# fmt: on
STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def start(role: str, config: ProcessConfig) -> None:
    """Set up logging and say with which configuration this process runs, secrets masked."""
    logging.basicConfig(
        stream=sys.stderr,
        level=config.log_level.upper(),
        format=f"%(asctime)s {role} %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    shown = yaml.safe_dump(config.shown(), default_flow_style=True, sort_keys=False, width=10_000)
    logging.getLogger("baton").info("configuration %s", shown.strip())


class MetricsServer:
    """Serves a registry over HTTP at `address` ("host:port"; nothing if empty)."""

    def __init__(self, address: str, registry: CollectorRegistry = REGISTRY) -> None:
        """Start listening. Raises ConfigError when the address cannot be had."""
        self._server: Any = None
        if not address:
            return
        host, port = host_of(address), address.rpartition(":")[2]
        try:
            self._server, self._thread = start_http_server(int(port), host, registry)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--metrics-address {address}: {error}") from error

    @property
    def port(self) -> int | None:
        """The port it listens on, if it does."""
        return None if self._server is None else int(self._server.server_port)

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
