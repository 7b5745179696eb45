"""Addresses that processes listen on and are found by, each host:port."""

from __future__ import annotations

from baton.errors import ConfigError


def host_of(address: str) -> str:
    """The host part of host:port."""
    return address.rpartition(":")[0].strip("[]")


def require_loopback(address: str, *, insecure_network: bool) -> None:
    """Refuse to listen beyond this host in the clear unless told to.

    Raises ConfigError.
    """
    local = host_of(address) in ("127.0.0.1", "localhost", "::1") or address.startswith("unix:")
    if not local and not insecure_network:
        raise ConfigError(
            f"--address {address}: listening beyond loopback without TLS needs "
            "--insecure-network (do that only inside a private network)"
        )


def require_reachable(address: str, flag: str) -> str:
    """`address`, unless it is a wildcard, which nobody can connect to.

    Raises ConfigError naming `flag`, which is how to give a better one.
    """
    if host_of(address) in ("0.0.0.0", "::", ""):  # noqa: S104 # refused, not bound
        raise ConfigError(f"{flag}: others cannot reach {address}: name a host or an IP address")
    return address
