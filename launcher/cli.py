"""The `baton` command line.

Exit codes: 0 done; 1 it failed while running; 2 the command line, the configuration or the model
directory is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, NoReturn

import rich_click as click

from baton.config import DecodeConfig, GatewayConfig, PrefillConfig, ServeConfig
from baton.errors import BatonError, ConfigError, ModelError
from launcher.bench import bench
from launcher.cores import spin_briefly
from launcher.options import config_options, read_config, with_model
from launcher.plan_options import plan_options

_PROCESSES = ["gateway", "prefill", "decode"]
click.rich_click.MAX_WIDTH = 110
click.rich_click.COMMAND_GROUPS = {
    "baton": [
        {"name": "Use", "commands": ["demo", "serve", "generate", "chat", "top"]},
        {"name": "One process each, as a cluster runs them", "commands": _PROCESSES},
        {"name": "Other", "commands": ["plan", "health", "bench", "version"]},
    ]
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def baton() -> None:
    """Serve large language models over gRPC, with prefill and decode in separate workers.

    Try `baton demo`. To serve a model of yours: `baton serve --model DIR`, and from another
    terminal `baton generate "What does itertools.chain do?"`.

    Every setting is a flag, an environment variable (BATON_ and its name) and a key of a YAML file
    (--config), in this order of precedence.
    """


@baton.command()
@config_options(ServeConfig)
def serve(**options: Any) -> None:
    """Run a local cluster: Redis, a gateway and workers.

    Prints one line `ready address=...` on standard output once requests are served; logs go to
    standard error. Ctrl-C or SIGTERM stops everything; the second one does so at once.
    Settings of workers that are no flag here are read from BATON_*. With --metrics-address the
    gateway has that port, the workers the ones after it.
    """
    config = with_model(read_config(ServeConfig, options))
    import uvloop

    from launcher.serve import run

    sys.exit(uvloop.run(run(config)))


@baton.command()
@config_options(GatewayConfig)
def gateway(**options: Any) -> None:
    """Run one gateway: the public API."""
    config = with_model(read_config(GatewayConfig, options))
    import uvloop

    from gateway import main as process

    uvloop.run(process.run(config))


@baton.command()
@config_options(PrefillConfig)
def prefill(**options: Any) -> None:
    """Run one prefill worker: prompts in, KV blocks out."""
    config = with_model(read_config(PrefillConfig, options))
    spin_briefly()
    import uvloop

    from prefill_worker import main as process

    uvloop.run(process.run(config))
    _exit_now()


@baton.command()
@config_options(DecodeConfig)
def decode(**options: Any) -> None:
    """Run one decode worker: KV blocks in, tokens out."""
    config = with_model(read_config(DecodeConfig, options))
    spin_briefly()
    import uvloop

    from decode_worker import main as process

    uvloop.run(process.run(config))
    _exit_now()


def _exit_now() -> None:
    """End a worker that has left in order. Tearing down an interpreter with torch in it takes
    seconds, in which a supervisor may lose patience, and gives back nothing that the kernel
    does not."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


_gateway_address = click.option(
    "--address",
    envvar="BATON_ADDRESS",
    default="127.0.0.1:50051",
    show_default=True,
    show_envvar=True,
    help="host:port of a gateway",
)


@baton.command()
@click.argument("text")
@_gateway_address
@click.option("--model", default="", help="served model; the only one if not given")
@click.option("--max-tokens", type=int, help="most tokens to generate")
@click.option("--temperature", type=float, help="0 takes the likeliest token each time")
@click.option("--seed", type=int, help="makes a sampled output repeatable")
@click.option("--system", default="", help="system message of the chat")
@click.option(
    "--chat/--no-chat",
    default=None,
    help="send TEXT as a chat turn, or as plain text to go on from; a chat turn if the model has "
    "a chat template",
)
@click.option("--json", "as_json", is_flag=True, help="print each event as one line of JSON")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="seconds, in all")
def generate(text: str, **options: Any) -> None:
    """Stream a model's answer to TEXT ("-" reads it from standard input)."""
    import uvloop

    from launcher.generate import Ask, run

    ask = Ask(text=sys.stdin.read() if text == "-" else text, **options)
    sys.exit(uvloop.run(run(ask)))


@baton.command()
@_gateway_address
@click.option("--model", default="", help="served model; the only one if not given")
@click.option("--system", default="", help="system message of the chat")
@click.option("--temperature", type=float, help="0 takes the likeliest token each time")
@click.option("--max-tokens", type=int, help="most tokens of each answer")
@click.option(
    "--timeout", type=float, default=300.0, show_default=True, help="seconds, for each answer"
)
def chat(**options: Any) -> None:
    """Talk with a model.

    Ctrl-C stops an answer, Ctrl-D ends, /help lists the commands. When standard input is no
    terminal, each line of it is a turn: answers go to standard output, figures and errors to
    standard error, and the first error ends it with exit code 1.
    """
    from launcher.chat import run
    from launcher.chat_session import Options

    sys.exit(run(Options(**options)))


@baton.command()
@_gateway_address
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="seconds between snapshots",
)
@click.option("--once", is_flag=True, help="print one snapshot and end")
@click.option("--json", "as_json", is_flag=True, help="print each snapshot as one line of JSON")
def top(**options: Any) -> None:
    """Watch the cluster: queue levels, workers, KV use, tokens per second.

    Waits for a gateway that is not there, and for one that goes away. Ctrl-C ends.
    """
    import uvloop

    from launcher.top import View, run

    sys.exit(uvloop.run(run(View(**options))))


@baton.command()
@config_options(ServeConfig)
def demo(**options: Any) -> None:
    """Start a local cluster, stream answers to several prompts at once, and stop it again.

    Listens on a free port unless --address is given, so that it runs beside `baton serve`.
    """
    config = with_model(read_config(ServeConfig, options))
    import uvloop

    from launcher.demo import run

    sys.exit(uvloop.run(run(config)))


baton.add_command(bench)


@baton.command()
@plan_options
def plan(**options: Any) -> None:
    """Find the cheapest cluster that meets latency limits, in the simulator.

    Tries numbers of prefill and decode workers, token budgets and MLFQ quanta; prints what it
    tried and what binds. Needs no GPU: a pass takes what the model on that GPU should take, or what
    `baton bench engine --profile` measured. Exit code 1 if no cluster does.
    """
    from launcher.planning import Options, run

    sys.exit(run(Options(**options)))


@baton.command()
@click.option("--address", default="127.0.0.1:50051", show_default=True, help="host:port to ask")
@click.option("--service", default="", help="full name of a gRPC service; the process if empty")
@click.option("--timeout", type=float, default=1.0, show_default=True, help="seconds to wait")
def health(address: str, service: str, timeout: float) -> None:
    """Wait until a gateway or worker says SERVING (grpc.health.v1); exit code 1 if it does not."""
    import uvloop

    from launcher.health import run

    sys.exit(uvloop.run(run(address, service, timeout)))


@baton.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    click.echo(f"baton {installed('baton-serve')}")


def main() -> NoReturn:
    """Entry point: errors on purpose are one line on standard error, never a traceback."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it tells of every connection that closes
    try:
        baton(prog_name="baton")
    except (ConfigError, ModelError) as error:
        click.echo(f"baton: {error}", err=True)
        sys.exit(2)
    except BatonError as error:
        click.echo(f"baton: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    raise AssertionError("click exits by itself")
