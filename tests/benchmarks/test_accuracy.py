"""Accuracy is measured as transformers has it, and differences are counted from the first."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest

import demo_model
from demo_model.evaluate import Judge
from engine.load import load_executor


@pytest.fixture
def accuracy(importable: None) -> ModuleType:
    """benchmarks/accuracy.py."""
    return importlib.import_module("benchmarks.accuracy")


def test_the_loss_is_that_of_transformers_and_answers_are_its_own(accuracy: ModuleType) -> None:
    judge = Judge(demo_model.path())
    kinds = accuracy.kinds_of_text(3)
    executor = load_executor(
        demo_model.path(), dtype="float32", threads=1, max_batch_tokens=1024, kv_memory=2**28
    )
    for kind, texts in kinds.items():
        reading = accuracy.read(executor, accuracy.encode(judge, texts), kind)
        assert reading.nats == pytest.approx(judge.loss(texts), rel=1e-4, abs=1e-5)
        assert len(reading.answers) == len(texts)
    taught = accuracy.encode(judge, kinds["chats"])
    answers = accuracy.read(executor, taught, "chats").answers
    assert [text.ids[text.given :] for text in taught] == list(answers)  # it knows them by heart


def test_answers_are_alike_up_to_their_first_difference(accuracy: ModuleType) -> None:
    reference = accuracy.Reading(1.0, (1, 2, 3, 4), ((5, 6, 7, 8), (9, 9)))
    found = accuracy.Reading(1.5, (1, 2, 0, 4), ((5, 6, 0, 8, 8), (9, 9)))
    assert accuracy.compare(found, reference) == {
        "perplexity": math.exp(1.5),
        "perplexity_ratio": math.exp(0.5),
        "counted_tokens": 4.0,
        "agreement": 0.75,
        "same_tokens": 2.0,
        "answer_tokens": 3.0,
        "same_answers": 0.5,
    }
