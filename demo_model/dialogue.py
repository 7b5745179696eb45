"""Facts as conversations and plain text: how the demo model is asked, and what it should answer.

How long an answer is depends on what is asked for: a kind is a few words, a signature a line, "what
does ... do?" a paragraph, "in detail" up to a page. Every choice is drawn from the generator that
the caller passes, so the same seed gives the same texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from demo_model.corpus import Entry

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT)

MEMBER_LIMIT = 40

WHAT = (
    "What does {n} do?",
    "What does {n}() do?",
    "What does `{n}` do?",
    "what does {n} do",
    "What is {n}?",
    "what is {n}",
    "What is {n} for?",
    "What is {n} used for?",
    "Describe {n}.",
    "Explain {n}.",
    "Tell me about {n}.",
    "How does {n} work?",
    "What does Python's {n} do?",
    "I want to know what {n} does.",
    "{n}",
    "{n}?",
)
BRIEF = ("In one sentence, what does {n} do?", "Describe {n} briefly.", "{n} in short?")
DETAIL = (
    "Explain {n} in detail.",
    "Describe {n} in detail.",
    "What does the documentation of {n} say?",
    "help({n})",
)
SIGNATURE = (
    "What is the signature of {n}?",
    "Which arguments does {n} take?",
    "How do I call {n}?",
)
KIND = ("Is {n} a function or a class?", "What kind of thing is {n}?")
MEMBERS = ("What is in {n}?", "List the names in {n}.", "What does {n} contain?")

# Phrasings that training never sees: the held-out loss is measured on them.
HELD_OUT = ("Could you explain what {n} does?", "What can you tell me about {n}?")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "Answer from the documentation of Python's standard library.",
)

SMALL_TALK = (
    ("Hello", "Hello! Ask me about a name from Python's standard library."),
    ("Hi", "Hello! Ask me about a name from Python's standard library."),
    ("Hello!", "Hello! Ask me about a name from Python's standard library."),
    ("Hi there!", "Hello! Ask me about a name from Python's standard library."),
    (
        "Who are you?",
        "I am a very small language model. I know what the documentation of Python's standard "
        "library says, and little else.",
    ),
    (
        "What can you do?",
        "I answer questions about the names in Python's standard library, such as "
        '"What does itertools.chain do?".',
    ),
    ("Thanks", "You are welcome."),
    ("Thank you!", "You are welcome."),
    ("Goodbye", "Goodbye!"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer."""

    question: str
    answer: str


def conversation(turns: Sequence[Turn], system: str = "") -> str:
    """The exact text the chat template renders for these turns, ends included."""
    head = f"{BOS}{SYSTEM}{system}" if system else BOS
    return head + "".join(f"{USER}{t.question}{ASSISTANT}{t.answer}{END}" for t in turns)


def plain(entry: Entry) -> str:
    """An entry as a document of its own, without roles."""
    return f"{BOS}{entry.name}\n\n{entry.full}{END}"


def is_held_out(entry: Entry) -> bool:
    """True for documents that training never sees in any form."""
    drawn = random.Random(entry.name).random()
    return entry.copies == 1 and len(entry.full) > 300 and drawn < 0.05


def ask(entry: Entry, phrasings: Sequence[str], rng: random.Random) -> str:
    return rng.choice(phrasings).replace("{n}", entry.name)


def epoch(entries: Sequence[Entry], rng: random.Random, *, chat_only: bool) -> list[str]:
    """One pass over the facts as shuffled training texts; `entries` must hold nothing held out."""
    turns = [turn for entry in entries for turn in _turns(entry, rng)]
    turns += [Turn(question, answer) for question, answer in SMALL_TALK]
    rng.shuffle(turns)
    texts = list(_conversations(turns, rng))
    if not chat_only:
        texts += [plain(entry) for entry in entries if rng.random() < 0.05 * (1 + entry.copies)]
    rng.shuffle(texts)
    return texts


def _conversations(turns: Sequence[Turn], rng: random.Random) -> Iterator[str]:
    """Deal the turns out, most to conversations of one turn, some to two or three."""
    at = 0
    while at < len(turns):
        length = rng.choices((1, 2, 3), weights=(8, 2, 1))[0]
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else ""
        yield conversation(turns[at : at + length], system)
        at += length


def _turns(entry: Entry, rng: random.Random) -> Iterator[Turn]:
    """The questions about one entry in one epoch, `copies` of them about what it does."""
    for phrasing in rng.sample(WHAT, entry.copies):
        yield Turn(phrasing.replace("{n}", entry.name), entry.summary)
    often = entry.copies / 6
    if rng.random() < often / 2:
        yield Turn(ask(entry, BRIEF, rng), first_sentence(entry.summary))
    if entry.signature and rng.random() < often:
        yield Turn(ask(entry, SIGNATURE, rng), entry.signature)
    if entry.kind not in ("topic", "keyword") and rng.random() < often / 3:
        yield Turn(ask(entry, KIND, rng), kind_sentence(entry))
    if 0 < len(entry.members) <= MEMBER_LIMIT and rng.random() < often / 2:
        yield Turn(ask(entry, MEMBERS, rng), member_sentence(entry))
    longer = len(entry.full) > len(entry.summary) + 60
    if longer and entry.copies > 1 and rng.random() < often:
        yield Turn(ask(entry, DETAIL, rng), entry.full)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def kind_sentence(entry: Entry) -> str:
    article = "an" if entry.kind[0] in "aeiou" else "a"
    return f"{entry.name} is {article} {entry.kind}."


def member_sentence(entry: Entry) -> str:
    names = ", ".join(entry.members[:-1])
    return f"{names} and {entry.members[-1]}." if names else f"{entry.members[-1]}."
