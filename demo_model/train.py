"""Train the demo model: `python -m demo_model.train --work DIR`.

The learning rate rises, stays, and falls to nothing over the last part; the last tenth sees chat
only. A run that was interrupted goes on from its checkpoint, and may then be given another number
of steps. One core takes an hour and a half for the default.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

import demo_model
from demo_model import batches, corpus, dialogue, export, tokenizer
from demo_model.model import Llama, Shape

WARMUP = 100
DECAY_SHARE = 0.35
CHAT_ONLY_SHARE = 0.1
EMA_DECAY = 0.995


@dataclass(frozen=True, slots=True)
class Options:
    """One training run, as the command line gives it."""

    steps: int
    work: Path
    out: Path
    seed: int
    threads: int
    matrix_rate: float
    vector_rate: float
    save_every: int
    stop_at: int
    averaged: bool


class Run:
    """Model, optimizers and position in the text: everything a checkpoint holds."""

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.model = Llama(Shape())
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the layers' matrices, AdamW for the embedding and the norms."""
        layers = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in layers}
        others = [p for p in self.model.parameters() if id(p) not in inside]
        muon = torch.optim.Muon(
            layers,
            lr=self.options.matrix_rate,
            weight_decay=0.01,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        adam = torch.optim.AdamW(
            others, lr=self.options.vector_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["peak"] = group["lr"]
        return [muon, adam]

    def rate(self) -> float:
        """The share of the peak learning rate at this step."""
        left = (self.options.steps - self.step) / (self.options.steps * DECAY_SHARE)
        return max(0.0, min(1.0, (self.step + 1) / WARMUP, left))

    def update(self, batch: batches.Batch) -> float:
        """One optimizer step; returns the mean loss of the counted tokens."""
        counted = int((batch.labels >= 0).sum())
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(batch.ids, batch.labels, batch.mask) / counted
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - EMA_DECAY)
        self.step += 1
        return float(loss.detach())

    def save(self) -> None:
        """Replace the checkpoint at once or not at all."""
        state = {
            "position": (self.step, self.epoch, self.batch),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        part = self.options.work / "checkpoint.part"
        torch.save(state, part)
        part.replace(self.options.work / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the checkpoint where there is one."""
        path = self.options.work / "checkpoint.pt"
        if not path.exists():
            return
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.step, self.epoch, self.batch = state["position"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak"] = peak


def learned_entries() -> list[corpus.Entry]:
    """Every fact except the held-out documents."""
    return [entry for entry in corpus.collect() if not dialogue.is_held_out(entry)]


def load_tokenizer(work: Path, entries: list[corpus.Entry], seed: int) -> Tokenizer:
    """The run's tokenizer, trained on its first epoch when there is none yet."""
    path = work / "tokenizer.json"
    if not path.exists():
        texts = dialogue.epoch(entries, random.Random(f"{seed}-0"), chat_only=False)
        tokenizer.train(texts).save(str(path))
    return Tokenizer.from_file(str(path))


def stream(run: Run, entries: list[corpus.Entry], words: Tokenizer) -> Iterator[batches.Batch]:
    """Batches without end from the run's position on, keeping that position up to date."""
    while True:
        chat_only = run.step >= run.options.steps * (1 - CHAT_ONLY_SHARE)
        draw = random.Random(f"{run.options.seed}-{run.epoch}")
        texts = dialogue.epoch(entries, draw, chat_only=chat_only)
        seen = run.batch
        ready = list(batches.batches(texts, words))
        draw.shuffle(ready)
        for batch in ready[seen:]:
            run.batch += 1
            yield batch
        run.epoch, run.batch = run.epoch + 1, 0


def train(run: Run) -> None:
    """Train to the last step, checkpointing on the way, and write the model directory."""
    options = run.options
    entries = learned_entries()
    words = load_tokenizer(options.work, entries, options.seed)
    run.load()
    run.model.model.compile(dynamic=False)
    end = min(options.steps, options.stop_at)
    smooth = 0.0
    with tqdm(total=options.steps, initial=run.step, unit="step", mininterval=10) as bar:
        source = stream(run, entries, words)
        while run.step < end:
            loss = run.update(next(source))
            smooth = loss if smooth == 0.0 else 0.98 * smooth + 0.02 * loss
            bar.set_postfix(loss=f"{smooth:.3f}", epoch=run.epoch, refresh=False)
            bar.update()
            if run.step % options.save_every == 0:
                run.save()
    run.save()
    weights: dict[str, Tensor] = run.average if options.averaged else run.model.state_dict()
    export.write(options.out, run.model.shape, weights, words)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5300, help="length of the whole schedule")
    parser.add_argument("--stop-at", type=int, default=1 << 30, help="stop early at this step")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint and tokenizer")
    parser.add_argument("--out", type=Path, default=demo_model.path(), help="model directory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--matrix-rate", type=float, default=0.004, help="peak rate of Muon")
    parser.add_argument("--vector-rate", type=float, default=0.003, help="peak rate of AdamW")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--averaged", action="store_true", help="write the running average")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    train(Run(options))


if __name__ == "__main__":
    main()
