from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from baton.errors import ConfigError
from scheduling.cost import Work
from scheduling.simulator.hardware import GPUS, SHAPES, Efficiency, ModelShape, roofline
from scheduling.simulator.profiles import Profile, of_hardware, profile


def test_shapes_have_the_published_number_of_weights_and_kv_bytes() -> None:
    billions = {name: shape.weight_bytes / 2e9 for name, shape in SHAPES.items()}
    assert billions["llama-2-7b"] == pytest.approx(6.74, abs=0.01)
    assert billions["llama-3-8b"] == pytest.approx(8.03, abs=0.01)
    assert billions["opt-13b"] == pytest.approx(12.85, abs=0.03)
    assert SHAPES["llama-2-7b"].kv_bytes_per_token == 512 * 1024
    assert SHAPES["llama-3-8b"].kv_bytes_per_token == 128 * 1024


def test_kv_in_int8_takes_a_byte_a_number_and_a_scale_a_head() -> None:
    wide = SHAPES["llama-3-8b"]
    narrow = replace(wide, kv_dtype="int8")
    assert narrow.kv_bytes_per_token == 32 * 2 * 8 * (128 + 4)
    assert of_hardware(narrow, GPUS["h200"]).blocks > 1.9 * of_hardware(wide, GPUS["h200"]).blocks


def test_a_shape_is_read_from_a_model_directory() -> None:
    shape = ModelShape.load(Path("demo_model/weights"))
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.head_dim) == (6, 256, 2, 64)
    assert shape.tied


def test_a_directory_without_a_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelShape.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        ModelShape.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a model"):
        ModelShape.load(tmp_path)


def test_one_token_of_a_7b_model_on_an_h200_takes_what_reading_the_weights_takes() -> None:
    perfect = Efficiency(bandwidth=1.0, operations=1.0, launch_seconds=0.0)
    cost = roofline(SHAPES["llama-2-7b"], GPUS["h200"], perfect)
    assert cost.seconds(Work(sequences=1, context=1)) == pytest.approx(2.8e-3, rel=0.05)
    usual = profile("h200-llama-2-7b").cost
    assert usual.seconds(Work(sequences=1, context=1)) > 1.5 * cost.base


@pytest.mark.parametrize(
    "work",
    [
        Work(prompt_tokens=512, attention=512 * 512),
        Work(sequences=16, context=16 * 400),
        Work(sequences=64, context=64 * 400),
    ],
)
def test_the_roofline_is_near_the_published_measurements(work: Work) -> None:
    measured = profile("a100-opt-13b").cost.seconds(work)
    modelled = profile("a100-80-opt-13b").cost.seconds(work)
    assert 0.7 < modelled / measured < 1.6


def test_a_profile_is_the_same_after_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    written = profile("h200-llama-3-8b")
    written.save(path)
    assert profile(str(path)) == written


def test_a_file_may_have_more_and_less_but_not_nothing(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    needed = {
        "name": "mine",
        "base": 0.1,
        "per_token": 0.2,
        "per_attention": 0.3,
        "per_sequence": 0.4,
        "per_context": 0.5,
    }
    path.write_text(json.dumps(needed | {"error": 0.07}))
    assert Profile.load(path).cost.per_context == 0.5
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a profile"):
        Profile.load(path)
    with pytest.raises(ConfigError, match="not a profile"):
        Profile.load(tmp_path / "none.json")


def test_memory_is_what_the_weights_leave_and_too_little_is_refused() -> None:
    whole = profile("h200-llama-3-8b")
    assert whole.blocks * whole.block_bytes < 141e9 - SHAPES["llama-3-8b"].weight_bytes
    assert whole.capacity(max_tokens=512, max_sequences=8, blocks=100).blocks == 100
    with pytest.raises(ConfigError, match="does not fit"):
        of_hardware(
            ModelShape("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256, 8192), GPUS["h100"]
        )


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    for name in ("b200-llama-3-8b", "h200-gpt-5", "llama-3-8b"):
        with pytest.raises(ConfigError, match="h200"):
            profile(name)
