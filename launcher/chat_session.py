"""One chat with one gateway: its history, its commands, and the answers as they stream.

Knows nothing of where lines come from.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text as Styled

from baton.client import Client, Ended, Started, Text
from baton.errors import BatonError, NotFound, Unsupported
from baton.v1 import model_pb2
from launcher.conversation import Conversation, Exchange, WordWrap
from launcher.screen import milliseconds

CONNECT_SECONDS = 10.0
ANSWER_ROOM = 256  # tokens that the history leaves to an answer whose max_tokens is not given
COMMANDS = {
    "/clear": "forget what was said",
    "/system TEXT": "set the system message; none without TEXT",
    "/help": "this",
    "/quit": "end, as Ctrl-D does",
}
HELP = "\n".join(
    [
        *(f"{name:<13} {meaning}" for name, meaning in COMMANDS.items()),
        "Ctrl-C        stop the answer; what came of it stays in the history",
    ]
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for; None leaves it to the server."""

    address: str
    model: str = ""
    system: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    timeout: float = 300.0


class Page:
    """Where a conversation is shown: answers on one console, everything else on another."""

    def __init__(self, answers: Console, notes: Console) -> None:
        """They may be the same console."""
        self._answers = answers
        self._notes = notes
        self._wrap = WordWrap(answers.width)

    def begin(self) -> None:
        """An answer follows."""
        self._wrap = WordWrap(self._answers.width)

    def text(self, piece: str) -> None:
        """More of the answer; in lines as wide as the terminal, if it is one."""
        self._write(self._wrap.feed(piece) if self._answers.is_terminal else piece)

    def end(self) -> None:
        """The answer is over."""
        self._write(self._wrap.end() + "\n")

    def note(self, text: str) -> None:
        """Something about the conversation."""
        self._notes.print(Styled(text, "dim"), highlight=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """Something went wrong."""
        self._notes.print(Styled(text, "red"), highlight=False, soft_wrap=True)

    def _write(self, text: str) -> None:
        self._answers.file.write(text)
        self._answers.file.flush()


@dataclass(slots=True)
class Progress:
    """An answer as it comes."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    texts: list[str] = field(default_factory=list)
    ended: Ended | None = None

    def figures(self) -> str:
        """One line: tokens, TTFT, TPOT, and why it ended if not by itself."""
        counts = f"{self.prompt_tokens} prompt + {self.output_tokens} output tokens"
        if self.ended is None:
            return f"{counts} · stopped"
        timing = self.ended.message.timing
        parts = [counts, f"TTFT {milliseconds(timing.time_to_first_token)} ms"]
        if self.output_tokens > 1:
            parts.append(f"TPOT {milliseconds(timing.decode, self.output_tokens - 1)} ms")
        if self.ended.reason != "stop":
            parts.append(self.ended.reason)
        return " · ".join(parts)


class Session:
    """One conversation with one gateway."""

    def __init__(self, client: Client, options: Options, page: Page) -> None:
        self.conversation = Conversation(options.system)
        self._client = client
        self._options = options
        self._page = page

    @classmethod
    async def open(cls, options: Options, page: Page) -> Session:
        """Connect to a gateway. Raises BatonError: nobody there, no such model, not one that
        chats."""
        session = cls(Client(options.address), options, page)
        try:
            model = await session.model()
            if "chat" not in model.capabilities:
                raise Unsupported(f"{model.name} has no chat template: use baton generate")
        except BaseException:
            await session.close()
            raise
        return session

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def model(self) -> model_pb2.Model:
        """The model that answers, as it is now. Raises BatonError."""
        wanted = self._options.model
        for model in await self._client.list_models(timeout=CONNECT_SECONDS):
            if wanted in ("", model.name):
                return model
        raise NotFound("model", wanted)

    async def take(self, line: str) -> bool:
        """Do what a line of the user says; False when it ends the session. Raises BatonError."""
        command, _, rest = line.partition(" ")
        match command:
            case "/quit":
                return False
            case "/clear":
                self.conversation.exchanges.clear()
                self._page.note("history forgotten")
            case "/system":
                self.conversation.system = rest.strip()
                self._page.note("system message set" if rest.strip() else "no system message")
            case "/help":
                self._page.note(HELP)
            case _ if line.startswith("/"):
                raise BatonError(
                    f"no such command: {command} (/help lists them; a space before it sends it)"
                )
            case _ if line.strip():
                await self.say(line.strip())
        return True

    async def say(self, text: str) -> None:
        """Stream the answer to a turn. Whatever came of it is in the history, also when it was
        cancelled or broke off. Raises BatonError."""
        await self._make_room(text)
        progress = Progress()
        self._page.begin()
        try:
            await self._stream(text, progress)
        finally:
            if progress.texts:
                answer = "".join(progress.texts)
                self.conversation.exchanges.append(Exchange(text, answer))
                self._page.end()
            if progress.prompt_tokens:
                self._page.note(progress.figures())

    async def _stream(self, text: str, progress: Progress) -> None:
        options: dict[str, Any] = {
            "model": self._options.model,
            "temperature": self._options.temperature,
            "max_tokens": self._options.max_tokens,
            "timing": True,
        }
        messages = self.conversation.messages(text)
        timeout = self._options.timeout
        async with aclosing(self._client.chat(messages, timeout=timeout, **options)) as events:
            async for event in events:
                match event:
                    case Started():
                        progress.prompt_tokens = event.prompt_tokens
                    case Text():
                        progress.output_tokens += event.token_count
                        progress.texts.append(event.text)
                        self._page.text(event.text)
                    case Ended():
                        progress.output_tokens = event.completion_tokens
                        progress.ended = event

    async def _make_room(self, text: str) -> None:
        """Forget the oldest exchanges until the context has room for an answer."""
        exchanges = self.conversation.exchanges
        if not exchanges:
            return
        context = (await self.model()).max_context_tokens
        room = min(self._options.max_tokens or ANSWER_ROOM, context // 4)
        held = len(exchanges)
        while exchanges and await self._prompt_tokens(text) + room > context:
            del exchanges[0]
        if dropped := held - len(exchanges):
            turns = "oldest turn" if dropped == 1 else f"{dropped} oldest turns"
            self._page.note(f"forgot the {turns}: the context holds {context} tokens")

    async def _prompt_tokens(self, text: str) -> int:
        messages = self.conversation.messages(text)
        model, timeout = self._options.model, CONNECT_SECONDS
        return len(await self._client.tokenize(messages, model=model, timeout=timeout))
