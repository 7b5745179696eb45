"""What the demo asks, and what came back."""

from __future__ import annotations

from dataclasses import dataclass

from baton.client import Ended, Event, Prompt, Started, Text


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt; `turns` are what was said before. Greedy unless it has a temperature.

    `plain` text is gone on from as it stands, instead of answered.
    """

    text: str
    plain: bool = False
    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    max_tokens: int = 160
    temperature: float = 0.0

    @property
    def prompt(self) -> Prompt:
        """What a client sends."""
        if self.plain:
            return self.text
        said = [("system", self.system)] if self.system else []
        for question, answer in self.turns:
            said += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": text} for role, text in (*said, ("user", self.text))]


@dataclass(slots=True)
class Answer:
    """What came back for a question so far."""

    question: Question
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    ended: Ended | None = None
    error: str = ""

    @property
    def title(self) -> str:
        """The question on one line."""
        return " ".join(self.question.text.split())

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.ended is not None or bool(self.error)

    def take(self, event: Event) -> None:
        """Add one event of the stream."""
        match event:
            case Started():
                self.prompt_tokens = event.prompt_tokens
            case Text():
                self.text += event.text
                self.output_tokens += event.token_count
            case Ended():
                self.ended = event


QUESTIONS = (
    Question("What does itertools.chain do?"),
    Question(
        "In one sentence, what does len do?",
        system="Answer from the documentation of Python's standard library.",
    ),
    Question("Explain os.path.join in detail."),
    Question("What is the signature of json.dumps?"),
    Question("Tell me about threading.Lock.", temperature=0.7),
    Question(
        "Is collections.deque a function or a class?",
        turns=(("What does sorted do?", "Return a new list containing all items in order."),),
    ),
    Question(
        "What does itertools.accumulate do?",
        turns=(
            ("What does itertools.product do?", "Cartesian product of input iterables."),
            (
                "What does itertools.permutations do?",
                "Return successive r-length permutations of elements in the iterable.",
            ),
            (
                "What does itertools.combinations do?",
                "Return successive r-length combinations of elements in the iterable.",
            ),
            (
                "What is functools.reduce for?",
                "Apply a function of two arguments cumulatively to the items of an iterable, from "
                "left to right, so as to reduce the iterable to a single value.",
            ),
        ),
    ),
    Question("Who are you?", max_tokens=40),
    Question("functools.partial\n\n", plain=True, max_tokens=60),
)
