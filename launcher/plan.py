"""Which processes make a cluster on this host, where they listen and what each is told.

Starts nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

from baton import cores
from baton.config import (
    DecodeConfig,
    GatewayConfig,
    PrefillConfig,
    ProcessConfig,
    ServeConfig,
    environment_names,
)
from baton.devices import device_of
from baton.errors import ConfigError
from baton.shared_cores import Place
from launcher.options import flag
from launcher.supervisor import Command

GATEWAY = "gateway"
SECRETS = {"redis_url"}  # passed in the environment: everybody can read a command line

_KINDS: dict[str, type[ProcessConfig]] = {
    "gateway": GatewayConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}


def addresses_of(config: ServeConfig) -> dict[str, str]:
    """Where each process listens; port 0 becomes a free one. The gateway comes first."""
    workers = [f"prefill-{i}" for i in range(config.prefill_workers)]
    workers += [f"decode-{i}" for i in range(config.decode_workers)]
    host, port = split_address(config.address, "--address")
    ports = free_ports(len(workers) + 1)
    addresses = {GATEWAY: f"{host}:{port or ports.pop()}"}
    return addresses | {name: f"127.0.0.1:{ports.pop()}" for name in workers}


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def commands(config: ServeConfig, addresses: dict[str, str], redis_url: str) -> list[Command]:
    """The command of each process: what `config` says, on the addresses given."""
    workers = config.prefill_workers + config.decode_workers
    available = cores.available()
    share = cores.share(available, workers)
    idle_use = config.lend_cores and config.threads == 0 and config.device == "cpu"
    ranks = config.tensor_parallel * config.pipeline_parallel
    lends = idle_use and ranks == 1 and 1 < workers <= available
    threads = config.threads or (available if lends else share)
    shared = config.model_dump() | {"redis_url": redis_url, "threads": threads}
    places = _devices(config, [name for name in addresses if name != GATEWAY])
    made = []
    for number, (name, address) in enumerate(addresses.items()):
        subcommand = name.partition("-")[0]
        kind = _KINDS[subcommand]
        settings = {key: shared[key] for key in kind.model_fields if key in shared}
        settings |= {
            "address": address,
            "metrics_address": _next_port(config.metrics_address, number),
        }
        if subcommand == GATEWAY:
            settings["gateway_id"] = f"{name}-{os.getpid()}"
        else:
            settings |= {"worker_id": f"{name}-{os.getpid()}", "advertise_address": address}
            settings["device"], settings["device_memory"] = places[name]
        if lends and subcommand != GATEWAY:
            place = Place(_cores_file(), (number - 1) * share, share, available)
            settings["shared_cores"] = str(place)
        if subcommand == "prefill":
            settings["kv_address"] = "127.0.0.1:0"
        made.append(_command(name, subcommand, kind, settings))
    return made


def _devices(config: ServeConfig, workers: list[str]) -> dict[str, tuple[str, float]]:
    """The device of each worker, and its share of the memory there: those on one GPU have equal
    parts of it. A worker of several ranks takes as many GPUs, from its device on."""
    devices = [device.strip() for device in config.device.split(",")]
    ranks = config.tensor_parallel * config.pipeline_parallel
    decode_first = sorted(workers, key=lambda name: not name.startswith("decode"))
    homes = {name: devices[i % len(devices)] for i, name in enumerate(decode_first)}
    used = {n: {device_of(device, rank) for rank in range(ranks)} for n, device in homes.items()}
    workers_on = Counter(gpu for gpus in used.values() for gpu in gpus)
    return {
        name: (device, config.device_memory / max(workers_on[gpu] for gpu in used[name]))
        for name, device in homes.items()
    }


def _cores_file() -> Path:
    """Of this cluster; empty, and left behind for the system to clear away."""
    return Path(tempfile.gettempdir()) / f"baton-{os.getuid()}-{os.getpid()}.cores"


def _command(
    name: str, subcommand: str, kind: type[ProcessConfig], settings: dict[str, object]
) -> Command:
    argv = [sys.executable, "-m", "launcher", subcommand]
    env = {key: value for key, value in os.environ.items() if key != "BATON_CONFIG"}
    variables = environment_names(kind)
    for key, value in settings.items():
        if key in SECRETS:
            env[variables[key]] = str(value)
        elif isinstance(value, bool):
            argv.append(flag(key) if value else f"--no-{flag(key)[2:]}")
        elif value is not None:
            argv.append(f"{flag(key)}={value}")
    return Command(name, tuple(argv), env)


def _next_port(address: str, step: int) -> str:
    """`address` with its port moved on by `step`: one metrics address serves all processes."""
    if not address:
        return ""
    host, port = split_address(address, "--metrics-address")
    return f"{host}:{port + step}"


def split_address(address: str, name: str) -> tuple[str, int]:
    """Host, brackets of IPv6 kept, and port. Raises ConfigError about the flag `name`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{name} {address}: must be host:port")
    return host, int(port)
