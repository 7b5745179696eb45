"""Which processes make a local cluster, and what each is told."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from baton.config import DecodeConfig, GatewayConfig, PrefillConfig, ProcessConfig, ServeConfig
from baton.errors import ConfigError
from baton.shared_cores import Place
from launcher.cli import baton
from launcher.options import read_config
from launcher.plan import addresses_of, commands, free_ports
from launcher.supervisor import Command

SECRET = "redis://:hunter2@host:6379/3"


def config_of(command: Command, kind: type[ProcessConfig], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the process makes of its command line and environment."""
    subcommand, *arguments = command.argv[3:]
    with monkeypatch.context() as patch:
        for name, value in command.env.items():
            if name.startswith("BATON_"):
                patch.setenv(name, value)
        with baton.commands[subcommand].make_context(subcommand, list(arguments)) as context:
            return read_config(kind, context.params)


def planned(config: ServeConfig) -> dict[str, Command]:
    return {c.name: c for c in commands(config, addresses_of(config), SECRET)}


def test_each_process_gets_what_serve_was_told(monkeypatch: pytest.MonkeyPatch):
    config = ServeConfig(
        pool="p",
        prefill_workers=2,
        decode_workers=1,
        dtype="float32",
        kv_blocks=99,
        address="127.0.0.1:5555",
        drain_seconds=3,
        redis_url=SecretStr(SECRET),
    )
    plan = planned(config)
    assert list(plan) == ["gateway", "prefill-0", "prefill-1", "decode-0"]
    gateway = config_of(plan["gateway"], GatewayConfig, monkeypatch)
    workers = [
        config_of(plan["prefill-0"], PrefillConfig, monkeypatch),
        config_of(plan["prefill-1"], PrefillConfig, monkeypatch),
        config_of(plan["decode-0"], DecodeConfig, monkeypatch),
    ]
    assert gateway.address == "127.0.0.1:5555"
    for one in (gateway, *workers):
        assert one.pool == "p"
        assert one.drain_seconds == 3
        assert one.redis_url.get_secret_value() == SECRET
    for worker in workers:
        assert (worker.dtype, worker.kv_blocks) == ("float32", 99)
        assert worker.address == worker.advertise_address
    assert len({one.address for one in (gateway, *workers)}) == 4
    assert len({worker.worker_id for worker in workers}) == 3


def test_secrets_are_not_on_the_command_line():
    for command in planned(ServeConfig()).values():
        assert "hunter2" not in " ".join(command.argv)


