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
