"""The terminal client and the demo's display against a gateway that plays a script."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from rich.console import Console

from baton.errors import InvalidRequest, Overloaded
from baton.v1 import generation_pb2 as api
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from launcher.demo import ask_all
from launcher.generate import Ask, run
from launcher.questions import QUESTIONS, Answer, Question
from launcher.screen import Lines, Panes, screen_for, summary

PIECES = ("Make an ", "iterator.\n", "Über ", "alles")


class Scripted(generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Answers every request with the same pieces, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[api.GenerateRequest] = []
        self.chats = True  # has a chat template
        self.error: Exception | None = None

    async def Tokenize(
        self, request: model_pb2.TokenizeRequest, context: Any
    ) -> model_pb2.TokenizeResponse:
        if not self.chats:
            raise InvalidRequest.of("chat", "the model has no chat template")
        return model_pb2.TokenizeResponse(token_ids=[1])

    async def Generate(
        self, request: api.GenerateRequest, context: Any
    ) -> AsyncIterator[api.GenerateResponse]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        yield api.GenerateResponse(accepted=api.Accepted(model="demo", prompt_tokens=9))
        for piece in PIECES:
            await asyncio.sleep(0)
            yield api.GenerateResponse(delta=api.Delta(text=piece, token_count=2))
        timing = api.Timing(
            queue=Duration(nanos=1_500_000),
            prefill=Duration(nanos=20_000_000),
            kv_transfer=Duration(nanos=3_000_000),
            time_to_first_token=Duration(nanos=25_000_000),
            decode=Duration(nanos=70_000_000),
        )
        yield api.GenerateResponse(
            finished=api.Finished(reason=api.FINISH_REASON_STOP, completion_tokens=8, timing=timing)
        )
        yield api.GenerateResponse(usage=api.Usage(prompt_tokens=9, completion_tokens=8))


@pytest.fixture
def script() -> Scripted:
    return Scripted()


async def test_the_answer_is_printed_as_text(address: str, capsys: pytest.CaptureFixture[str]):
    assert await run(Ask("What?", address)) == 0
    assert capsys.readouterr().out == "Make an iterator.\nÜber alles\n"


async def test_json_prints_one_event_a_line(address: str, capsys: pytest.CaptureFixture[str]):
    assert await run(Ask("What?", address, as_json=True)) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(event)) for event in events] == [
        "accepted",
        *["delta"] * len(PIECES),
        "finished",
        "usage",
    ]
    assert "".join(e["delta"]["text"] for e in events if "delta" in e) == "".join(PIECES)
    assert events[-2]["finished"]["timing"]["queue"] == "0.001500s"


async def test_settings_that_are_not_given_are_left_to_the_server(address: str, script: Scripted):
    await run(Ask("What?", address))
    await run(Ask("What?", address, max_tokens=5, temperature=0.0, seed=3))
    bare, full = script.requests
    assert not bare.sampling.HasField("temperature")
    assert not bare.sampling.HasField("seed")
    assert not bare.stopping.HasField("max_tokens")
    assert full.sampling.HasField("temperature")
    assert (full.sampling.seed, full.stopping.max_tokens) == (3, 5)


@pytest.mark.parametrize(
    ("chats", "told", "form"),
    [
        (True, None, "chat"),
        (False, None, "prompt"),
        (True, False, "prompt"),
        (False, True, "chat"),
    ],
)
async def test_text_is_a_chat_turn_where_the_model_chats_unless_told(
    address: str, script: Scripted, chats: bool, told: bool | None, form: str
):
    script.chats = chats
    await run(Ask("What?", address, chat=told, system="Be brief."))
    assert script.requests[0].WhichOneof("input") == form
    if form == "chat":
        turns = [(turn.role, turn.content) for turn in script.requests[0].chat.messages]
        assert turns == [("system", "Be brief."), ("user", "What?")]


async def test_an_error_is_one_line_with_its_details(
    address: str, script: Scripted, capsys: pytest.CaptureFixture[str]
):
    script.error = Overloaded("the queue is full", subject="queue", retry_after=2.5)
    assert await run(Ask("What?", address)) == 1
    captured = capsys.readouterr()
    assert captured.err == "baton: RESOURCE_EXHAUSTED: the queue is full (retry in 2.5 s)\n"


async def shown(address: str, console: Console) -> list[Answer]:
    answers = [Answer(question) for question in QUESTIONS]
    with screen_for(console, answers) as screen:
        await ask_all(address, answers, screen)
    return answers


async def test_the_demo_prints_whole_numbered_lines_where_there_is_no_terminal(address: str):
    console = Console(file=io.StringIO(), width=80)
    answers = await shown(address, console)
    assert isinstance(screen_for(console, answers), Lines)
    lines = console.file.getvalue().splitlines()
    for number in range(1, len(QUESTIONS) + 1):
        own = [line for line in lines if line.startswith(f"[{number}] ")]
        assert own == [f"[{number}] Make an iterator.", f"[{number}] Über alles"]


async def test_long_lines_are_broken_between_words(address: str):
    console = Console(file=io.StringIO(), width=60)
    answer = Answer(QUESTIONS[0], text="word " * 100)
    with Lines(console, [answer]) as screen:
        screen.update(answer)
        answer.error = "UNAVAILABLE"
        screen.update(answer)
    lines = console.file.getvalue().splitlines()
    assert all(set(line.split()[1:]) == {"word"} for line in lines[:-1])
    assert "".join(line.removeprefix("[1] ") for line in lines).count("word") == 100
    assert lines[-1] == "[1] UNAVAILABLE"


async def test_the_demo_draws_panes_on_a_terminal(address: str):
    console = Console(file=io.StringIO(), width=100, height=40, force_terminal=True)
    answers = await shown(address, console)
    assert isinstance(screen_for(console, answers), Panes)
    assert "8 tokens" in console.file.getvalue()


async def test_the_table_has_the_figures_of_each_request_and_the_totals(address: str):
    answers = [Answer(question) for question in QUESTIONS]
    with Lines(Console(file=io.StringIO()), answers) as screen:
        await ask_all(address, answers, screen)
    console = Console(file=io.StringIO(), width=140)
    console.print(summary(answers, 2.0, console.width))
    text = console.file.getvalue()
    row = next(line for line in text.splitlines() if QUESTIONS[0].text in line)
    assert row.split()[-8:] == ["9", "8", "1.5", "20.0", "3.0", "25.0", "10.0", "stop"]
    assert "9 requests at once: 81 prompt and 72 output tokens" in text
    assert "2.00 s in all, 36.0 output tokens/s" in text


async def test_a_request_that_failed_is_in_the_table(script: Scripted, address: str):
    script.error = Overloaded("full", subject="queue")
    answers = [Answer(QUESTIONS[0])]
    with Lines(Console(file=io.StringIO()), answers) as screen:
        await ask_all(address, answers, screen)
    assert answers[0].error.startswith("RESOURCE_EXHAUSTED: full")
    console = Console(file=io.StringIO(), width=140)
    console.print(summary(answers, 1.0, console.width))
    assert "error" in console.file.getvalue()


def test_the_demo_asks_at_least_six_questions_of_different_lengths():
    sizes = {len(str(question.prompt)) for question in QUESTIONS}
    assert len(QUESTIONS) >= len(sizes) >= 6
    assert max(sizes) > 5 * min(sizes)


async def test_turns_system_prompt_and_plain_text_reach_the_server(address: str, script: Scripted):
    questions = [
        Question("last", turns=(("first", "answer"),), system="be brief"),
        Question("text\n", plain=True, max_tokens=3),
    ]
    answers = [Answer(question) for question in questions]
    with Lines(Console(file=io.StringIO()), answers) as screen:
        await ask_all(address, answers, screen)
    by_input = {request.WhichOneof("input"): request for request in script.requests}
    assert [(turn.role, turn.content) for turn in by_input["chat"].chat.messages] == [
        ("system", "be brief"),
        ("user", "first"),
        ("assistant", "answer"),
        ("user", "last"),
    ]
    assert by_input["prompt"].prompt == "text\n"
    assert by_input["prompt"].stopping.max_tokens == 3
