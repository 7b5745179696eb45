"""`baton chat`: a conversation in the terminal, or one turn for each line of standard input.

The event loop runs while an answer is on its way; between answers the terminal has the process to
itself, for line editing and its own Ctrl-C.
"""

from __future__ import annotations

import asyncio
import sys

from rich.console import Console

from baton.errors import BatonError
from baton.v1 import model_pb2
from launcher.chat_session import COMMANDS, Options, Page, Session
from launcher.generate import describe


def run(options: Options) -> int:
    """Converse until the input ends; returns the exit code."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr] # it is a text file
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    answers = Console()
    page = Page(answers, answers if interactive else Console(stderr=True))
    with asyncio.Runner() as runner:
        try:
            session = runner.run(Session.open(options, page))
        except BatonError as error:
            page.error(f"baton: {describe(error)}")
            return 1
        try:
            if not interactive:
                return _read(runner, session, page)
            _greet(page, runner.run(session.model()), options.address)
            return _converse(runner, session, page, _prompt(answers))
        finally:
            runner.run(session.close())


def _read(runner: asyncio.Runner, session: Session, page: Page) -> int:
    """One turn for each line. Ends at the first error: the turns after it build on its answer."""
    for line in sys.stdin:
        try:
            if not runner.run(session.take(line.rstrip("\n"))):
                break
        except BatonError as error:
            page.error(f"baton: {describe(error)}")
            return 1
    return 0


def _converse(runner: asyncio.Runner, session: Session, page: Page, prompt: str) -> int:
    """Ask for turns with line editing. Errors are shown, and the session goes on."""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            page.note("Ctrl-D or /quit ends")
            continue
        try:
            if not runner.run(session.take(line)):
                return 0
        except KeyboardInterrupt:
            pass  # the figures under the answer say that it was stopped
        except BatonError as error:
            page.error(describe(error))
        print()


def _greet(page: Page, model: model_pb2.Model, address: str) -> None:
    page.note(f"{model.name} on {address}, {model.max_context_tokens} tokens of context")
    page.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends\n")


def _prompt(console: Console) -> str:
    """The prompt for `input`, which gets line editing by importing readline."""
    try:
        import readline
    except ImportError:  # not on every platform
        return "> "
    readline.set_completer_delims(" ")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    if console.no_color or console.color_system is None:
        return "> "
    # \001 and \002 enclose what takes no room on the line
    return "\001\033[1;36m\002>\001\033[0m\002 "


def _complete(text: str, state: int) -> str | None:
    """The `state`-th command that begins with `text`."""
    names = [name.split()[0] for name in COMMANDS]
    matches = [name for name in names if text and name.startswith(text)]
    return matches[state] if state < len(matches) else None
