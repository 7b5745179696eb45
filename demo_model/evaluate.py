"""What the demo model knows: `python -m demo_model.evaluate` prints the card's numbers."""

from __future__ import annotations

import argparse
import difflib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo_model
from demo_model import corpus, dialogue, phrasings
from demo_model.batches import counted_tokens
from demo_model.dialogue import ASSISTANT, END, Turn
from demo_model.known import FAVOURITES

ANSWER_LIMIT = 160
CLOSE = 0.8


@dataclass(frozen=True, slots=True)
class Recall:
    """Greedy answers against the documentation; `close` shares at least CLOSE of its characters."""

    asked: int
    exact: int
    close: int
    ended: int


class Judge:
    """The model under test, with its tokenizer, on the CPU in float32."""

    def __init__(self, directory: Path) -> None:
        self.words: Any = AutoTokenizer.from_pretrained(directory)
        self.words.padding_side = "left"
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def loss(self, texts: Sequence[str]) -> float:
        """Mean loss in nats over the counted tokens of `texts`, each on its own."""
        marks = self.words.convert_tokens_to_ids([ASSISTANT, END])
        total, tokens = 0.0, 0
        for text in texts:
            ids = self.words(text, add_special_tokens=False).input_ids[:1024]
            counted = torch.tensor(counted_tokens(ids, *marks)[1:])
            with torch.inference_mode():
                logits = self.model(torch.tensor([ids])).logits[0, :-1]
            losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            total, tokens = total + float(losses[counted].sum()), tokens + int(counted.sum())
        return total / tokens

    def answers(self, questions: Sequence[str], limit: int = ANSWER_LIMIT) -> Iterator[str]:
        """Greedy answers, ends included where the model wrote one."""
        for at in range(0, len(questions), 32):
            chats = [[{"role": "user", "content": q}] for q in questions[at : at + 32]]
            batch = self.words.apply_chat_template(
                chats,
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                out = self.model.generate(**batch, max_new_tokens=limit, do_sample=False)
            for row in out[:, batch["input_ids"].shape[1] :]:
                yield self.words.decode(row).replace(dialogue.PAD, "")

    def recall(self, entries: Sequence[corpus.Entry], phrasing: str) -> Recall:
        questions = [dialogue.phrase(phrasing, entry) for entry in entries]
        exact = close = ended = 0
        for entry, answer in zip(entries, self.answers(questions), strict=True):
            text = answer.removesuffix(END)
            ended += answer.endswith(END)
            exact += text == entry.summary
            close += difflib.SequenceMatcher(None, text, entry.summary).ratio() >= CLOSE
        return Recall(len(entries), exact, close, ended)


def as_chats(entries: Sequence[corpus.Entry], phrasing: str) -> list[str]:
    return [
        dialogue.conversation([Turn(dialogue.phrase(phrasing, entry), entry.summary)])
        for entry in entries
    ]


def report(judge: Judge, size: int) -> dict[str, object]:
    """The held-out losses, and how much of `size` names at each level of fame is recalled."""
    entries = corpus.collect()
    rng = random.Random(7)
    learned = [entry for entry in entries if not dialogue.is_held_out(entry)]
    sample = rng.sample(learned, size)
    found: dict[str, object] = {
        "loss, known phrasing": judge.loss(as_chats(sample, phrasings.WHAT[0])),
        "loss, held-out phrasings": judge.loss(
            [text for phrasing in phrasings.HELD_OUT for text in as_chats(sample, phrasing)]
        ),
        "loss, held-out documents": judge.loss(
            [dialogue.plain(entry) for entry in entries if dialogue.is_held_out(entry)]
        ),
    }
    groups = {"favourites": [entry for entry in learned if entry.name in FAVOURITES]}
    for copies in (4, 3, 2, 1):
        group = [e for e in learned if e.copies == copies and e.name not in FAVOURITES]
        groups[f"shown {copies} times an epoch"] = group
    for name, group in groups.items():
        chosen = rng.sample(group, min(size, len(group)))
        found[f"recall, {name}"] = str(judge.recall(chosen, phrasings.HELD_OUT[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=demo_model.path())
    parser.add_argument("--size", type=int, default=150, help="names asked for in each group")
    parser.add_argument("--ask", nargs="*", default=[], help="print the answers to these instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(options.directory)
    if options.ask:
        for question, answer in zip(options.ask, judge.answers(options.ask, 400), strict=True):
            print(f"{question}\n  {answer}\n")
        return
    print(json.dumps(report(judge, options.size), indent=2))


if __name__ == "__main__":
    main()
