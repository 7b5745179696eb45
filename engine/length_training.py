"""Fine-tunes a transformers classifier of output lengths on recorded traffic (S3 section 4.1).

Records are the gateway's (`--record-lengths`), one JSON object a line: `text`, `output_tokens`,
`finish` ("stop" if the output ended by itself) and `max_tokens`. An output that was cut counts as
"in this bucket or a longer one".
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from baton.errors import ModelError
from baton.length_classifier import clipped, write_edges
from scheduling.length_buckets import Buckets
from scheduling.length_report import TALLIES, Judged, LengthReport, report

_PAD, _UNKNOWN, _BEGIN, _END, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_MAX_INPUT = 512
_QUANTILE = 0.9
_CLIP = 1.0  # norm of a gradient


@dataclass(frozen=True, slots=True)
class Record:
    """One output. `cut`: it would have gone on."""

    text: str
    tokens: int
    cut: bool
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Training:
    """How to train. `base`: a directory to start from, else a small DistilBERT from nothing."""

    base: Path | None = None
    epochs: int = 3
    batch: int = 32
    learning_rate: float = 5e-5
    held_out: float = 0.1
    seed: int = 0


def read_records(path: Path) -> list[Record]:
    """The usable lines of a recording. Raises ModelError for one that is not a record."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            tokens, cut = int(entry["output_tokens"]), entry["finish"] != "stop"
            record = Record(str(entry["text"]), tokens, cut, int(entry["max_tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}:{number}: not a record of a length: {error}") from error
        if tokens > 0:
            records.append(record)
    return records


def train(
    records: Sequence[Record],
    buckets: Buckets,
    out: Path,
    how: Training,
    progress: Callable[[str], None] = lambda line: None,
) -> LengthReport | None:
    """Train on most of `records`, save the classifier to `out`, and judge it by the rest.

    None if no record was held out. Raises ModelError if there is nothing to train on, or
    `how.base` cannot be read.
    """
    rng = random.Random(how.seed)
    torch.manual_seed(how.seed)
    shuffled = list(records)
    rng.shuffle(shuffled)
    count = round(len(shuffled) * how.held_out)
    held_out, learned = shuffled[:count], shuffled[count:]
    if not learned:
        raise ModelError("no records to train on")
    tokenizer, model = _start(how.base, [record.text for record in learned], len(buckets))
    longest = min(_MAX_INPUT, int(model.config.max_position_embeddings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.learning_rate, weight_decay=0.01)
    model.train()
    for epoch in range(how.epochs):
        rng.shuffle(learned)
        losses = []
        for batch in _batches(learned, how.batch):
            loss = _loss(model(**_inputs(tokenizer, batch, longest)).logits, batch, buckets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            losses.append(float(loss.detach()))
        progress(f"epoch {epoch + 1} of {how.epochs}: loss {np.mean(losses):.3f}")
    model.eval()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    write_edges(out, buckets.edges)
    return _judge(model, tokenizer, longest, learned, held_out, buckets)


def _start(base: Path | None, texts: Sequence[str], classes: int) -> tuple[Any, Any]:
    """A tokenizer and a model with this many classes."""
    if base is not None:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
            model = AutoModelForSequenceClassification.from_pretrained(
                base,
                num_labels=classes,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{base}: cannot be fine-tuned: {error}") from error
        return tokenizer, model
    tokenizer = word_pieces(texts)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=128,
        hidden_dim=512,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=_MAX_INPUT,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = classes
    return tokenizer, DistilBertForSequenceClassification(config)


def word_pieces(texts: Sequence[str], size: int = 8192) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of at most `size` pieces, made from `texts`."""
    pieces = Tokenizer(models.WordPiece(unk_token=_UNKNOWN))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[_PAD, _UNKNOWN, _BEGIN, _END, _MASK], show_progress=False
    )
    pieces.train_from_iterator([clipped(text) for text in texts], trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A {_END}",
        special_tokens=[(mark, pieces.token_to_id(mark)) for mark in (_BEGIN, _END)],
    )
    whole: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = whole(
        tokenizer_object=pieces,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        cls_token=_BEGIN,
        sep_token=_END,
        mask_token=_MASK,
        model_input_names=["input_ids", "attention_mask"],
    )
    return made


def _batches(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


def _inputs(tokenizer: Any, batch: Sequence[Record], longest: int) -> Any:
    return tokenizer(
        [clipped(record.text) for record in batch],
        truncation=True,
        max_length=longest,
        padding=True,
        return_tensors="pt",
    )


def _loss(logits: torch.Tensor, batch: Sequence[Record], buckets: Buckets) -> torch.Tensor:
    """Mean negative log-likelihood of the bucket, or of it and all longer ones if it was cut."""
    possible = torch.zeros_like(logits)
    for row, record in enumerate(batch):
        bucket = buckets.of(record.tokens)
        possible[row, bucket : None if record.cut else bucket + 1] = 1
    masked = logits + possible.log()  # [batch, buckets]
    return (logits.logsumexp(-1) - masked.logsumexp(-1)).mean()


@torch.inference_mode()
def _judge(
    model: Any,
    tokenizer: Any,
    longest: int,
    learned: Sequence[Record],
    held_out: Sequence[Record],
    buckets: Buckets,
) -> LengthReport | None:
    """Held-out records whose length was served, beside the frequencies of the training part."""
    counts, sums = np.full(len(buckets), 0.05), np.zeros(len(buckets))
    sums += counts * [buckets.middle(i) for i in range(len(buckets))]
    for record in learned:
        if not record.cut:
            bucket = buckets.of(record.tokens)
            counts[bucket] += 1
            sums[bucket] += record.tokens
    lengths, frequencies = sums / counts, counts / counts.sum()
    tallies = np.zeros(TALLIES)
    served = [r for r in held_out if not r.cut or r.tokens >= r.max_tokens]
    for batch in _batches(served, 32):
        rows = model(**_inputs(tokenizer, batch, longest)).logits.softmax(-1).double().numpy()
        for record, row in zip(batch, rows, strict=True):
            last = buckets.of(record.max_tokens)
            seen, usual = (_cut(p, last) for p in (row, frequencies))
            enough = min(int(np.searchsorted(seen.cumsum(), _QUANTILE)), last)
            within = np.minimum(lengths, record.max_tokens)
            tallies += Judged(
                bucket=min(buckets.of(record.tokens), last),
                named=int(seen.argmax()),
                majority=int(usual.argmax()),
                confidence=float(seen.max()),
                tokens=record.tokens,
                expected=float(row @ within),
                mean=float(frequencies @ within),
                allotment=min(buckets.edges[enough], record.max_tokens),
            ).tally()
    return report(tallies, len(learned))


def _cut(probabilities: Any, last: int) -> Any:
    """What lies beyond the last bucket ends in it."""
    cut = probabilities[: last + 1].copy()
    cut[last] += probabilities[last + 1 :].sum()
    return cut
