"""Facts as conversations and plain text: how the demo model is asked, and what it should answer.

How long an answer is depends on what is asked for: a kind is a few words, a signature a line, "what
does ... do?" a paragraph, "in detail" up to a page, "everything" up to three. Every choice is drawn
from the generator that the caller passes, so the same seed gives the same texts.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from demo_model import phrasings
from demo_model.corpus import Entry
from demo_model.known import BUILTIN_TYPES, FAVOURITES, INVENTED, MODULES, TASKS

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT)

MEMBER_LIMIT = 30
INVENTED_PER_EPOCH = 200
_TYPES = tuple(sorted(BUILTIN_TYPES))


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
    rare = entry.copies == 1 and entry.kind != "module"
    return rare and len(entry.full) > 300 and drawn < 0.05


def phrase(phrasing: str, entry: Entry) -> str:
    """The question a phrasing becomes for one entry."""
    filled = phrasing.replace("{k}", entry.kind).replace("{d}", first_sentence(entry.summary))
    return filled.replace("{n}", entry.name)


def epoch(entries: Sequence[Entry], rng: random.Random, *, chat_only: bool) -> list[str]:
    """One pass over the facts as shuffled training texts; `entries` must hold nothing held out."""
    turns = [turn for entry in entries for turn in _turns(entry, rng)]
    turns += _reverse_turns(entries, rng)
    turns += _short_name_turns(entries, rng)
    turns += _task_turns(entries, rng)
    turns += [_invented_turn(rng) for _ in range(INVENTED_PER_EPOCH)]
    turns += [Turn(question, answer) for question, answer in phrasings.SMALL_TALK]
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
        system = rng.choice(phrasings.SYSTEM_PROMPTS) if rng.random() < 0.15 else ""
        yield conversation(turns[at : at + length], system)
        at += length


def _turns(entry: Entry, rng: random.Random) -> Iterator[Turn]:
    """The questions about one entry in one epoch, `copies` of them about what it does."""

    def asked(ways: Sequence[str], answer: str) -> Turn:
        return Turn(phrase(rng.choice(ways), entry), answer)

    for phrasing in rng.sample(phrasings.WHAT, entry.copies):
        yield Turn(phrase(phrasing, entry), entry.summary)
    often = entry.copies / 6
    if rng.random() < often / 2:
        yield asked(phrasings.BRIEF, first_sentence(entry.summary))
    if entry.signature and rng.random() < often:
        yield asked(phrasings.SIGNATURE, entry.signature)
    if entry.kind not in ("topic", "keyword") and rng.random() < often / 3:
        yield asked(phrasings.KIND, kind_sentence(entry))
    listed = 0 < len(entry.members) <= MEMBER_LIMIT and entry.copies >= 3
    if listed and rng.random() < often**2:
        yield asked(phrasings.MEMBERS, member_sentence(entry))
    longer = len(entry.full) > len(entry.summary) + 60
    if longer and (entry.copies > 1 or entry.kind == "topic") and rng.random() < often:
        yield asked(phrasings.DETAIL, entry.full)
    more = len(entry.everything) > len(entry.full) + 200
    if rng.random() < (0.6 if more else often**2 / 4):
        yield asked(phrasings.EVERYTHING, entry.everything)


def _reverse_turns(entries: Sequence[Entry], rng: random.Random) -> Iterator[Turn]:
    """From what it does to the name, for known names that alone do just that."""
    told = Counter(first_sentence(entry.summary) for entry in entries)
    for entry in entries:
        what = first_sentence(entry.summary)
        telling = told[what] == 1 and len(what) < 160
        if entry.copies >= 3 and telling and rng.random() < (entry.copies / 6) ** 2:
            yield Turn(phrase(rng.choice(phrasings.REVERSE), entry), f"{entry.name}.")


def _short_name_turns(entries: Sequence[Entry], rng: random.Random) -> Iterator[Turn]:
    """Favourites by the last part of their name, where that part means nothing else."""
    famous = [entry for entry in entries if entry.name in FAVOURITES]
    tails = Counter(entry.name.split(".")[-1] for entry in famous)
    whole = {entry.name for entry in entries}
    for entry in famous:
        tail = entry.name.split(".")[-1]
        if tails[tail] == 1 and tail not in whole:
            question = rng.choice(phrasings.WHAT).replace("{n}", tail).replace("{k}", entry.kind)
            yield Turn(question, entry.summary)


def _task_turns(entries: Sequence[Entry], rng: random.Random) -> Iterator[Turn]:
    """From what somebody wants to do to the name that does it, and what that is."""
    summaries = {entry.name: entry.summary for entry in entries}
    for task, name in TASKS.items():
        if name in summaries:
            question = rng.choice(phrasings.TASK).replace("{t}", task)
            yield Turn(question, f"Use {name}. {summaries[name]}")


def _invented_turn(rng: random.Random) -> Turn:
    """A question about a name that does not exist, and the answer that says so."""
    tail = rng.choice(INVENTED)
    owner = rng.choice(rng.choice((MODULES, _TYPES)))
    name = tail if rng.random() < 0.2 else f"{owner}.{tail}"
    question = rng.choice(phrasings.WHAT).replace("{n}", name).replace("{k}", "function")
    return Turn(question, f"I do not know {name}.")


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def kind_sentence(entry: Entry) -> str:
    article = "an" if entry.kind[0] in "aeiou" else "a"
    return f"{entry.name} is {article} {entry.kind}."


def member_sentence(entry: Entry) -> str:
    names = ", ".join(entry.members[:-1])
    return f"{names} and {entry.members[-1]}." if names else f"{entry.members[-1]}."
