from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def baton(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", **environment},
    )


def words(text: str) -> str:
    """The text without box drawing and line breaks."""
    return " ".join(text.replace("│", " ").split())


def test_help_names_every_command():
    result = baton("--help")
    assert result.returncode == 0
    for line in (
        "demo Start a local cluster, stream answers to several prompts at once, and stop it again.",
        "serve Run a local cluster: Redis, a gateway and workers.",
        "generate Stream a model's answer to TEXT",
        "chat Talk with a model.",
        "top Watch the cluster: queue levels, workers, KV use, tokens per second.",
        "gateway Run one gateway: the public API.",
        "prefill Run one prefill worker: prompts in, KV blocks out.",
        "decode Run one decode worker: KV blocks in, tokens out.",
    ):
        assert line in words(result.stdout)


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (
            "serve",
            [
                "--model PATH Hugging Face model directory; the demo model if unset",
                "--prefill-workers INTEGER prefill workers (>= 0, default 1)",
                "--address TEXT host:port of the public API (default 127.0.0.1:50051)",
            ],
        ),
        ("gateway", ["--mlfq-ratio FLOAT", "--max-queued-requests INTEGER"]),
        (
            "prefill",
            ["--dtype [auto|float32|bfloat16|float16", "--kv-lease-seconds"],
        ),
        ("decode", ["--config FILE YAML file", "[env var: BATON_CONFIG]", "--kv-transports TEXT"]),
        ("generate", ["--temperature FLOAT", "--json", "[env var: BATON_ADDRESS]", "--no-chat"]),
        ("chat", ["--system TEXT", "--max-tokens INTEGER", "[env var: BATON_ADDRESS]"]),
        ("top", ["--interval FLOAT RANGE", "--once", "--json"]),
        ("demo", ["stream answers to several prompts at once"]),
        ("bench", ["engine"]),
    ],
)
def test_help_of_each_command_says_what_can_be_set(command: str, lines: list[str]):
    result = baton(command, "--help")
    assert result.returncode == 0, result.stderr
    for line in lines:
        assert line in words(result.stdout)


def test_version_is_the_package_version():
    assert baton("version").stdout == "baton 0.1.0\n"


@pytest.mark.parametrize("command", ["gateway", "prefill", "decode", "serve", "demo"])
def test_a_bad_value_is_one_line_and_exit_code_2(command: str, tmp_path: Path):
    for result, complaint in (
        (baton(command, "--drain-seconds=-3"), "baton: --drain-seconds: "),
        (baton(command, BATON_REPORT_INTERVAL="soon"), "baton: --report-interval: "),
        (baton(command, "--config", str(tmp_path)), "Invalid value for '--config'"),
    ):
        assert result.returncode == 2
        assert complaint in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
    assert len(baton(command, "--drain-seconds=-3").stderr.splitlines()) == 1


def test_an_unknown_command_is_named():
    result = baton("sevre")
    assert result.returncode == 2
    assert "sevre" in result.stderr


def test_help_loads_neither_torch_nor_grpc():
    code = (
        "import sys\n"
        "from launcher.cli import baton\n"
        "baton(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'grpc', 'transformers', 'redis', 'uvloop'} & set(sys.modules)\n"
        "sys.exit(','.join(heavy) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["gateway.main", "launcher.generate", "launcher.cluster"])
def test_neither_gateway_nor_client_nor_cluster_loads_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_generate_without_a_server_is_one_line_and_exit_code_1():
    result = baton("generate", "Hello", "--address", "127.0.0.1:1")
    assert result.returncode == 1
    assert result.stderr.startswith("baton: UNAVAILABLE: ")
    assert len(result.stderr.splitlines()) == 1
