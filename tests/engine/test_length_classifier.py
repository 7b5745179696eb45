"""A tiny DistilBERT learns lengths from records, is saved, loaded, and serves as a process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.errors import ModelError
from baton.length_classifier import frame, unframe, write_edges
from engine.length_classifier import LengthClassifier
from engine.length_training import Record, Training, read_records, train, word_pieces
from scheduling.length_buckets import Buckets

BUCKETS = Buckets((16, 64, 256))
WORDS = {"kind": 8, "briefly": 40, "detail": 200}
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def records(count: int, seed: int = 1) -> list[Record]:
    """One word of each text says how long the output is."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        word, tokens = rng.choice(list(WORDS.items()))
        text = f"{rng.choice(NAMES)} {rng.choice(NAMES)} {word} {rng.choice(NAMES)}"
        made.append(Record(text, tokens, False, 256))
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a classifier that was trained, which the first test judges."""
    out = tmp_path_factory.mktemp("classifier")
    how = Training(epochs=4, batch=16, learning_rate=2e-3, held_out=0.2)
    report = train(records(300), BUCKETS, out, how)
    assert report is not None
    assert report.weight == 60
    assert report.accuracy > 0.95 > 0.5 > report.majority_accuracy
    assert report.error_tokens < 0.2 * report.majority_error_tokens
    assert report.calibration_error < 0.2
    return out


def test_it_learns_what_the_text_tells(trained: Path) -> None:
    classifier = LengthClassifier(trained)
    assert classifier.edges == BUCKETS.edges
    rows = classifier.probabilities([f"beta eta {word} zeta" for word in WORDS])
    assert [max(range(3), key=row.__getitem__) for row in rows] == [0, 1, 2]
    assert all(sum(row) == pytest.approx(1) for row in rows)


def test_texts_of_any_length_are_answered(trained: Path) -> None:
    rows = LengthClassifier(trained).probabilities(["", "x", "detail " * 20_000])
    assert all(len(row) == 3 for row in rows)


def test_a_classifier_can_be_trained_further(trained: Path, tmp_path: Path) -> None:
    swapped = [
        Record(r.text, {8: 200, 200: 8}.get(r.tokens, r.tokens), False, 256)
        for r in records(200, 2)
    ]
    how = Training(base=trained, epochs=4, batch=16, learning_rate=2e-3, held_out=0.2)
    report = train(swapped, BUCKETS, tmp_path, how)
    assert report is not None
    assert report.accuracy > 0.9


def test_an_output_that_was_cut_teaches_that_it_was_longer(tmp_path: Path) -> None:
    cut = [Record(r.text, min(r.tokens, 20), r.tokens > 20, 20) for r in records(200, 3)]
    how = Training(epochs=4, batch=16, learning_rate=2e-3, held_out=0)
    assert train(cut, BUCKETS, tmp_path, how) is None
    short, long = LengthClassifier(tmp_path).probabilities(
        ["beta eta kind eta", "beta eta detail eta"]
    )
    assert short[0] > 0.8
    assert long[0] < 0.2


def test_the_process_answers_frames_and_ends_with_its_input(trained: Path) -> None:
    texts = [f"{name} {word}" for name in NAMES for word in WORDS]
    asked = b"".join(frame({"id": n, "text": text}) for n, text in enumerate(texts))
    command = [sys.executable, "-m", "engine.length_classifier", str(trained)]
    done = subprocess.run(command, input=asked, capture_output=True, timeout=120, check=True)
    hello, *answers = unframe(bytearray(done.stdout))
    assert hello == {"edges": list(BUCKETS.edges)}
    assert [answer["id"] for answer in answers] == list(range(len(texts)))
    direct = LengthClassifier(trained).probabilities([texts[5]])[0]
    assert answers[5]["probabilities"] == pytest.approx(direct, abs=1e-4)


def test_a_directory_that_is_no_classifier_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        LengthClassifier(tmp_path)
    write_edges(tmp_path, (1, 2, 3))
    with pytest.raises(ModelError):
        LengthClassifier(tmp_path)
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_edges(tmp_path, (1, 2))
    with pytest.raises(ModelError, match="3 classes, its buckets are 2"):
        LengthClassifier(tmp_path)


def test_weights_in_a_pickle_are_refused(trained: Path, tmp_path: Path) -> None:
    for file in trained.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        LengthClassifier(tmp_path)


def test_records_are_read_line_by_line_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    good = {"text": "a", "output_tokens": 3, "finish": "length", "max_tokens": 3}
    nothing = good | {"output_tokens": 0}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(nothing)}\n")
    assert read_records(path) == [Record("a", 3, True, 3)]
    path.write_text(f'{json.dumps(good)}\n{{"text": 1}}\n')
    with pytest.raises(ModelError, match=":2: not a record"):
        read_records(path)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no records"):
        train([], BUCKETS, tmp_path, Training())
    with pytest.raises(ModelError, match="fine-tuned"):
        train(records(5), BUCKETS, tmp_path, Training(base=tmp_path / "nowhere"))


def test_word_pieces_know_their_own_texts() -> None:
    tokenizer = word_pieces(["hello world", "hello there"])
    ids = tokenizer("hello world")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in ids
