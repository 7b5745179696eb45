"""`baton serve` and `baton demo` with real processes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster import Served, gone, redis_directory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_ready_cluster_answers(cluster: Served):
    assert cluster.ready_line.endswith(" model=demo prefill=1 decode=1\n")
    assert set(cluster.processes()) == {"gateway", "prefill", "decode", "redis"}
    result = baton("generate", "What does len do?", "--address", cluster.address)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.split()) > 2


def test_events_come_in_order_through_prefill_and_decode_workers(cluster: Served):
    arguments = ("--json", "--address", cluster.address, "--max-tokens=20", "--seed=5")
    result = baton("generate", "Explain os.path.join in detail.", *arguments)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [key for event in events for key in event if key != "request_id"]
    assert kinds == ["accepted", *["delta"] * (len(kinds) - 3), "finished", "usage"]
    finished = next(event["finished"] for event in events if "finished" in event)
    assert sum(e["delta"]["token_count"] for e in events if "delta" in e) == 20
    assert (finished["completion_tokens"], finished["seed"]) == (20, "5")
    assert finished["timing"]["kv_transfer"] != "0s"


def test_a_bad_request_is_refused_and_the_next_one_served(cluster: Served):
    bad = baton("generate", "Hello", "--temperature=-1", "--address", cluster.address)
    assert bad.returncode == 1
    assert bad.stderr.startswith("baton: INVALID_ARGUMENT: sampling.temperature: ")
    assert len(bad.stderr.splitlines()) == 1
    good = baton("generate", "Hello", "--max-tokens=3", "--address", cluster.address)
    assert good.returncode == 0


def test_every_process_reports_its_health(cluster: Served):
    addresses = [cluster.address] + [
        next(word for word in process.cmdline() if word.startswith("--address=")).split("=")[1]
        for role, process in cluster.processes().items()
        if role in ("prefill", "decode")
    ]
    for address in addresses:
        assert baton("health", "--address", address).stdout == "SERVING\n"
    nobody = baton("health", "--address=127.0.0.1:1", "--timeout=0.5")
    assert (nobody.returncode, nobody.stderr) == (1, "baton: 127.0.0.1:1 does not serve\n")


def test_a_second_cluster_cannot_take_the_same_port(cluster: Served):
    result = baton("serve", "--address", cluster.address, "--prefill-workers=0")
    assert result.returncode == 1
    assert "gateway ended at start (exit code 2)" in result.stderr
    assert f"--address {cluster.address}: cannot listen there" in result.stderr
    assert result.stdout == ""


def test_a_dead_worker_is_replaced_and_a_frozen_one_does_not_hold_up_the_end():
    served = Served("--drain-seconds=1")
    processes = served.processes()
    processes["prefill"].kill()
    served.wait_for_log("prefill-0 ended (SIGKILL): restart in 0.5 s")
    answer = baton("generate", "Hello", "--max-tokens=3", "--address", served.address)
    assert answer.returncode == 0, answer.stderr
    served.wait_for_log("prefill-0 ended")
    while (new := served.processes().get("prefill")) is None or new.pid == processes["prefill"].pid:
        time.sleep(0.05)

    processes |= served.processes()
    processes["decode"].suspend()
    started = time.monotonic()
    assert served.stop(signal.SIGTERM) == 0
    assert time.monotonic() - started < 20
    assert any("decode-0 did not stop in 5 s: killing it" in line for line in served.log)
    assert gone(processes)


def test_nothing_is_left_when_serve_itself_is_killed():
    served = Served("--prefill-workers=0")
    processes = served.processes()
    assert set(processes) == {"gateway", "decode", "redis"}
    directory = redis_directory(processes["redis"])
    served.stop(signal.SIGKILL)
    assert gone(processes)
    shutil.rmtree(directory)  # which nobody was left to do


def test_a_model_that_cannot_be_served_ends_it_with_the_reason(tmp_path: Path):
    result = baton("serve", "--address=127.0.0.1:0", "--model", str(tmp_path / "none"))
    assert result.returncode == 1
    assert "ended at start (exit code 2)" in result.stderr
    assert "Traceback" not in result.stderr
    assert "none" in result.stderr.splitlines()[-1]


def test_a_cluster_that_is_not_ready_in_time_says_what_is_missing():
    result = baton("serve", "--address=127.0.0.1:0", "--start-timeout=0.2")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("baton: not ready after 0.2 s (--start-timeout): still waiting for ")
    assert last.endswith("decode-0, gateway, prefill-0")


def test_a_signal_while_it_starts_stops_it():
    command = [sys.executable, "-m", "launcher", "serve", "--address=127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "gateway | " in line:
            break
    children = {str(c.pid): c for c in psutil.Process(process.pid).children(recursive=True)}
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert children
    assert gone(children)


def test_the_demo_answers_shows_its_figures_and_leaves_nothing():
    result = baton("demo")
    assert result.returncode == 0, result.stderr
    assert "9 requests at once" in result.stdout
    assert "output tokens/s" in result.stdout
    for number in range(1, 10):
        assert f"\n[{number}] " in result.stdout
    rows = [
        line.split()
        for line in result.stdout.splitlines()
        if line.strip().endswith((" stop", " length"))
    ]
    assert len(rows) == 9
    assert all(float(kv) > 0 for *_, kv, _, _, _ in rows), "the KV was handed over"
    pids = re.findall(r"(redis|gateway|prefill-0|decode-0)\s+(\d+)", result.stdout)
    assert len(pids) == 4
    assert not [name for name, pid in pids if psutil.pid_exists(int(pid))]
