"""A transformers classifier of output lengths, in a process of its own:
`python -m engine.length_classifier DIR`. A gateway starts it and speaks to it through its
standard input and output (baton/length_classifier.py): gateways have no torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from baton.errors import ModelError
from baton.length_classifier import Message, clipped, frame, read_edges, unframe

MAX_BATCH = 16
MAX_INPUT = 512  # tokens, for models that do not say
_READ = 1 << 16


class LengthClassifier:
    """Probabilities of length buckets by prompt text. Weights come from safetensors only, and
    no code from the directory is run."""

    def __init__(self, directory: Path, threads: int = 1) -> None:
        """Raises ModelError."""
        torch.set_num_threads(threads)
        self.edges = read_edges(directory)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            self._model: Any = AutoModelForSequenceClassification.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory}: not a length classifier: {error}") from error
        config = self._model.config
        if config.num_labels != len(self.edges):
            raise ModelError(
                f"{directory}: the model has {config.num_labels} classes, its buckets are "
                f"{len(self.edges)}"
            )
        self._longest = int(getattr(config, "max_position_embeddings", MAX_INPUT))

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> list[list[float]]:
        """One row per text, one number per bucket."""
        batch = self._tokenizer(
            [clipped(text) for text in texts],
            truncation=True,
            max_length=self._longest,
            padding=True,
            return_tensors="pt",
        )
        logits = self._model(**batch).logits.float()
        rows: list[list[float]] = logits.softmax(-1).tolist()
        return rows


def serve(classifier: LengthClassifier, source: int, sink: int) -> None:
    """Answer the texts that come in at `source`, those that wait together, until it ends."""
    _write(sink, {"edges": list(classifier.edges)})
    buffer = bytearray()
    while data := os.read(source, _READ):
        buffer += data
        asked = unframe(buffer)
        for start in range(0, len(asked), MAX_BATCH):
            batch = asked[start : start + MAX_BATCH]
            rows = classifier.probabilities([str(message["text"]) for message in batch])
            for message, row in zip(batch, rows, strict=True):
                _write(sink, {"id": message["id"], "probabilities": row})


def _write(sink: int, message: Message) -> None:
    data = memoryview(frame(message))
    while data:
        data = data[os.write(sink, data) :]


def main() -> None:
    """Serve a directory until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    sink = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no frame
    try:
        classifier = LengthClassifier(arguments.directory, arguments.threads)
        serve(classifier, sys.stdin.fileno(), sink)
    except ModelError as error:
        sys.exit(f"{error}")
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)


if __name__ == "__main__":
    main()
