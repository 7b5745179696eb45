"""The Node client, installed from its lock file, against a live cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster import Served

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "clients" / "node"
INSTALLED = ROOT / ".tools" / "node"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="session")
def node() -> Path:
    """A copy of the client with its packages, kept in .tools/ until the lock file changes."""
    npm = shutil.which("npm")
    assert npm is not None, "node and npm are needed to test the Node client"
    lock = (CLIENT / "package-lock.json").read_bytes()
    client = INSTALLED / "clients" / "node"
    if not client.exists() or (client / "package-lock.json").read_bytes() != lock:
        shutil.rmtree(INSTALLED, ignore_errors=True)
        client.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(CLIENT / name, client)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            subprocess.run(command, cwd=client, check=True, capture_output=True, timeout=200)
        except BaseException:
            shutil.rmtree(INSTALLED)
            raise
    shutil.copy(CLIENT / "generate.mjs", client)
    shutil.copytree(ROOT / "protos", INSTALLED / "protos", dirs_exist_ok=True)
    return client


def run(node: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["node", str(node / "generate.mjs"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_it_streams_an_answer(node: Path, cluster: Served):
    result = run(node, "What does len do?", "--address", cluster.address, "--seed=11")
    assert result.returncode == 0, result.stderr
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["accepted", *["delta"] * (len(kinds) - 3), "finished", "usage"]
    assert len({event["request_id"] for event in events}) == 1
    deltas = [event["delta"] for event in events[1:-2]]
    assert "".join(delta.get("text", "") for delta in deltas).strip()
    finished, usage = events[-2]["finished"], events[-1]["usage"]
    assert finished["reason"] in ("FINISH_REASON_STOP", "FINISH_REASON_LENGTH")
    assert finished["seed"] == "11"
    assert sum(delta["token_count"] for delta in deltas) == usage["completion_tokens"]


def test_options_reach_the_server(node: Path, cluster: Served):
    address = f"--address={cluster.address}"
    result = run(node, "itertools.chain", "--plain", "--max-tokens=3", "--temperature=0", address)
    finished = json.loads(result.stdout.splitlines()[-2])["finished"]
    assert (finished["reason"], finished["completion_tokens"]) == ("FINISH_REASON_LENGTH", 3)


def test_an_error_is_one_line_of_json(node: Path, cluster: Served):
    result = run(node, "x", "--temperature=-1", "--address", cluster.address)
    assert (result.returncode, result.stdout) == (1, "")
    error = json.loads(result.stderr)
    assert error["status"] == "INVALID_ARGUMENT"
    assert "sampling.temperature" in error["message"]


def test_without_a_text_it_says_how_to_use_it(node: Path):
    result = run(node)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


def test_the_lock_file_pins_every_package_by_digest_and_names_no_registry():
    lock = json.loads((CLIENT / "package-lock.json").read_text())
    installed = {name: entry for name, entry in lock["packages"].items() if name}
    assert installed
    for name, entry in installed.items():
        assert entry["integrity"].startswith("sha512-"), name
        assert "resolved" not in entry
    wanted = json.loads((CLIENT / "package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
