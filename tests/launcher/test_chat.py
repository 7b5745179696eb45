"""The chat session against a gateway that plays a script, and the command in a terminal."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console

from baton.errors import BatonError, NotFound, Overloaded, Unavailable, Unsupported
from baton.v1 import generation_pb2 as api
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from launcher.chat_session import Options, Page, Session
from tests.cluster import Served

CONTEXT = 40
TIMING = api.Timing(
    time_to_first_token=Duration(nanos=25_000_000), decode=Duration(nanos=70_000_000)
)


class Scripted(generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Answers every turn with its pieces; a character is a token. Keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[api.GenerateRequest] = []
        self.pieces = ["Hello ", "there."]
        self.capabilities = ["chat"]
        self.error: Exception | None = None  # raised after the pieces
        self.hangs = False  # after the pieces
        self.hanging, self.cancelled = asyncio.Event(), asyncio.Event()

    @property
    def asked(self) -> list[list[tuple[str, str]]]:
        """Role and content of the turns of each request."""
        return [[(t.role, t.content) for t in r.chat.messages] for r in self.requests]

    async def ListModels(self, request: Any, context: Any) -> model_pb2.ListModelsResponse:
        model = model_pb2.Model(
            name="demo", max_context_tokens=CONTEXT, capabilities=self.capabilities
        )
        return model_pb2.ListModelsResponse(models=[model])

    async def Tokenize(
        self, request: model_pb2.TokenizeRequest, context: Any
    ) -> model_pb2.TokenizeResponse:
        count = sum(len(turn.content) for turn in request.chat.messages)
        return model_pb2.TokenizeResponse(token_ids=range(count))

    async def Generate(
        self, request: api.GenerateRequest, context: Any
    ) -> AsyncIterator[api.GenerateResponse]:
        self.requests.append(request)
        yield api.GenerateResponse(accepted=api.Accepted(model="demo", prompt_tokens=9))
        for piece in self.pieces:
            yield api.GenerateResponse(delta=api.Delta(text=piece, token_count=4))
        if self.error is not None:
            raise self.error
        if self.hangs:
            self.hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        yield api.GenerateResponse(
            finished=api.Finished(reason=api.FINISH_REASON_STOP, completion_tokens=8, timing=TIMING)
        )
        yield api.GenerateResponse(usage=api.Usage(prompt_tokens=9, completion_tokens=8))


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
def answers() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def notes() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
async def session(address: str, answers: io.StringIO, notes: io.StringIO) -> AsyncIterator[Session]:
    page = Page(Console(file=answers), Console(file=notes))
    session = await Session.open(Options(address, system="be brief"), page)
    yield session
    await session.close()


async def test_each_turn_is_sent_with_all_that_was_said(
    session: Session, script: Scripted, answers: io.StringIO
):
    assert await session.take("hi")
    assert await session.take("  more ")
    assert script.asked[1] == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "Hello there."),
        ("user", "more"),
    ]
    assert answers.getvalue() == "Hello there.\nHello there.\n"


async def test_the_line_under_an_answer_has_its_figures(session: Session, notes: io.StringIO):
    await session.take("hi")
    assert notes.getvalue() == "9 prompt + 8 output tokens · TTFT 25.0 ms · TPOT 10.0 ms\n"


async def test_options_reach_the_server_and_others_are_left_to_it(
    address: str, script: Scripted, answers: io.StringIO
):
    page = Page(Console(file=answers), Console(file=answers))
    session = await Session.open(Options(address, temperature=0.5, max_tokens=3), page)
    await session.take("hi")
    await session.close()
    (request,) = script.requests
    assert (request.sampling.temperature, request.stopping.max_tokens) == (0.5, 3)
    assert not request.sampling.HasField("top_p")


async def test_commands_change_what_is_sent(session: Session, script: Scripted, notes: io.StringIO):
    await session.take("hi")
    await session.take("/clear")
    await session.take("/system be long")
    await session.take("again")
    await session.take("/clear")
    await session.take("/system")
    await session.take("bare")
    assert script.asked[1:] == [[("system", "be long"), ("user", "again")], [("user", "bare")]]
    await session.take("/help")
    for command in ("/clear", "/system TEXT", "/help", "/quit"):
        assert command in notes.getvalue()
    assert not await session.take("/quit")


async def test_empty_lines_are_no_turns_and_unknown_commands_are_refused(
    session: Session, script: Scripted
):
    assert await session.take("   ")
    with pytest.raises(BatonError, match="no such command: /etc/fstab"):
        await session.take("/etc/fstab is what?")
    assert script.asked == []
    await session.take(" /etc/fstab is what?")  # a space before it makes it text
    assert script.asked[0][-1] == ("user", "/etc/fstab is what?")


async def test_stopping_an_answer_cancels_it_at_the_server_and_keeps_what_came(
    session: Session, script: Scripted, answers: io.StringIO, notes: io.StringIO
):
    script.hangs = True
    answering = asyncio.create_task(session.take("hi"))
    while answers.getvalue() != "Hello there.":
        await asyncio.sleep(0.01)
    await script.hanging.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    await asyncio.wait_for(script.cancelled.wait(), 30)
    assert notes.getvalue() == "9 prompt + 8 output tokens · stopped\n"
    script.hangs = False
    await session.take("go on")
    assert script.asked[1][1:] == [
        ("user", "hi"),
        ("assistant", "Hello there."),
        ("user", "go on"),
    ]


async def test_a_turn_without_an_answer_is_not_in_the_history(session: Session, script: Scripted):
    script.pieces, script.error = [], Overloaded("full", subject="queue")
    with pytest.raises(Overloaded, match="full"):
        await session.take("hi")
    script.pieces, script.error = ["yes"], None
    await session.take("again")
    assert script.asked[1] == [("system", "be brief"), ("user", "again")]


async def test_the_oldest_turns_are_forgotten_when_the_context_is_full(
    session: Session, script: Scripted, notes: io.StringIO
):
    # 8 of the system message, 13 of an exchange, 1 of the turn, a quarter of 40 for the answer
    for turn in "abc":
        await session.take(turn)
    assert [content for _, content in script.asked[1]] == ["be brief", "a", "Hello there.", "b"]
    assert [content for _, content in script.asked[2]] == ["be brief", "b", "Hello there.", "c"]
    assert "forgot the oldest turn: the context holds 40 tokens" in notes.getvalue()
    await session.take("d" * 30)
    assert [content for _, content in script.asked[3]] == ["be brief", "d" * 30]
    assert "forgot the 2 oldest turns" in notes.getvalue()


async def test_a_model_that_cannot_chat_or_is_not_there_is_refused_at_the_start(
    address: str, script: Scripted, answers: io.StringIO
):
    page = Page(Console(file=answers), Console(file=answers))
    with pytest.raises(NotFound, match="other"):
        await Session.open(Options(address, model="other"), page)
    script.capabilities = []
    with pytest.raises(Unsupported, match="demo has no chat template"):
        await Session.open(Options(address), page)
    with pytest.raises(Unavailable):
        await Session.open(Options("127.0.0.1:1"), page)


def chat(address: str, text: str) -> subprocess.CompletedProcess[str]:
    """The real command, with `text` as its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", "chat", "--address", address],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
    )


