"""What number formats cost in accuracy, on the demo model.

    python -m benchmarks.accuracy [--texts 150] [--threads N] [--out DIR]

Every format reads the same texts and generates from their openings; float32 in plain torch is what
it is compared with. Texts are the demo model's own (demo_model/): chats that it was taught
and knows by heart, documents that it has seen a few times, and documents that it has never seen.
Counted are the positions that its training counts: answers and documents.

Perplexity is also computed by transformers, as a check of the method.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from transformers.utils import logging as transformers_logging

import demo_model
from baton import cores
from baton.types import Request, Sampling, Stopping
from benchmarks.formats import FORMATS
from demo_model import corpus, dialogue, phrasings
from demo_model.batches import counted_tokens
from demo_model.dialogue import ASSISTANT, END
from demo_model.evaluate import Judge, as_chats
from engine.bench.records import Record, Setup, plain, save
from engine.bench.tables import Table
from engine.model.config import read_config
from engine.model.runner import TorchExecutor
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence as Running

BATCH = 16  # sequences that generate together
OPENING = 24  # tokens of a document that are given
GENERATED = 128  # most tokens of an answer
CONTEXT = 1024  # the model's; longer texts are cut
MODEL = "demo model"


@dataclass(frozen=True, slots=True)
class Text:
    """A text as tokens: which of them count, and how many are given to generate from."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]
    given: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What one format made of the texts of one kind."""

    nats: float  # mean loss over what counts
    best: tuple[int, ...]  # the likeliest token at each place that counts
    answers: tuple[tuple[int, ...], ...]  # greedy, ends included


@click.command()
@click.option("--texts", default=150, show_default=True, help="most texts of each kind")
@click.option("--threads", default=0, help="threads of the model; all cores if 0")
@click.option("--out", type=click.Path(path_type=Path), help="folder for accuracy.json")
def main(texts: int, threads: int, out: Path | None) -> None:
    """Read and generate in every format, and say how far each is from float32."""
    logging: Any = transformers_logging  # most of it has no types
    logging.disable_progress_bar()
    records = measure(kinds_of_text(texts), threads or cores.available())
    Console(width=140).print(table(records).rich())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        save(out / "accuracy.json", records)


def kinds_of_text(most: int) -> dict[str, list[str]]:
    """The texts: a fixed choice of at most so many of each kind."""
    entries = corpus.collect()
    chooser = random.Random(7)
    unseen = [entry for entry in entries if dialogue.is_held_out(entry)]
    learned = chooser.sample([e for e in entries if not dialogue.is_held_out(e)], most)
    return {
        "chats": as_chats(learned, phrasings.WHAT[0]),
        "documents": [dialogue.plain(entry) for entry in learned],
        "held out": [dialogue.plain(entry) for entry in unseen[:most]],
    }


def measure(kinds: dict[str, list[str]], threads: int) -> list[Record]:
    """Records of all formats, in their order, and of transformers."""
    judge = Judge(demo_model.path())
    texts = {kind: encode(judge, found) for kind, found in kinds.items()}
    made: dict[Setup, dict[str, Reading]] = {}
    for wanted in FORMATS:
        executor = wanted.load(
            threads=threads,
            max_batch_tokens=CONTEXT,
            max_batch_sequences=BATCH,
            kv_memory=2**30,
        )
        setup = Setup("baton", wanted.backend_of(executor), MODEL, wanted.name, threads)
        if setup not in made:  # where nothing is compiled, two names may be the same
            made[setup] = {
                kind: read(executor, those, wanted.name) for kind, those in texts.items()
            }
    reference = next(iter(made.values()))
    records = []
    for kind, found in kinds.items():
        checked = {"perplexity": math.exp(judge.loss(found))}
        records += plain(Setup("transformers", "torch", MODEL, "float32", threads), kind, checked)
        for setup, readings in made.items():
            values = compare(readings[kind], reference[kind])
            records += plain(setup, kind, values, batch=len(found))
    return records


def encode(judge: Judge, texts: Iterable[str]) -> list[Text]:
    """As the model's own tokenizer has them, cut to its context."""
    assistant, end = judge.words.convert_tokens_to_ids([ASSISTANT, END])
    encoded = []
    for text in texts:
        ids = tuple(judge.words(text, add_special_tokens=False).input_ids[:CONTEXT])
        given = ids.index(assistant) + 1 if assistant in ids else OPENING
        encoded.append(Text(ids, tuple(counted_tokens(list(ids), assistant, end)), given))
    return encoded


