"""Model directories that any system can load, and the time that none can beat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.peers import floor
from benchmarks.peers.shapes import SHAPES, make, vocabulary
from benchmarks.peers.workloads import Ask, Workload
from engine.ceilings import Ceilings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make(SHAPES["tiny"], directory)
    return directory


def ceilings(bandwidth: float, operations: float) -> Ceilings:
    return Ceilings(
        threads=1,
        working_set=1,
        read_bandwidth=bandwidth,
        fp32_flops=operations,
        bf16_flops=operations,
        int8_ops=2 * operations,
    )


def test_a_made_model_loads_whole_and_its_logits_are_finite(tiny: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits = model(torch.arange(3, 40)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1


def test_its_tokenizer_has_as_many_tokens_as_the_model(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocabulary(tiny) == SHAPES["tiny"].vocabulary
    assert tokenizer.decode(tokenizer.encode("plain text").ids) == "plain text"


def test_making_it_again_gives_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    make(SHAPES["tiny"], tmp_path)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (tiny / file).read_bytes()


def test_a_single_stream_is_bound_by_what_each_step_reads(tiny: Path) -> None:
    model = floor.count(tiny, "bf16")
    workload = Workload("w2", (Ask((5, 6, 7, 8), 5),))
    found = floor.measures(workload, model, ceilings(1e6, 1e18), max_tokens=512, max_sequences=8)
    assert found["tpot_s"] == pytest.approx(model.weight_bytes / 1e6, rel=0.05)
    int8 = floor.measures(
        workload, floor.count(tiny, "int8"), ceilings(1e6, 1e18), max_tokens=512, max_sequences=8
    )
    assert int8["tpot_s"] == pytest.approx(found["tpot_s"] / 2, rel=0.05)


def test_a_batch_is_bound_by_its_operations_where_reading_is_free(tiny: Path) -> None:
    model = floor.count(tiny, "bf16")
    workload = Workload("w1", tuple(Ask(tuple(range(3, 35)), 4) for _ in range(6)))
    found = floor.measures(workload, model, ceilings(1e18, 1e9), max_tokens=64, max_sequences=8)
    least = 6 * 35 * 2 * model.layer_weights + 6 * 4 * 2 * model.head_weights  # without attention
    seconds = workload.output_tokens / found["output_tokens_per_s"]
    assert least / 1e9 < seconds < 1.3 * least / 1e9