async def test_without_a_terminal_each_line_is_a_turn_until_the_first_error(
    address: str, script: Scripted
):
    result = await asyncio.to_thread(chat, address, "one\n\ntwo\n/oops\nthree\n")
    assert result.returncode == 1
    assert result.stdout == "Hello there.\nHello there.\n"
    assert len(result.stderr.splitlines()) == 3
    assert result.stderr.splitlines()[-1].startswith("baton: no such command: /oops")
    assert [turns[-1][1] for turns in script.asked] == ["one", "two"]


class Typed:
    """The command in a terminal of its own."""

    def __init__(self, address: str) -> None:
        self._terminal, inner = pty.openpty()
        os.set_blocking(self._terminal, False)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "chat", "--address", address],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"},
            start_new_session=True,
        )
        os.close(inner)
        self.shown = ""

    def write(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    async def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until `text` is shown, and forget what was before it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in {self.shown!r}"
            try:
                self.shown += os.read(self._terminal, 65536).decode(errors="replace")
            except (BlockingIOError, OSError):
                await asyncio.sleep(0.02)
        self.shown = self.shown.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


async def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(
    address: str, script: Scripted
):
    script.hangs = True
    typed = Typed(address)
    try:
        await typed.wait_for("demo on ")
        await typed.wait_for("> ")
        typed.write("hi\r")
        await typed.wait_for("Hello")
        # The client may have the pieces before the handler goes on: it must be where it hangs.
        await asyncio.wait_for(script.hanging.wait(), 30)
        typed.process.send_signal(signal.SIGINT)
        await typed.wait_for("stopped")
        await asyncio.wait_for(script.cancelled.wait(), 30)
        await typed.wait_for("> ")
        script.hangs, script.error = False, Overloaded("full", subject="queue")
        typed.write("again\r")
        await typed.wait_for("RESOURCE_EXHAUSTED: full")
        await typed.wait_for("> ")
        typed.write("\x04")
        assert await asyncio.to_thread(typed.process.wait, 30) == 0
    finally:
        typed.close()


@pytest.mark.cluster
def test_the_demo_model_answers_turn_by_turn(cluster: Served):
    result = chat(cluster.address, "What does itertools.chain do?\nWhat does os.getcwd do?\n")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2
    first, second = result.stderr.splitlines()
    assert int(second.split()[0]) > int(first.split()[0])  # the history is in the prompt
