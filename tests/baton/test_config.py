"""Flags, then environment, then file; secrets masked; mistakes named."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton import config
from baton.errors import ConfigError


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "decode.yaml"
    file.write_text("block_size: 8\ndtype: float16\nthreads: 3\n")
    monkeypatch.setenv("BATON_DTYPE", "bfloat16")
    monkeypatch.setenv("BATON_BLOCK_SIZE", "32")
    loaded = config.load(config.DecodeConfig, {"block_size": 64}, file)
    assert (loaded.block_size, loaded.dtype, loaded.threads) == (64, "bfloat16", 3)
    assert loaded.max_batch_tokens == 512


def test_secrets_are_masked_where_the_configuration_is_shown() -> None:
    loaded = config.load(config.GatewayConfig, {"redis_url": "redis://u:hunter2@h:1/0"})
    assert "hunter2" not in repr(loaded)
    assert "hunter2" not in str(loaded.shown())
    assert loaded.redis_url.get_secret_value() == "redis://u:hunter2@h:1/0"


def test_a_configuration_cannot_be_changed() -> None:
    loaded = config.load(config.PrefillConfig, {})
    with pytest.raises(ValueError, match="frozen"):
        loaded.block_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("blok_size: 8", "--blok-size"),
        ("block_size: 0", "--block-size"),
        ("- 1", "mapping"),
        ("a: [", "configuration file"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=named):
        config.load(config.DecodeConfig, {}, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        config.load(config.DecodeConfig, {}, tmp_path / "nothing.yaml")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x"])
def test_loopback_needs_no_permission(address: str) -> None:
    config.require_loopback(address, insecure_network=False)


def test_other_addresses_in_the_clear_are_refused_unless_allowed() -> None:
    with pytest.raises(ConfigError, match="--insecure-network"):
        config.require_loopback("0.0.0.0:50051", insecure_network=False)
    config.require_loopback("0.0.0.0:50051", insecure_network=True)


@pytest.mark.parametrize("address", ["0.0.0.0:50061", "[::]:50061", ":50061"])
def test_a_wildcard_is_no_address_to_tell_others(address: str) -> None:
    with pytest.raises(ConfigError, match="--advertise-address"):
        config.require_reachable(address, "--advertise-address")
    assert config.require_reachable("10.0.0.7:50061", "--x") == "10.0.0.7:50061"