def test_the_configuration_file_of_serve_is_not_read_by_its_children(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("BATON_CONFIG", "serve.yaml")
    assert all("BATON_CONFIG" not in c.env for c in planned(ServeConfig()).values())


def test_worker_settings_that_serve_does_not_name_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("BATON_KV_LEASE_SECONDS", "7")
    monkeypatch.setenv("BATON_WORKER_ID", "the same for all")
    plan = planned(ServeConfig())
    prefill = config_of(plan["prefill-0"], PrefillConfig, monkeypatch)
    assert prefill.kv_lease_seconds == 7
    assert prefill.worker_id.startswith("prefill-0-")


def test_cores_are_shared_out_unless_threads_are_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("baton.cores.available", lambda: 8)
    shared = planned(ServeConfig(prefill_workers=1, decode_workers=3))
    assert config_of(shared["decode-0"], DecodeConfig, monkeypatch).threads == 2
    given = planned(ServeConfig(threads=5))
    assert config_of(given["prefill-0"], PrefillConfig, monkeypatch).threads == 5


def test_idle_cores_are_lent_on_request(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("baton.cores.available", lambda: 8)
    shared = planned(ServeConfig(prefill_workers=1, decode_workers=3, lend_cores=True))
    workers = [
        config_of(shared["prefill-0"], PrefillConfig, monkeypatch),
        config_of(shared["decode-0"], DecodeConfig, monkeypatch),
        config_of(shared["decode-2"], DecodeConfig, monkeypatch),
    ]
    places = [Place.parse(worker.shared_cores) for worker in workers]
    assert [(place.first, place.own, place.total) for place in places] == [
        (0, 2, 8),
        (2, 2, 8),
        (6, 2, 8),
    ]
    assert len({place.path for place in places}) == 1
    assert {worker.threads for worker in workers} == {8}
    given = planned(ServeConfig(threads=5, lend_cores=True))
    prefill = config_of(given["prefill-0"], PrefillConfig, monkeypatch)
    assert (prefill.threads, prefill.shared_cores) == (5, "")


def test_more_workers_than_cores_lend_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("baton.cores.available", lambda: 2)
    plan = planned(ServeConfig(prefill_workers=1, decode_workers=2, lend_cores=True))
    decode = config_of(plan["decode-1"], DecodeConfig, monkeypatch)
    assert (decode.threads, decode.shared_cores) == (1, "")


def test_one_worker_has_all_cores_to_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("baton.cores.available", lambda: 4)
    plan = planned(ServeConfig(prefill_workers=0, lend_cores=True))
    decode = config_of(plan["decode-0"], DecodeConfig, monkeypatch)
    assert (decode.threads, decode.shared_cores) == (4, "")


def test_each_process_has_its_own_metrics_port(monkeypatch: pytest.MonkeyPatch):
    plan = planned(ServeConfig(metrics_address="127.0.0.1:9100"))
    assert config_of(plan["gateway"], GatewayConfig, monkeypatch).metrics_address.endswith(":9100")
    assert config_of(plan["prefill-0"], PrefillConfig, monkeypatch).metrics_address.endswith(
        ":9101"
    )
    assert config_of(plan["decode-0"], DecodeConfig, monkeypatch).metrics_address.endswith(":9102")


def test_a_cluster_may_have_no_prefill_worker():
    assert list(planned(ServeConfig(prefill_workers=0))) == ["gateway", "decode-0"]


def test_port_zero_becomes_a_free_port():
    port = int(addresses_of(ServeConfig(address="127.0.0.1:0"))["gateway"].rpartition(":")[2])
    assert port > 0


def test_free_ports_are_distinct():
    assert len(set(free_ports(50))) == 50


def test_brackets_of_an_ipv6_address_are_kept():
    assert addresses_of(ServeConfig(address="[::1]:5555"))["gateway"] == "[::1]:5555"


@pytest.mark.parametrize("address", ["localhost:", ":80", "127.0.0.1:http", "127.0.0.1:70000"])
def test_an_address_without_a_port_is_refused(address: str):
    with pytest.raises(ConfigError, match=f"--address {address}"):
        addresses_of(ServeConfig(address=address))
    with pytest.raises(ConfigError, match=f"--metrics-address {address}"):
        planned(ServeConfig(metrics_address=address))


def devices_of(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[str, float]]:
    kinds = {"prefill": PrefillConfig, "decode": DecodeConfig}
    found = {}
    for name, command in planned(config).items():
        if kind := kinds.get(name.partition("-")[0]):
            worker = config_of(command, kind, monkeypatch)
            found[name] = worker.device, worker.device_memory
    return found


def test_workers_on_one_gpu_have_equal_parts_of_it(monkeypatch: pytest.MonkeyPatch):
    config = ServeConfig(prefill_workers=1, decode_workers=1, device="cuda", device_memory=0.8)
    assert devices_of(config, monkeypatch) == {
        "prefill-0": ("cuda", 0.4),
        "decode-0": ("cuda", 0.4),
    }


def test_gpus_are_given_out_in_turn_decode_workers_first(monkeypatch: pytest.MonkeyPatch):
    config = ServeConfig(prefill_workers=1, decode_workers=2, device="cuda:0, cuda:1")
    assert devices_of(config, monkeypatch) == {
        "decode-0": ("cuda:0", 0.45),
        "decode-1": ("cuda:1", 0.9),
        "prefill-0": ("cuda:0", 0.45),
    }


def test_a_worker_of_several_ranks_takes_the_gpus_that_follow(monkeypatch: pytest.MonkeyPatch):
    apart = ServeConfig(device="cuda:0,cuda:2", tensor_parallel=2)
    assert devices_of(apart, monkeypatch) == {
        "decode-0": ("cuda:0", 0.9),
        "prefill-0": ("cuda:2", 0.9),
    }
    overlapping = ServeConfig(device="cuda:0,cuda:1", tensor_parallel=2)
    assert {share for _, share in devices_of(overlapping, monkeypatch).values()} == {0.45}


def test_a_gpu_without_a_number_that_it_could_have_is_refused():
    with pytest.raises(ConfigError, match="cuda:first"):
        planned(ServeConfig(device="cuda:first"))


def test_a_gpu_without_a_number_and_the_first_one_are_the_same(monkeypatch: pytest.MonkeyPatch):
    shares = devices_of(ServeConfig(device="cuda,cuda:0"), monkeypatch).values()
    assert [share for _, share in shares] == [0.45, 0.45]
