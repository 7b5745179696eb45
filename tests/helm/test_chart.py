"""The chart through the real helm, the Kubernetes schemas and the configuration it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.config import DecodeConfig, GatewayConfig, PrefillConfig, ProcessConfig, load
from launcher.cli import baton
from tests.helm.conftest import (
    CHART,
    ROOT,
    Helm,
    Manifest,
    manifests,
    render,
    values_files,
)

KINDS: dict[str, type[ProcessConfig]] = {
    "gateway": GatewayConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}
KUBERNETES = ["1.30", "1.33", "1.36"]

by_values = pytest.mark.parametrize("values", values_files(), ids=lambda path: path.stem)


def pick(documents: list[Manifest], kind: str, ending: str) -> Manifest:
    """The one object of that kind whose name ends so."""
    (found,) = (
        document
        for document in documents
        if document["kind"] == kind and document["metadata"]["name"].endswith(ending)
    )
    return found


def container(documents: list[Manifest], role: str) -> dict[str, Any]:
    deployment = pick(documents, "Deployment", f"-{role}")
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


def test_lint_finds_nothing(helm: Helm):
    result = helm("lint", "--strict", CHART, *(f"--values={path}" for path in values_files()))
    assert result.returncode == 0, result.stdout + result.stderr


@by_values
def test_kubernetes_accepts_what_is_rendered(helm: Helm, values: Path, tmp_path: Path):
    file = tmp_path / "rendered.yaml"
    file.write_text(render(helm, "--values", values))
    validate = Path(sys.executable).with_name("kubernetes-validate")
    versions = [word for version in KUBERNETES for word in ("-k", version)]
    command = [str(validate), "--strict", *versions, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


@by_values
@pytest.mark.parametrize("role", KINDS)
def test_each_process_can_read_its_configuration(
    helm: Helm, values: Path, role: str, tmp_path: Path
):
    documents = manifests(render(helm, "--values", values))
    content = pick(documents, "ConfigMap", f"-{role}")["data"]["config.yaml"]
    file = tmp_path / "config.yaml"
    file.write_text(content)
    config = load(KINDS[role], {}, file)
    assert config.insecure_network
    asked = (yaml.safe_load(values.read_text()).get(role) or {}).get("config") or {}
    for name, value in asked.items():
        assert getattr(config, name) == value

    process = container(documents, role)
    assert process["args"] == [role, "--config", "/etc/baton/config.yaml"]
    ports = {port["name"]: port["containerPort"] for port in process["ports"]}
    assert getattr(config, "address", None) == f"0.0.0.0:{ports['grpc']}"
    assert config.metrics_address == f"0.0.0.0:{ports['metrics']}"
    fields = {f"BATON_{name.upper()}" for name in KINDS[role].model_fields}
    for variable in process["env"]:
        if variable["name"].startswith("BATON_"):
            assert variable["name"] in fields


def test_the_schema_knows_every_field_and_its_bounds():
    command = [sys.executable, str(ROOT / "tools" / "chart_schema.py"), "check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "setting",
    [
        "gateway.replicas=many",
        "decode.replicas=0",
        "noSuchKey=1",
        "gateway.config.no_such_field=1",
        "gateway.config.address=0.0.0.0:1",  # the chart's own business
        "gateway.config.length_salt=secret",  # it would lie in a ConfigMap
        "scheduling.policy=fastest",
        "scheduling.kv_blocks=5",
        "prefill.config.block_size=0",
        "prefill.config.dtype=float99",
        "decode.config.kv_blocks=some",
        "model.source=elsewhere",
        "image.digest=latest",
        "redis.mode=none",
    ],
)
def test_values_that_make_no_sense_are_refused(helm: Helm, setting: str):
    result = helm("template", "rel", CHART, "--set", setting)
    assert result.returncode != 0, "the schema is not enforced: is it in .helmignore?"
    assert setting.partition("=")[0].split(".")[-1] in result.stderr


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["model.source=pvc"], "model.claimName is needed"),
        (["model.source=hostPath"], "model.hostPath is needed"),
        (["model.source=image"], "model.path is needed"),
        (["redis.mode=external"], "redis.url or redis.existingSecret.name is needed"),
        (
            [
                "decode.config.device=cuda",
                "decode.config.tensor_parallel=4",
                "decode.resources.limits.nvidia\\.com/gpu=2",
            ],
            "4 ranks (tensor_parallel, pipeline_parallel) need as many nvidia.com/gpu",
        ),
    ],
)
def test_half_a_choice_is_refused(helm: Helm, settings: list[str], complaint: str):
    result = helm("template", "rel", CHART, *(f"--set={setting}" for setting in settings))
    assert result.returncode != 0
    assert complaint in result.stderr


@by_values
def test_pods_run_without_privileges(helm: Helm, values: Path):
    for document in manifests(render(helm, "--values", values)):
        if document["kind"] in ("Deployment", "StatefulSet"):
            pod = document["spec"]["template"]["spec"]
        elif document["kind"] == "Pod":
            pod = document["spec"]
        else:
            continue
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        for each in pod["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("role", KINDS)
def test_probes_ask_the_grpc_port_and_draining_has_its_time(helm: Helm, role: str):
    values = f'{role}={{"preStopSeconds": 7, "config": {{"drain_seconds": 42.5}}}}'
    documents = manifests(render(helm, "--set-json", values))
    process = container(documents, role)
    port = next(p["containerPort"] for p in process["ports"] if p["name"] == "grpc")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert process[probe]["grpc"] == {"port": port}
    assert process["lifecycle"]["preStop"]["sleep"]["seconds"] == 7
    pod = pick(documents, "Deployment", f"-{role}")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 7 + 42.5 + 10


def test_a_changed_configuration_restarts_the_pods_of_that_role_only(helm: Helm):
    def checksums(*arguments: str) -> dict[str, str]:
        documents = manifests(render(helm, *arguments))
        return {
            role: pick(documents, "Deployment", f"-{role}")["spec"]["template"]["metadata"][
                "annotations"
            ]["checksum/config"]
            for role in KINDS
        }

    before, after = checksums(), checksums("--set", "decode.config.max_batch_tokens=64")
    assert {role for role in KINDS if before[role] != after[role]} == {"decode"}


def test_what_all_must_agree_on_is_said_once_and_a_role_s_own_setting_wins(helm: Helm):
    shared = 'scheduling={"policy": "fcfs", "srpt_aging": 2, "mlfq_levels": 3}'
    own = 'decode={"config": {"srpt_aging": 0}}'
    documents = manifests(render(helm, "--set-json", shared, "--set-json", own))
    for role in KINDS:
        config = yaml.safe_load(pick(documents, "ConfigMap", f"-{role}")["data"]["config.yaml"])
        assert (config["policy"], config["mlfq_levels"]) == ("fcfs", 3)
        assert config["srpt_aging"] == (0 if role == "decode" else 2)


def test_what_is_learnt_about_lengths_is_kept_on_a_claim_and_salted_from_a_secret(helm: Helm):
    documents = manifests(render(helm, "--values", CHART / "ci" / "gpu-values.yaml"))
    config = yaml.safe_load(pick(documents, "ConfigMap", "-gateway")["data"]["config.yaml"])
    gateway = container(documents, "gateway")
    (mount,) = (m for m in gateway["volumeMounts"] if m["name"] == "lengths")
    assert not mount.get("readOnly")
    assert Path(config["length_state"]).parent == Path(mount["mountPath"])
    (salt,) = (v for v in gateway["env"] if v["name"] == "BATON_LENGTH_SALT")
    assert salt["valueFrom"]["secretKeyRef"] == {"name": "lengths", "key": "salt"}
    for role in ("prefill", "decode"):
        assert "lengths" not in {m["name"] for m in container(documents, role)["volumeMounts"]}
    plain = manifests(render(helm))
    assert "length_state" not in pick(plain, "ConfigMap", "-gateway")["data"]["config.yaml"]


def test_ranks_on_gpus_have_shared_memory_to_talk_through(helm: Helm):
    documents = manifests(render(helm, "--values", CHART / "ci" / "gpu-values.yaml"))
    mounts = {
        role: {m["mountPath"] for m in container(documents, role)["volumeMounts"]} for role in KINDS
    }
    assert [role for role in KINDS if "/dev/shm" in mounts[role]] == ["decode"]  # two ranks each


def test_the_redis_url_comes_from_a_secret_and_matches_the_server(helm: Helm):
    documents = manifests(render(helm, "--set", "redis.password=p@ss/word"))
    for role in KINDS:
        (url,) = (v for v in container(documents, role)["env"] if v["name"] == "BATON_REDIS_URL")
        reference = url["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "rel-baton-redis", "key": "url"}
    secret = pick(documents, "Secret", "-redis")["stringData"]
    assert secret["url"] == "redis://:p%40ss%2Fword@rel-baton-redis:6379/0"
    assert 'requirepass "p@ss/word"' in secret["valkey.conf"]
    assert "p@ss" not in str([d for d in documents if d["kind"] == "ConfigMap"])


def test_workers_are_reached_by_pod_address_and_get_the_cores_of_their_limit(helm: Helm):
    documents = manifests(render(helm))
    for role in ("prefill", "decode"):
        env = {v["name"]: v for v in container(documents, role)["env"]}
        assert env["BATON_ADVERTISE_ADDRESS"]["value"].startswith("$(POD_IP):")
        assert env["BATON_THREADS"]["valueFrom"]["resourceFieldRef"] == {"resource": "limits.cpu"}
    documents = manifests(render(helm, "--set", "decode.config.threads=3"))
    names = {v["name"] for v in container(documents, "decode")["env"]}
    assert "BATON_THREADS" not in names  # it would win over the file


def test_only_the_chart_s_own_pods_reach_workers_and_redis(helm: Helm):
    documents = manifests(render(helm))
    own = {"app.kubernetes.io/name": "baton", "app.kubernetes.io/instance": "rel"}
    for name, ports in (("prefill", {50061, 50062}), ("decode", {50071}), ("redis", {6379})):
        policy = pick(documents, "NetworkPolicy", f"-{name}")["spec"]
        for rule in policy["ingress"]:
            if {port["port"] for port in rule["ports"]} & ports:
                assert rule["from"] == [{"podSelector": {"matchLabels": own}}]
    assert not [
        d
        for d in manifests(render(helm, "--set", "networkPolicy.enabled=false"))
        if d["kind"] == "NetworkPolicy"
    ]


def test_a_model_directory_is_mounted_read_only_and_named(helm: Helm):
    documents = manifests(render(helm, "--values", CHART / "ci" / "gpu-values.yaml"))
    for role in KINDS:
        config = yaml.safe_load(pick(documents, "ConfigMap", f"-{role}")["data"]["config.yaml"])
        assert config["model"] == "/models/llama-3.2-1b"
        mounts = {m["name"]: m for m in container(documents, role)["volumeMounts"]}
        assert mounts["model"] == {"name": "model", "mountPath": "/models", "readOnly": True}


def test_the_test_hook_asks_the_gateway_for_its_health(helm: Helm):
    (pod,) = (d for d in manifests(render(helm)) if d["kind"] == "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    arguments = pod["spec"]["containers"][0]["args"]
    assert arguments == ["health", "--address=rel-baton-gateway:50051", "--timeout=60"]


@by_values
def test_the_command_line_of_every_pod_is_one_that_baton_takes(helm: Helm, values: Path):
    documents = manifests(render(helm, "--values", values))
    hook = pick(documents, "Pod", "-test-grpc-health")["spec"]["containers"][0]
    for process in (*(container(documents, role) for role in KINDS), hook):
        subcommand, *arguments = process["args"]
        baton.commands[subcommand].make_context(subcommand, arguments).close()
