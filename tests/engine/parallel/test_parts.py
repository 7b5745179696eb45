"""How a model is divided: layers, heads, tensors, and what ranks tell each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from baton.errors import ModelError
from baton.types import Request, Sampling, Stopping
from engine.model.batch import build_batch
from engine.model.logits import best_tokens
from engine.model.model import Output
from engine.parallel.message import pack, pack_output, unpack, unpack_output
from engine.parallel.shard import ShardedCheckpoint, _best, _best_of
from engine.parallel.topology import Topology
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence


def test_ranks_count_shards_first() -> None:
    places = [(Topology(2, 3, rank).stage, Topology(2, 3, rank).shard) for rank in range(6)]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert Topology(2, 3).teller == 4


@pytest.mark.parametrize(("layers", "stages"), [(3, 2), (32, 4), (7, 7), (30, 4)])
def test_stages_cover_all_layers_in_order_and_evenly(layers: int, stages: int) -> None:
    parts = [Topology(1, stages, rank).layers(layers) for rank in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[-1]) <= len(parts[0])


def test_neighbours_share_a_key_head_where_there_are_too_few() -> None:
    heads = [list(Topology(4, 1, rank).kv_heads(2)) for rank in range(4)]
    assert heads == [[0], [0], [1], [1]]
    assert [list(Topology(2, 1, rank).kv_heads(4)) for rank in range(2)] == [[0, 1], [2, 3]]


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "l.q_proj.weight": torch.randn(32, 12),
        "l.k_proj.bias": torch.randn(8),
        "l.o_proj.weight": torch.randn(12, 32),
        "l.o_proj.bias": torch.randn(12),
        "model.embed_tokens.weight": torch.randn(35, 12),
        "l.norm.weight": torch.randn(12),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_shards_put_together_are_the_tensors(
    tmp_path: Path, stored: dict[str, torch.Tensor]
) -> None:
    shards = [
        ShardedCheckpoint(tmp_path, torch.float32, "cpu", Topology(4, 1, rank)) for rank in range(4)
    ]
    columns = [shard("l.q_proj.weight", 8, 12) for shard in shards]
    torch.testing.assert_close(torch.cat(columns), stored["l.q_proj.weight"])
    rows = [shard("l.o_proj.weight", 12, 8) for shard in shards]
    torch.testing.assert_close(torch.cat(rows, 1), stored["l.o_proj.weight"])
    biases = [shard("l.o_proj.bias", 12) for shard in shards]
    torch.testing.assert_close(sum(biases), stored["l.o_proj.bias"])
    keys = [shard("l.k_proj.bias", 4) for shard in shards]  # two key heads of 4
    torch.testing.assert_close(torch.cat(keys[::2]), stored["l.k_proj.bias"])
    torch.testing.assert_close(keys[0], keys[1])
    words = torch.cat([shard("model.embed_tokens.weight", 16, 12) for shard in shards])
    torch.testing.assert_close(words[:35], stored["model.embed_tokens.weight"])
    assert not words[35:].any()
    torch.testing.assert_close(shards[3]("l.norm.weight", 12), stored["l.norm.weight"])


@pytest.mark.usefixtures("stored")
def test_a_tensor_of_another_size_is_no_shard(tmp_path: Path) -> None:
    shard = ShardedCheckpoint(tmp_path, torch.float32, "cpu", Topology(4, 1, 1))
    with pytest.raises(ModelError, match="no shard of 4"):
        shard("l.q_proj.weight", 16, 12)  # would be repeated, which only key heads are
    with pytest.raises(ModelError, match="missing"):
        shard("l.v_proj.weight", 8, 12)


def test_the_best_token_of_all_shards_is_that_of_the_whole_row() -> None:
    logits = torch.randn(6, 40)
    logits[1, 5] = logits[1, 33] = 9.0  # a draw: the lower one
    logits[2, 12] = torch.inf
    logits[3] = -torch.inf
    logits[4, 3] = torch.nan
    pairs = [_best(logits[:, at : at + 16], at) for at in (0, 16, 32)] + [_best(logits[:, :0], 48)]
    assert _best_of(torch.stack(pairs)).tolist() == best_tokens(logits).tolist()


def _sequence(name: str, tokens: int, blocks: list[int], temperature: float) -> Sequence:
    request = Request(
        name,
        tuple(np.random.default_rng(tokens).integers(0, 99, tokens).tolist()),
        Sampling(temperature=temperature),
        Stopping(max_tokens=4),
    )
    sequence = Sequence.start(request, 0, now=0.0)
    sequence.blocks = blocks
    return sequence


def test_a_batch_comes_out_as_it_went_in() -> None:
    a, b, c = (
        _sequence("a", 9, [7, 2, 5], 0.0),
        _sequence("b", 5, [1, 9], 1.0),
        _sequence("c", 3, [4], 0.0),
    )
    chunks = (
        Chunk(a, 2, 7, sample=True),
        Chunk(b, 4, 1, sample=True),
        Chunk(c, 0, 2, sample=False),
    )
    batch, _ = build_batch(StepPlan(chunks), 4)
    found = unpack(pack(batch), 4)
    for name in ("token_ids", "positions", "slots", "block_tables", "logit_rows"):
        torch.testing.assert_close(getattr(found, name), getattr(batch, name))
    for name in ("starts", "lengths", "prompt_lengths", "whole_rows"):
        assert getattr(found, name) == getattr(batch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_comes_back_as_it_was(dtype: torch.dtype) -> None:
    a, b = _sequence("a", 3, [1], 0.0), _sequence("b", 3, [2], 1.0)
    chunks = (Chunk(a, 0, 3, sample=True), Chunk(b, 0, 3, sample=True))
    batch, _ = build_batch(StepPlan(chunks), 4)
    output = Output(torch.randn(1, 11).to(dtype), torch.tensor([8]))
    found = unpack_output(pack_output(output), batch, 11, dtype)
    torch.testing.assert_close(found.logits, output.logits)
    assert found.best.tolist() == [8]