def read(executor: TorchExecutor, texts: Sequence[Text], name: str) -> Reading:
    """Each text in one pass, then answers from their openings, several at once."""
    losses, best = [], []
    for text in track(texts, f"{name}: reading", transient=True):
        sequence = start(executor, 0, text.ids, Stopping(1), prompt_logprobs=1)
        plan = StepPlan((Chunk(sequence, 0, len(text.ids), sample=True),))
        (found,) = executor.execute(plan).prompt_logprobs
        counts = [one for one, counted in zip(found, text.counted[1:], strict=True) if counted]
        losses += [-one.logprob for one in counts]
        best += [one.top[0][0] for one in counts]
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    answers: list[tuple[int, ...]] = []
    for batch in track(batches, f"{name}: generating", transient=True):
        answers += generate(executor, [text.ids[: text.given] for text in batch])
    return Reading(math.fsum(losses) / len(losses), tuple(best), tuple(answers))


def generate(
    executor: TorchExecutor, prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[int, ...]]:
    """Greedy answers, until the end that the model gives them or GENERATED tokens."""
    end = read_config(demo_model.path()).source.eos_token_id
    stopping = Stopping(GENERATED, eos_token_ids=frozenset({end}))
    sequences = [start(executor, i, prompt, stopping) for i, prompt in enumerate(prompts)]
    live = sequences
    while live:
        left, chunks = executor.capacity.max_tokens, []
        for sequence in live:
            length = min(left, sequence.uncomputed)
            if length:
                last = length == sequence.uncomputed
                chunks.append(Chunk(sequence, sequence.computed, length, sample=last))
            left -= length
        result = executor.execute(StepPlan(tuple(chunks)))
        for chunk, sampled in zip(chunks, result.sampled, strict=True):
            chunk.sequence.computed += chunk.length
            if sampled is not None:
                chunk.sequence.finish = chunk.sequence.append(sampled.token_id)
        live = [sequence for sequence in live if sequence.finish is None]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        yield tuple(sequence.tokens[len(prompt) :])


def start(
    executor: TorchExecutor,
    index: int,
    prompt: Sequence[int],
    stopping: Stopping,
    prompt_logprobs: int | None = None,
) -> Running:
    """A sequence with the blocks of its place, enough for prompt and answer."""
    request = Request(
        f"accuracy-{index}", tuple(prompt), Sampling(), stopping, prompt_logprobs=prompt_logprobs
    )
    sequence = Running.start(request, 0, now=0.0)
    needed = executor.capacity.blocks_for(len(prompt) + stopping.max_tokens)
    first = index * executor.capacity.blocks_for(CONTEXT)
    sequence.blocks = list(range(first, first + needed))
    return sequence


def compare(found: Reading, reference: Reading) -> dict[str, float]:
    """Metrics of one format. `same_tokens`: mean tokens before an answer first differs from the
    reference's, all of them where it does not; `answer_tokens`: mean length of the reference's."""
    alike = [a == b for a, b in zip(found.best, reference.best, strict=True)]
    pairs = list(zip(found.answers, reference.answers, strict=True))
    same = [shared(a, b) for a, b in pairs]
    return {
        "perplexity": math.exp(found.nats),
        "perplexity_ratio": math.exp(found.nats - reference.nats),
        "counted_tokens": float(len(alike)),
        "agreement": sum(alike) / len(alike),
        "same_tokens": sum(same) / len(pairs),
        "answer_tokens": sum(len(b) for _, b in pairs) / len(pairs),
        "same_answers": sum(a == b for a, b in pairs) / len(pairs),
    }


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def table(records: Sequence[Record]) -> Table:
    """A row for each kind of text and format."""
    rows: dict[tuple[str, Setup], dict[str, float]] = {}
    for record in records:
        rows.setdefault((record.workload, record.setup), {})[record.metric] = record.value
    return Table(
        "Accuracy of number formats, on the demo model",
        (
            *("text", "weights and KV", "backend", "perplexity", "of float32's"),
            *("same likeliest token", "tokens until the first other", "of", "same answers"),
        ),
        [(kind, *_cells(setup, values)) for (kind, setup), values in rows.items()],
    )


def _cells(setup: Setup, values: dict[str, float]) -> tuple[str, ...]:
    if "agreement" not in values:
        return setup.precision, setup.system, f"{values['perplexity']:.4f}", *("",) * 5
    return (
        setup.precision,
        setup.backend,
        f"{values['perplexity']:.4f}",
        f"{values['perplexity_ratio']:.4f}",
        f"{values['agreement']:.2%}",
        f"{values['same_tokens']:.1f}",
        f"{values['answer_tokens']:.1f}",
        f"{values['same_answers']:.1%}",
    )


if __name__ == "__main__":
    main()
