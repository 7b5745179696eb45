"""Every format whose accuracy is measured runs, is called what it is, and costs little."""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest

import demo_model
from demo_model.evaluate import Judge
from engine.native.library import load

# What perplexity may be over float32's, the other way round too. An int4 step is coarse.
LIMITS = {"float32": 1.001, "bfloat16": 1.002, "int8": 1.002, "fp8": 1.008, "int4": 1.03}


@pytest.fixture
def formats(importable: None) -> ModuleType:
    """benchmarks/formats.py."""
    return importlib.import_module("benchmarks.formats")


@pytest.fixture
def accuracy(importable: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/accuracy.py, with short answers."""
    found = importlib.import_module("benchmarks.accuracy")
    monkeypatch.setattr(found, "GENERATED", 2)
    return found


def test_every_format_reads_nearly_as_float32_does(
    formats: ModuleType, accuracy: ModuleType
) -> None:
    texts = accuracy.encode(Judge(demo_model.path()), accuracy.kinds_of_text(2)["documents"])
    nats: dict[tuple[str, str], float] = {}
    for wanted in formats.FORMATS:
        if load() is None and "quantization" in wanted.options:
            continue
        executor = wanted.load(threads=1, max_batch_tokens=1024, kv_memory=2**24)
        reading = accuracy.read(executor, texts, wanted.name)
        nats.setdefault((wanted.name, wanted.backend_of(executor)), reading.nats)
        weights, _, kv = wanted.name.partition(", KV ")
        assert kv in executor.pool.geometry.dtype.replace("float8_e4m3fn", "fp8")
        ratio = abs(reading.nats - nats["float32", "torch"])
        assert math.exp(ratio) <= LIMITS[weights.split()[0]] * (1.002 if kv else 1), wanted.name
    assert len(set(nats.values())) == len(nats)  # each has an arithmetic of its own
    assert ("int4 weights only, in groups of 128", "torch, as on GPUs") in nats
