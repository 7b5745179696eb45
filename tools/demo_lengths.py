"""Asks the demo model what it was taught and notes how long its greedy answers are:
`python tools/demo_lengths.py OUT.json`. The experiments on length prediction read the result.

Questions are mixed as in training: a kind is answered in a few words, "everything" in a page.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

import demo_model
from baton.types import Output, Request, Sampling, Stopping
from demo_model import corpus, dialogue
from demo_model.dialogue import ASSISTANT, END, USER
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy

COUNT = 950
MAX_TOKENS = 640
MAX_PROMPT = 320
SEED = 11


def questions(count: int, seed: int) -> list[str]:
    """Distinct chats as the template renders them, up to where the model answers."""
    entries = [entry for entry in corpus.collect() if not dialogue.is_held_out(entry)]
    texts = dialogue.epoch(entries, random.Random(seed), chat_only=True)
    asked = (text[: text.rindex(ASSISTANT) + len(ASSISTANT)] for text in texts)
    return list(dict.fromkeys(asked))[:count]


def answer(executor: TorchExecutor, prompts: list[list[int]], eos: int) -> dict[int, int]:
    """Output tokens by prompt, the end-of-sequence token included; all prompts at once."""
    scheduler = DecodeScheduler(executor.capacity, make_policy("fcfs"), max_waiting=len(prompts))
    for number, ids in enumerate(prompts):
        stopping = Stopping(max_tokens=MAX_TOKENS, eos_token_ids=frozenset({eos}))
        scheduler.submit(Request(str(number), tuple(ids), Sampling(), stopping), 0.0)
    lengths = dict.fromkeys(range(len(prompts)), 0)
    left, now = len(prompts), 0.0
    while left:
        plan = scheduler.plan(now)
        assert plan is not None, "answers are left, and room for one of them"
        result = executor.execute(plan)
        now += result.seconds
        for event in scheduler.apply(plan, result, now):
            if not isinstance(event, Output):
                continue
            lengths[int(event.request_id)] += len(event.token_ids)
            if event.finish is not None:
                left -= 1
                print(f"\r{left} left ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return lengths


def main() -> None:
    """Write the lengths of COUNT answers."""
    out = Path(sys.argv[1])
    tokenizer = Tokenizer.from_file(str(demo_model.path() / "tokenizer.json"))
    texts = questions(2 * COUNT, SEED)
    pairs = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    pairs = [(text, ids) for text, ids in pairs if len(ids) <= MAX_PROMPT][:COUNT]
    eos = tokenizer.token_to_id(END)
    assert eos is not None
    executor = load_executor(demo_model.path(), max_batch_tokens=512, max_batch_sequences=128)
    executor.warm_up()
    started = time.monotonic()
    lengths = answer(executor, [ids for _, ids in pairs], eos)
    print(f"{sum(lengths.values())} tokens in {time.monotonic() - started:.0f} s", file=sys.stderr)
    rows = [
        {
            "question": text[text.rindex(USER) + len(USER) : -len(ASSISTANT)],
            "prompt_ids": ids,
            "output_tokens": lengths[number],
        }
        for number, (text, ids) in enumerate(pairs)
    ]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    out.write_text(f'{{"model": "demo", "max_tokens": {MAX_TOKENS}, "requests": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
