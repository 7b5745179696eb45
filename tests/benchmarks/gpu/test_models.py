"""Models with random weights, and what is counted of them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.models import SHAPES, RandomCheckpoint, config_of
from benchmarks.gpu.passes import Shape
from benchmarks.gpu.work import jobs
from engine.bench.work import ModelCount
from engine.gpu.model import GpuLlama

CPU = torch.device("cpu")


@pytest.mark.parametrize(("form", "least", "most"), [("none", 4.0, 4.0), ("int4", 0.5, 0.6)])
def test_the_weights_of_a_model_count_with_their_scales(
    form: str, least: float, most: float
) -> None:
    source = SHAPES["tiny"]()
    source.num_hidden_layers, source.head_dim = 1, 64
    source.hidden_size, source.intermediate_size = 128, 256
    config = config_of(source)
    model = GpuLlama(config, RandomCheckpoint(torch.float32, CPU), form)
    count = ModelCount.of(config, "float32", "float32")
    assert least <= model.layer_bytes / count.layer_weights <= most
    assert (model.layer_bytes == least * count.layer_weights) == (form == "none")
    assert model.head_bytes == 4 * count.head_weights


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 8.03), ("mistral-7b", 7.25), ("qwen3-0.6b", 0.596)]
)
def test_shapes_have_as_many_parameters_as_the_models_they_are_named_after(
    name: str, billions: float
) -> None:
    config = config_of(SHAPES[name]())
    count = ModelCount.of(config, "bfloat16", "bfloat16")
    heads = 1 if config.tied else 2  # an untied model has an embedding beside its head
    assert (count.layer_weights + heads * count.head_weights) / 1e9 == pytest.approx(
        billions, rel=0.005
    )


def test_a_generation_pass_is_measured_around_its_context() -> None:
    shape = Shape(batch=8, context=2048)
    assert [part.end for part in shape.parts] == [2048] * 8
    assert 2048 < shape.positions(steps=40) <= 2048 + 40
    assert Shape(batch=2, prompt=4096).tokens == 8192


def test_requests_are_the_same_every_time_and_outputs_of_one_length() -> None:
    work = jobs(50, 1000, prompt=20, output=7)
    assert work == jobs(50, 1000, prompt=20, output=7)
    assert work != jobs(50, 1000, prompt=20, output=7, seed=1)
    assert {job.output for job in work} == {7}
    lengths = [len(job.prompt) for job in work]
    assert 10 <= min(lengths) < 15 < 25 < max(lengths) <= 30
