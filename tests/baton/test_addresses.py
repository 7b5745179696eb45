"""Addresses that need a permission, and those that are none to others."""

from __future__ import annotations

import pytest

from baton.addresses import require_loopback, require_reachable
from baton.errors import ConfigError


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x"])
def test_loopback_needs_no_permission(address: str) -> None:
    require_loopback(address, insecure_network=False)


def test_other_addresses_in_the_clear_are_refused_unless_allowed() -> None:
    with pytest.raises(ConfigError, match="--insecure-network"):
        require_loopback("0.0.0.0:50051", insecure_network=False)
    require_loopback("0.0.0.0:50051", insecure_network=True)


@pytest.mark.parametrize("address", ["0.0.0.0:50061", "[::]:50061", ":50061"])
def test_a_wildcard_is_no_address_to_tell_others(address: str) -> None:
    with pytest.raises(ConfigError, match="--advertise-address"):
        require_reachable(address, "--advertise-address")
    assert require_reachable("10.0.0.7:50061", "--x") == "10.0.0.7:50061"
