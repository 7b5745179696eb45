"""The facts the demo model learns: what Python's own documentation says about its names.

Everything is read from the running interpreter: the docstrings of the standard library, of the
built-in types and of the C modules, and the language topics that `pydoc` carries. Nothing is
downloaded. The same interpreter on the same platform gives the same facts in the same order; what
other packages have put into the standard library's place is left out.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import pydoc
import re
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from demo_model.known import BUILTIN_TYPES, MODULES, SUBMODULE_ALIASES, share

Kind = Literal["module", "function", "class", "exception", "method", "property", "keyword", "topic"]

SUMMARY_LIMIT = 400
FULL_LIMIT = 1200
EVERYTHING_LIMIT = 3000

_SIGNATURE = re.compile(r"^[\w.\[\], ]*\w\(.*\)\s*(?:(?:--?>|=>|->)\s*[^.]{0,60})?$", re.DOTALL)
_SIGNATURE_LEAD = re.compile(
    r"^[\w.]+\([^)]*\)\s*(?:--?>|=>)\s*[^.\n]{1,60}?(?:\n|\.\s+|\s--\s|:\s+)(?=.{12})", re.DOTALL
)
_SENTENCE_END = re.compile(r"[.!?][)\"']?(?=\s|$)")
_PLAIN = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2026": "..."}
)
_BULLET = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s")


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented name.

    `summary` is its first paragraph on one line, at most SUMMARY_LIMIT characters and never empty.
    `full` is the opening of the whole documentation, at most FULL_LIMIT characters, its paragraphs
    separated by blank lines; `everything` is the same up to EVERYTHING_LIMIT.
    `signature` and `members` are empty where there is none.
    `copies` is how often an epoch shows it: more for names that people know.
    """

    name: str
    kind: Kind
    summary: str
    full: str
    everything: str
    signature: str
    members: tuple[str, ...]
    copies: int


def collect() -> list[Entry]:
    """Every entry, once per name, in a fixed order."""
    entries: dict[str, Entry] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in [*_builtin_entries(), *_language_entries(), *_library_entries()]:
            entries.setdefault(entry.name, entry)
    return list(entries.values())


def _builtin_entries() -> Iterator[Entry]:
    for name, thing in sorted(vars(builtins).items()):
        if name.startswith("_") or name in ("copyright", "credits", "license", "exit", "quit"):
            continue
        if callable(thing) and getattr(thing, "__name__", name) == name:
            yield from _named(name, thing, with_methods=name in BUILTIN_TYPES)


def _library_entries() -> Iterator[Entry]:
    for module_name in MODULES:
        try:
            module = importlib.import_module(SUBMODULE_ALIASES.get(module_name, module_name))
        except ImportError:
            continue
        names = _public_names(module)
        yield from _entry(module_name, "module", module, members=tuple(names))
        for name in names:
            thing = getattr(module, name)
            alias = getattr(thing, "__name__", name) != name
            yield from _named(f"{module_name}.{name}", thing, with_methods=not alias)


def _public_names(module: types.ModuleType) -> list[str]:
    """Names of the functions and classes that belong to `module`, in the order it gives them."""
    declared = getattr(module, "__all__", None)
    home = module.__name__.split(".")[0].lstrip("_")
    names = []
    for name in declared if declared is not None else sorted(vars(module)):
        thing = getattr(module, name, None)
        if name.startswith("_") or isinstance(thing, types.ModuleType) or not callable(thing):
            continue
        if _is_foreign(thing):
            continue
        owner = (getattr(thing, "__module__", None) or home).split(".")[0].lstrip("_")
        if declared is None and owner not in (home, "posix", "io", "builtins", "thread"):
            continue
        names.append(name)
    return names


def _is_foreign(thing: object) -> bool:
    """True for what a package outside the standard library has defined."""
    plain = getattr(thing, "__func__", thing)
    module = getattr(plain, "__module__", None)
    return isinstance(module, str) and module.split(".")[0] not in sys.stdlib_module_names


def _named(name: str, thing: object, *, with_methods: bool) -> Iterator[Entry]:
    """The entry of a function or class and, for a class, those of its public methods."""
    if not isinstance(thing, type):
        yield from _entry(name, "function", thing)
        return
    own = sorted(vars(thing).items())
    methods = [key for key, value in own if not key.startswith("_") and not _is_foreign(value)]
    if issubclass(thing, BaseException):
        yield from _entry(name, "exception", thing)
        return
    yield from _entry(name, "class", thing, members=tuple(methods))
    if not with_methods or (issubclass(thing, tuple) and thing is not tuple):
        return
    for key in methods:
        member = inspect.getattr_static(thing, key)
        plain = getattr(member, "__func__", member)
        kind: Kind = "method" if callable(plain) else "property"
        if not isinstance(plain, type):
            yield from _entry(f"{name}.{key}", kind, plain)


