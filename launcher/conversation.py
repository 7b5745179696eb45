"""What has been said in a chat, and how streamed text is broken into lines. Does no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from unicodedata import category

from rich.cells import cell_len


@dataclass(frozen=True, slots=True)
class Exchange:
    """A turn of the user and the answer to it, whole or as far as it came."""

    said: str
    answer: str


@dataclass(slots=True)
class Conversation:
    """A system message, if any, and the exchanges so far, oldest first."""

    system: str = ""
    exchanges: list[Exchange] = field(default_factory=list)

    def messages(self, said: str) -> list[dict[str, str]]:
        """The chat that asks for an answer to `said`."""
        chat = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            chat.append({"role": "user", "content": exchange.said})
            chat.append({"role": "assistant", "content": exchange.answer})
        return [*chat, {"role": "user", "content": said}]


class WordWrap:
    """Breaks text that comes in pieces between words. The last word waits until it is complete."""

    TAB = "    "

    def __init__(self, width: int) -> None:
        """`width` in terminal cells."""
        self._width = width
        self._column = 0
        self._gap = ""  # spaces before the word
        self._word = ""

    def feed(self, text: str) -> str:
        """What can be shown now. Control characters are left out: they belong to the terminal."""
        return "".join(map(self._feed, text))

    def end(self) -> str:
        """What was waiting."""
        return self._place()

    def _feed(self, char: str) -> str:
        if char == "\n":
            line = self._place() + "\n"
            self._gap, self._column = "", 0
            return line
        if char in " \t":
            shown = self._place()
            self._gap += self.TAB if char == "\t" else char
            return shown
        if category(char) == "Cc":
            return ""
        if cell_len(char) < 2:
            self._word += char
            return ""
        shown = self._place()  # scripts with wide characters break anywhere
        self._word = char
        return shown + self._place()

    def _place(self) -> str:
        """The word, on this line or the next."""
        gap, word = self._gap, self._word
        if not word:
            return ""
        self._gap = self._word = ""
        length = cell_len(word)
        if self._column and self._column + len(gap) + length > self._width:
            self._column, gap = 0, "\n"
        else:
            self._column += len(gap)
        # A word longer than a line is broken by the terminal.
        self._column = (self._column + length - 1) % self._width + 1
        return gap + word
