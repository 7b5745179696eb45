"""Every process reads flags, then BATON_*, then its YAML file, then defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import rich_click as click
import yaml
from click.testing import CliRunner

from baton.config import (
    DecodeConfig,
    GatewayConfig,
    PrefillConfig,
    ProcessConfig,
    ServeConfig,
    environment_names,
)
from baton.errors import ConfigError
from launcher.options import config_options, flag, read_config

KINDS = [GatewayConfig, PrefillConfig, DecodeConfig, ServeConfig]
SHARES = ("swap_reserve", "length_quantile", "decode_ahead", "device_memory")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        for name in [*environment_names(kind).values(), "BATON_CONFIG"]:
            monkeypatch.delenv(name, raising=False)


def read(kind: type[ProcessConfig], *arguments: str) -> Any:
    """The configuration that a command with these arguments gets."""
    seen: list[ProcessConfig] = []

    @click.command()
    @config_options(kind)
    def command(**options: Any) -> None:
        seen.append(read_config(kind, options))

    result = CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)
    assert result.exit_code == 0
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryProcess:
    def test_nothing_given_is_the_defaults(self, kind: type[ProcessConfig]):
        assert read(kind) == kind()
        assert not read(kind).model_fields_set

    def test_flag_beats_environment_beats_file_beats_default(
        self, kind: type[ProcessConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        file = tmp_path / "baton.yaml"
        file.write_text(
            yaml.safe_dump({"pool": "file", "drain_seconds": 1.5, "report_interval": 0.25})
        )
        monkeypatch.setenv("BATON_POOL", "environment")
        monkeypatch.setenv("BATON_DRAIN_SECONDS", "2.5")
        config = read(kind, "--config", str(file), "--pool", "flag")
        assert config.pool == "flag"
        assert config.drain_seconds == 2.5
        assert config.report_interval == 0.25
        assert config.log_level == "info"

    def test_the_file_may_be_named_by_the_environment(
        self, kind: type[ProcessConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        file = tmp_path / "baton.yaml"
        file.write_text("pool: file\n")
        monkeypatch.setenv("BATON_CONFIG", str(file))
        assert read(kind).pool == "file"

    def test_every_field_can_be_set_by_its_flag(self, kind: type[ProcessConfig]):
        for name, field in kind.model_fields.items():
            default = field.get_default()
            match default:
                case bool():
                    arguments, value = [flag(name)], True
                case _ if name in SHARES:
                    arguments, value = [flag(name), "0.5"], 0.5
                case int() | float():
                    arguments, value = [flag(name), str(default + 1)], default + 1
                case _ if get_origin(field.annotation) is Literal:
                    choice = next(c for c in get_args(field.annotation) if c != default)
                    arguments, value = [flag(name), choice], choice
                case _:
                    arguments, value = [flag(name), "10.0.0.1:7"], "10.0.0.1:7"
            config = read(kind, *arguments)
            got = getattr(config, name)
            got = got.get_secret_value() if hasattr(got, "get_secret_value") else got
            assert (str(got) if isinstance(got, Path) else got) == value, name
            assert config.model_fields_set == {name}

    def test_an_unknown_key_of_the_file_is_named(self, kind: type[ProcessConfig], tmp_path: Path):
        file = tmp_path / "baton.yaml"
        file.write_text("pool: a\nkv_blokcs: 7\n")
        with pytest.raises(ConfigError, match="--kv-blokcs"):
            read(kind, "--config", str(file))

    def test_a_file_that_is_not_there_is_named(self, kind: type[ProcessConfig], tmp_path: Path):
        with pytest.raises(ConfigError, match=r"none\.yaml"):
            read(kind, "--config", str(tmp_path / "none.yaml"))

    def test_a_value_out_of_range_is_named(self, kind: type[ProcessConfig]):
        with pytest.raises(ConfigError, match="--drain-seconds"):
            read(kind, "--drain-seconds=-1")

    def test_the_secret_is_masked_when_shown(self, kind: type[ProcessConfig]):
        config = read(kind, "--redis-url", "redis://:hunter2@host:6379/0")
        assert config.redis_url.get_secret_value() == "redis://:hunter2@host:6379/0"
        assert "hunter2" not in f"{config.shown()} {config} {config!r}"


def test_a_switch_can_be_turned_off_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BATON_INSECURE_NETWORK", "true")
    assert read(GatewayConfig).insecure_network
    assert not read(GatewayConfig, "--no-insecure-network").insecure_network