def _entry(name: str, kind: Kind, thing: object, members: tuple[str, ...] = ()) -> Iterator[Entry]:
    """One entry, or none where nothing of its own is written about the name."""
    raw = getattr(thing, "__doc__", None)
    copies = share(name)
    if not isinstance(raw, str) or not raw.strip() or copies == 0:
        return
    if kind in ("property", "function") and raw == type(thing).__doc__:
        return
    paragraphs = _paragraphs(inspect.cleandoc(raw))
    summary = _summary(paragraphs)
    if len(summary) < 8 or not summary.isascii() or " " not in summary:
        return
    signature = _signature(name, thing) if kind in ("function", "class", "method") else ""
    yield Entry(name, kind, summary, *_openings(paragraphs), signature, members, copies)


def _language_entries() -> Iterator[Entry]:
    """Keywords and topics of the language, from the text behind `help("for")`."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    labels: list[tuple[str, Kind, object]] = [
        *((name, "keyword", label) for name, label in sorted(pydoc.Helper.keywords.items())),
        *((name.lower(), "topic", label) for name, label in sorted(pydoc.Helper.topics.items())),
    ]
    for name, kind, label in labels:
        text = _topic_text(topics, label, pydoc.Helper.topics)
        if text:
            yield from _language_entry(name, kind, text)


def _topic_text(topics: Mapping[str, str], label: object, aliases: Mapping[str, object]) -> str:
    """The text a pydoc label stands for; labels may carry cross references or name each other."""
    for _ in range(4):
        if isinstance(label, tuple):
            label = label[0]
        if not isinstance(label, str) or not label:
            return ""
        if label in topics:
            return topics[label]
        label = aliases.get(label)
    return ""


def _language_entry(name: str, kind: Kind, text: str) -> Iterator[Entry]:
    prose = [p for p in _paragraphs(inspect.cleandoc(text)) if _is_prose(p)]
    if not prose:
        return
    if kind == "keyword":
        about = [p for p in prose if re.search(rf'[`"]{re.escape(name)}[`"]', p)]
        prose = about + [p for p in prose if p not in about] if about else prose
    copies = 5 if kind == "keyword" else 1
    yield Entry(name, kind, _summary(prose), *_openings(prose), "", (), copies)


def _is_prose(paragraph: str) -> bool:
    if "\n" in paragraph or "::=" in paragraph or set(paragraph) <= set("*=-~^ "):
        return False
    return len(paragraph) > 60 and paragraph[-1] in ".:)" and paragraph[0].isalpha()


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines and undo line wrapping, except in code, lists and tables."""
    found = []
    for block in re.split(r"\n\s*\n", text.translate(_PLAIN).expandtabs(4)):
        lines = [line.rstrip() for line in block.strip("\n").splitlines()]
        if not any(lines):
            continue
        shaped = any(
            line.startswith((" ", ">>>", "...", "|", "+-")) or _BULLET.match(line) for line in lines
        )
        underlined = len(lines) > 1 and set(lines[1]) <= set("*=-~^")
        found.append("\n".join(lines) if shaped or underlined else _one_line(" ".join(lines)))
    return found


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _summary(paragraphs: list[str]) -> str:
    """The first paragraph that is more than a signature, cut at a sentence's end."""
    told = paragraphs
    while len(told) > 1 and _SIGNATURE.match(told[0]):
        told = told[1:]
    text = _SIGNATURE_LEAD.sub("", told[0].strip()) if told else ""
    text = _one_line(text)
    if text.endswith(":") and len(told) > 1 and len(text) + len(told[1]) < SUMMARY_LIMIT:
        text = f"{text} {_one_line(told[1])}"
    return _cut(text, SUMMARY_LIMIT)


def _cut(text: str, limit: int) -> str:
    """`text` where it fits, else its longest run of whole sentences that does."""
    if len(text) <= limit:
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text[:limit])]
    return text[: ends[-1]] if ends else text[:limit].rsplit(" ", 1)[0]


def _openings(paragraphs: list[str]) -> tuple[str, str]:
    """As many whole paragraphs as fit FULL_LIMIT, and as many as fit EVERYTHING_LIMIT."""
    return _opening(paragraphs, FULL_LIMIT), _opening(paragraphs, EVERYTHING_LIMIT)


def _opening(paragraphs: list[str], limit: int) -> str:
    kept: list[str] = []
    for paragraph in paragraphs:
        if sum(map(len, kept)) + len(paragraph) > limit:
            break
        kept.append(paragraph)
    return "\n\n".join(kept) if kept else _cut(paragraphs[0], limit)


def _signature(name: str, thing: object) -> str:
    if not callable(thing):
        return ""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError, AttributeError):
        return ""
    text = re.sub(r"\((?:self|cls|type)(?:, /)?(?:, )?", "(", text, count=1)
    return f"{name}{text}" if len(text) < 160 and " at 0x" not in text else ""
