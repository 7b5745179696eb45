from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml

from baton.config import DecodeConfig, GatewayConfig, PrefillConfig
from scheduling.simulator.profiles import Profile, profile

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "helm" / "baton" / "values.schema.json").read_text())


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A profile of a slow device, as `baton bench engine --profile` writes one."""
    path = tmp_path / "slow.json"
    Profile(
        "slow", 0.01, 2e-4, 0.0, 1e-4, 0.0, block_bytes=1000, blocks=2000, max_context=512
    ).save(path)
    return path


def plan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`baton plan`, small."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", "plan", "--requests", "200", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "120"},
    )


def test_the_values_are_what_the_chart_and_the_processes_accept(tmp_path: Path, slow: Path) -> None:
    values = tmp_path / "values.yaml"
    result = plan(
        *("--profile", slow, "--rate", "60", "--lengths", "60/20", "--policy", "skip-join-mlfq"),
        *("--ttft", "0.3", "--tpot", "0.05", "--max-workers", "8", "--values", values),
    )
    assert result.returncode == 0, result.stderr
    assert "What binds" in result.stdout
    content = yaml.safe_load(values.read_text())
    jsonschema.validate(content, SCHEMA)
    assert content["decode"]["replicas"] >= 1
    assert content["decode"]["config"]["mlfq_quantum"] > 0
    GatewayConfig(**content["gateway"]["config"])
    DecodeConfig(**content["decode"]["config"])
    PrefillConfig(**content["prefill"].get("config", {}))


def test_a_gpu_is_asked_for_with_memory_for_the_weights(tmp_path: Path) -> None:
    from launcher.chart_values import worker_values
    from scheduling.mlfq import Mlfq
    from scheduling.simulator.outcome import Outcome
    from scheduling.simulator.sizing import Layout, Trial, Tuning

    trial = Trial(
        Layout(0, 2), Tuning(512, 64, Mlfq()), Outcome((), 0.0, 0, 0.0), {"TTFT": 0.5}, stable=True
    )
    workers = worker_values(2, profile("h200-llama-3-8b"), trial, {"policy": "fcfs"})
    assert workers["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "23Gi"}
    assert workers["config"]["device"] == "cuda"
    assert "kv_dtype" not in workers["config"]
    jsonschema.validate({"decode": workers}, SCHEMA)
    device = profile("h200-llama-3-8b")
    kv = device.blocks * device.block_bytes / 2**30
    prefill = worker_values(2, device, trial, {"policy": "fcfs"}, publishes=True)
    more = int(prefill["resources"]["limits"]["memory"].removesuffix("Gi")) - 23
    assert kv - 1 < more < kv + 1
    narrow = replace(device, kv_dtype="int8")
    workers = worker_values(2, narrow, trial, {"policy": "fcfs"})
    assert workers["config"]["kv_dtype"] == "int8"
    jsonschema.validate({"decode": workers}, SCHEMA)


def test_nothing_that_does_is_exit_code_1_and_says_why(slow: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    result = plan(
        *("--profile", slow, "--rate", "5", "--lengths", "60/20", "--ttft", "0.001"),
        *("--values", values),
    )
    assert result.returncode == 1
    assert "even one request at a time misses the TTFT limit" in result.stdout
    assert not values.exists()


def test_a_trace_is_read_and_stretched(tmp_path: Path, slow: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 400 * i, "input_length": 50 + i % 7, "output_length": 5 + i % 3}
        for i in range(300)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = ("--profile", slow, "--trace", trace, "--ttft", "0.5", "--policy", "fcfs")
    assert "0 prefill + 1 decode" in plan(*shared).stdout
    assert "0 prefill + 1 decode" not in plan(*shared, "--rate", "300").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "1"), "--ttft"),
        (("--ttft", "1"), "--rate"),
        (("--ttft", "1", "--rate", "1", "--gpu", "b9"), "--gpu b9"),
        (("--ttft", "1", "--rate", "1", "--model", "nothing"), "--model nothing"),
        (("--ttft", "1", "--rate", "1", "--lengths", "many"), "--lengths many"),
        (("--ttft", "1", "--rate", "1", "--lengths", "9000/100"), "context"),
        (("--ttft", "1", "--rate", "1", "--profile", "nothing"), "unknown profile"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    result = plan(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
