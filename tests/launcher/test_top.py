"""The status display against a gateway that plays a script, and against a real cluster."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console

from baton import rpc
from baton.errors import BatonError, QueueError
from baton.v1 import model_pb2, model_pb2_grpc
from baton.v1.model_pb2 import ClusterStatus, QueueLevel, WorkerStatus
from launcher.dashboard import age, dashboard, display_for, sparkline
from launcher.top import Lost, View, follow, run
from tests.cluster import Served

STATUS = ClusterStatus(
    levels=[
        QueueLevel(level=0),
        QueueLevel(
            level=1,
            waiting_requests=3,
            waiting_tokens=1200,
            oldest=Duration(seconds=2, nanos=500_000_000),
        ),
    ],
    workers=[
        WorkerStatus(
            id="decode-0",
            role=model_pb2.WORKER_ROLE_DECODE,
            running_sequences=7,
            waiting_sequences=2,
            free_kv_blocks=25,
            total_kv_blocks=100,
            steps_per_second=31.25,
        ),
        WorkerStatus(
            id="prefill-0",
            role=model_pb2.WORKER_ROLE_PREFILL,
            free_kv_blocks=100,
            total_kv_blocks=100,
            draining=True,
        ),
    ],
    running_requests=9,
    output_tokens_per_second=123.45,
)


class Scripted(model_pb2_grpc.AdminServiceServicer):
    """Says STATUS, or fails."""

    def __init__(self) -> None:
        self.intervals: list[Duration] = []
        self.errors: list[Exception] = []  # of the next streams, after a snapshot each
        self.hangs = False  # after a snapshot

    async def GetStatus(self, request: Any, context: Any) -> model_pb2.GetStatusResponse:
        if self.errors:
            raise self.errors.pop()
        return model_pb2.GetStatusResponse(status=STATUS)

    async def WatchStatus(
        self, request: model_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[model_pb2.WatchStatusResponse]:
        self.intervals.append(request.interval)
        yield model_pb2.WatchStatusResponse(status=STATUS)
        if self.errors:
            raise self.errors.pop()
        if self.hangs:
            await asyncio.Event().wait()
        yield model_pb2.WatchStatusResponse(status=STATUS)


async def serve(script: Scripted, address: str = "127.0.0.1:0") -> rpc.Server:
    server = rpc.Server(address)
    model_pb2_grpc.add_AdminServiceServicer_to_server(script, server.grpc)
    await server.start([])
    return server


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
async def address(script: Scripted) -> AsyncIterator[str]:
    server = await serve(script)
    yield server.address
    await server.stop(0)


def drawn(status: ClusterStatus, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(dashboard(status, "127.0.0.1:50051", width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(("width", "bar"), [(80, "██████░░"), (120, "█" * 18 + "░" * 6)])
def test_everything_is_shown_at_common_widths(width: int, bar: str):
    lines = drawn(STATUS, width)
    summary = "127.0.0.1:50051 3 waiting 9 running 123.5 output tokens/s"
    assert " ".join(lines[0].split()) == summary
    rows = [line.split() for line in lines]
    assert ["1", "3", "1200", "2.5", "s"] in rows
    assert ["decode-0", "decode", "7", "2", bar, "75/100", "75%", "31.2"] in rows
    (prefill,) = (row for row in rows if "prefill-0" in row)
    assert prefill[1:5] == ["prefill", "draining", "0", "0"]
    assert all(len(line) <= width for line in lines)
    assert not any("…" in line for line in lines)


def test_length_predictions_are_shown_beside_the_majority_class():
    assert not any("output lengths" in line for line in drawn(STATUS, 120))
    status = ClusterStatus()
    status.CopyFrom(STATUS)
    status.length_prediction.accuracy = 0.74
    status.length_prediction.majority_accuracy = 0.21
    assert "output lengths: 74% right (majority class 21%)" in drawn(status, 120)[-1]


def test_a_cluster_without_workers_says_so():
    assert "no workers" in drawn(ClusterStatus(), 80)


def test_a_worker_without_blocks_or_of_an_unknown_role_is_shown():
    status = ClusterStatus(workers=[WorkerStatus(id="new", host_kv_blocks=5)])
    (row,) = (line.split() for line in drawn(status, 80) if line.startswith("new"))
    assert row == ["new", "unspecified", "0", "0", "░" * 8, "0/0", "0%", "+5", "on", "host", "0.0"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.24, "1.2 s"), (200, "3 m 20 s"), (7500, "2 h 5 m")]
)
def test_ages_are_short(seconds: float, text: str):
    assert age(seconds) == text


def test_the_highest_rate_fills_its_place():
    assert sparkline([0, 50, 100]) == "▁▅█"
    assert sparkline([0, 0]) == "▁▁"


async def test_once_prints_one_snapshot(address: str, capsys: pytest.CaptureFixture[str]):
    assert await run(View(address, once=True)) == 0
    output = capsys.readouterr().out
    assert output.count("decode-0") == 1
    assert "\x1b" not in output


async def test_json_has_every_field(address: str, capsys: pytest.CaptureFixture[str]):
    assert await run(View(address, once=True, as_json=True)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    status = json.loads(line)
    assert status["running_requests"] == 9
    assert status["levels"][0]["waiting_requests"] == 0
    assert status["workers"][1]["draining"] is True
    assert status["levels"][1]["oldest"] == "2.500s"


async def test_once_without_a_gateway_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
):
    assert await run(View("127.0.0.1:1", once=True)) == 1
    assert capsys.readouterr().err.startswith("baton: UNAVAILABLE: ")


async def test_the_interval_is_the_servers(address: str, script: Scripted):
    async with aclosing(follow(address, 0.25)) as news:
        assert await anext(news) == STATUS
    assert script.intervals == [Duration(nanos=250_000_000)]


async def test_a_gateway_that_fails_or_goes_away_is_tried_again(script: Scripted):
    server = await serve(script)
    script.errors = [QueueError("no Redis", retry_after=0.05)]
    async with aclosing(follow(server.address, 0.1)) as news:
        assert await anext(news) == STATUS
        assert await anext(news) == Lost("UNAVAILABLE: no Redis (retry in 0.05 s)")
        script.hangs = True
        assert await anext(news) == STATUS
        await server.stop(0)
        assert isinstance(await anext(news), Lost)
        again = await serve(script, server.address)
        while isinstance(item := await anext(news), Lost):
            pass
        assert item == STATUS
    await again.stop(0)


async def test_a_silent_gateway_and_one_that_ends_the_stream_are_lost(
    address: str, script: Scripted
):
    async with aclosing(follow(address, 0.1, patience=0.1)) as news:
        assert [await anext(news), await anext(news)] == [STATUS, STATUS]
        assert await anext(news) == Lost("the gateway ended the stream")
        script.hangs = True
        assert await anext(news) == STATUS
        assert await anext(news) == Lost("no answer for 0.2 s")


async def test_an_error_that_stays_ends_it(
    address: str, script: Scripted, capsys: pytest.CaptureFixture[str]
):
    script.errors = [BatonError("broken")]
    assert await run(View(address)) == 1
    assert capsys.readouterr().err.startswith("baton: ")


def test_a_lost_gateway_is_shown_under_the_last_snapshot():
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True)
    with display_for(console, "here", live=True, as_json=False) as display:
        display.lost("nobody there")
        assert console.file.getvalue().rstrip().endswith("trying again\x1b[0m")
        display.show(STATUS)
        display.lost("gone")
    text = console.file.getvalue()
    assert text.rfind("decode-0") < text.rfind("gone") < text.rfind("the above is old")


@pytest.mark.cluster
def test_a_real_cluster_is_watched_until_ctrl_c(cluster: Served):
    options = ["--json", "--interval=0.1", f"--address={cluster.address}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "top", *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        snapshots = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        process.stdout.close()
    finally:
        process.kill()
    for status in snapshots:
        roles = sorted(worker["role"] for worker in status["workers"])
        assert roles == ["WORKER_ROLE_DECODE", "WORKER_ROLE_PREFILL"]
        assert all(worker["total_kv_blocks"] > 0 for worker in status["workers"])
