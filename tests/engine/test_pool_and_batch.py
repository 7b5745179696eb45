"""The KV pool as bytes and as tensors, and how plans become batches."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import asdict
from random import Random
from typing import Any

import pytest
import torch

from baton.errors import ConfigError
from baton.types import Request, Sampling, Stopping
from engine.load import load_executor
from engine.model.batch import BatchBuilder, begun_blocks, build_batch
from engine.model.memory import OwnMemory
from engine.model.pool import KvGeometry, KvPool
from kv_transfer.contract import BlockStore, KvLayout
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence

GEOMETRY = KvGeometry(
    "f", layers=3, kv_heads=2, head_dim=8, dtype="bfloat16", block_size=4, item_size=2
)
INT8 = KvGeometry.of("f", 3, 2, 8, torch.int8, 4)
FP8 = KvGeometry.of("f", 3, 2, 8, torch.float8_e4m3fn, 4)


def a_sequence(tokens: int, blocks: list[int], **request: Any) -> Sequence:
    """A sequence of `tokens` prompt tokens, numbered from 100."""
    defaults: dict[str, Any] = {"sampling": Sampling(), "stopping": Stopping(8)}
    made = Request("r", tuple(range(100, 100 + tokens)), **defaults | request)
    sequence = Sequence.start(made, 0, now=0.0)
    sequence.blocks = blocks
    return sequence


def test_a_block_is_one_piece_of_bytes_over_all_layers() -> None:
    pool = KvPool(GEOMETRY, 5)
    for layer in range(3):
        pool.keys(layer)[2] = layer + 1
        pool.values(layer)[2] = -(layer + 1)
    block = torch.frombuffer(pool.block(2), dtype=torch.bfloat16).view(GEOMETRY.block_shape)
    assert len(pool.block(2)) == pool.block_bytes == GEOMETRY.block_bytes
    for layer in range(3):
        assert (block[layer, 0] == layer + 1).all()
        assert (block[layer, 1] == -(layer + 1)).all()
    assert not any(bytes(pool.block(i)).strip(b"\0") for i in (0, 1, 3, 4))


def test_bytes_written_into_a_block_are_its_keys_and_values() -> None:
    source, target = KvPool(GEOMETRY, 2), KvPool(GEOMETRY, 4)
    source.storage.copy_(torch.randn(source.storage.shape))
    target.block(3)[:] = source.block(1)
    for layer in range(3):
        assert torch.equal(target.keys(layer)[3], source.keys(layer)[1])
        assert torch.equal(target.values(layer)[3], source.values(layer)[1])


def test_the_pool_can_live_in_memory_of_the_caller() -> None:
    memory = mmap.mmap(-1, 6 * GEOMETRY.block_bytes)
    pool = KvPool(GEOMETRY, 5, buffer=memoryview(memory))
    pool.values(2)[4, 3, 1, 7] = 1.0
    assert memory[5 * GEOMETRY.block_bytes - 2 : 5 * GEOMETRY.block_bytes] == b"\x80\x3f"


def test_an_int8_block_is_planes_of_numbers_and_the_scales_after_them() -> None:
    pool = KvPool(INT8, 5)
    keys, values = pool.scales(2) or pytest.fail("no scales")
    pool.keys(2)[3, 1, 1, 7] = -5
    values[3, 2, 0] = 1.5
    block = pool.block(3)
    plane = 4 * 2 * (8 + 4)
    assert len(block) == INT8.block_bytes == 3 * 2 * plane
    key, scale = bytearray(plane), bytearray(plane)
    key[(1 * 2 + 1) * 8 + 7] = 0xFB
    at = 4 * 2 * 8 + 2 * 2 * 4
    scale[at : at + 4] = struct.pack("<f", 1.5)
    assert bytes(block) == bytes(4 * plane) + bytes(key) + bytes(scale)
    assert keys.shape == values.shape == (5, 4, 2)


def test_an_int8_block_takes_its_scales_along_and_is_cleared_with_them() -> None:
    source, target = KvPool(INT8, 2), KvPool(INT8, 4)
    source.storage.copy_(torch.randint(-128, 128, source.storage.shape))
    target.block(3)[:] = source.block(1)
    for layer in range(3):
        assert torch.equal(target.keys(layer)[3], source.keys(layer)[1])
        for theirs, ours in zip(target.scales(layer), source.scales(layer), strict=True):
            assert torch.equal(theirs[3].view(torch.int32), ours[1].view(torch.int32))
    target.clear([3])
    assert not target.storage.any()


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "int8"), (torch.float8_e4m3fn, "fp8")])
def test_heads_whose_scales_would_lie_askew_are_refused(dtype: torch.dtype, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-dtype {name}: head_dim 6"):
        KvGeometry.of("f", 1, 1, 6, dtype, 1)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_block_outside_the_pool_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        KvPool(GEOMETRY, 5).block(index)


@pytest.mark.parametrize("geometry", [GEOMETRY, INT8, FP8], ids=["bfloat16", "int8", "fp8"])
def test_the_pool_is_what_the_hand_off_expects(geometry: KvGeometry) -> None:
    pool = KvPool(geometry, 5)
    store: BlockStore = pool
    layout = KvLayout(**asdict(geometry))
    assert store.block_bytes == layout.block_bytes
    assert store.blocks == 5


def test_chunks_are_laid_end_to_end_with_their_slots_and_tables() -> None:
    one, two = a_sequence(10, [7, 3, 5]), a_sequence(3, [2, 9])
    plan = StepPlan((Chunk(one, 6, 4, sample=True), Chunk(two, 0, 2, sample=False)))
    batch, logits = build_batch(plan, block_size=4)
    assert batch.token_ids.tolist() == [106, 107, 108, 109, 100, 101]
    assert batch.positions.tolist() == [6, 7, 8, 9, 0, 1]
    assert batch.slots.tolist() == [3 * 4 + 2, 3 * 4 + 3, 5 * 4, 5 * 4 + 1, 2 * 4, 2 * 4 + 1]
    assert batch.block_tables.tolist() == [[7, 3, 5], [2, 2, 2]]
    assert (batch.starts, batch.lengths, batch.prompt_lengths) == ((6, 0), (4, 2), (10, 3))
    assert batch.logit_rows.tolist() == [3]
    assert batch.whole_rows == 0
    assert [(row.sample, row.best) for row in logits] == [(None, 0), (None, None)]


def test_prompt_logprobs_ask_for_every_row_that_predicts_a_prompt_token() -> None:
    asks, other = a_sequence(5, [0, 1], prompt_logprobs=0), a_sequence(2, [2])
    first = StepPlan((Chunk(other, 1, 1, sample=True), Chunk(asks, 0, 3, sample=False)))
    batch, logits = build_batch(first, block_size=4)
    assert batch.logit_rows.tolist() == [1, 2, 3, 0]
    assert batch.whole_rows == 3  # row 0 needs its largest logit only
    assert (logits[0].prompt, logits[0].sample, logits[0].best) == (range(0), None, 0)
    assert (logits[1].prompt, logits[1].sample, logits[1].best) == (range(3), None, None)
    batch, logits = build_batch(StepPlan((Chunk(asks, 3, 2, sample=True),)), block_size=4)
    assert batch.logit_rows.tolist() == [0, 1]  # one predicts prompt token 4, the last samples
    assert (batch.whole_rows, logits[0].prompt, logits[0].best) == (1, range(1), 0)
    asks.tokens.append(77)
    batch, logits = build_batch(StepPlan((Chunk(asks, 5, 1, sample=True),)), block_size=4)
    assert (batch.whole_rows, logits[0].prompt, logits[0].best) == (0, range(0), 0)


@pytest.mark.parametrize(
    "wants",
    [
        {"sampling": Sampling(temperature=0.5)},
        {"sampling": Sampling(repetition_penalty=1.1)},
        {"sampling": Sampling(logit_bias=((4, 1.0),))},
        {"sampling": Sampling(allowed_token_ids=(4, 5))},
        {"stopping": Stopping(8, min_tokens=1, eos_token_ids=frozenset({2}))},
        {"logprobs": 0},
    ],
)
def test_requests_that_look_at_logits_get_all_of_them(wants: dict[str, Any]) -> None:
    plain, asks = a_sequence(2, [0]), a_sequence(2, [1], **wants)
    plan = StepPlan(tuple(Chunk(s, 1, 1, sample=True) for s in (plain, asks, plain)))
    batch, rows = build_batch(plan, block_size=4)
    assert batch.logit_rows.tolist() == [1, 0, 2]
    assert batch.whole_rows == 1
    assert [(row.sample, row.best) for row in rows] == [(None, 0), (0, None), (None, 1)]


def test_only_blocks_that_stay_part_empty_count_as_begun() -> None:
    sequence = a_sequence(12, [7, 3, 5])

    def begun(start: int, length: int) -> list[int]:
        return begun_blocks(StepPlan((Chunk(sequence, start, length, sample=False),)), 4)

    assert begun(0, 4) == []
    assert begun(0, 5) == [3]
    assert begun(4, 1) == [3]
    assert begun(5, 1) == []
    assert begun(2, 9) == [5]


def test_what_an_earlier_owner_left_in_a_block_never_shows(
    tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny("llama")
    driver = drive(model.path, budget=9)
    driver.executor.pool.storage.fill_(torch.nan)
    sequences = [driver.add(list(range(5, 5 + n)), 20) for n in (1, 15, 40)]
    driver.run()
    for sequence in sequences:
        model.assert_generates(
            sequence.request.prompt_ids, sequence.tokens[sequence.prompt_length :]
        )


def test_an_executor_runs_in_a_buffer_and_leaves_it_clean_after_warm_up(
    tiny: Callable[..., Any],
) -> None:
    made: list[OwnMemory] = []

    def share(size: int) -> OwnMemory:
        made.append(OwnMemory(size))
        return made[-1]

    executor = load_executor(tiny("llama").path, kv_blocks=3, share=share, threads=1)
    assert len(made[0].buffer) == 3 * executor.pool.block_bytes
    executor.warm_up()
    assert not bytes(made[0].buffer).strip(b"\0")
    assert executor.fingerprint == executor.pool.geometry.model_fingerprint


def random_plan(random: Random, live: list[Sequence], size: int) -> StepPlan:
    """Some of the sequences, in any order, each with blocks for what it has and a few more."""
    chunks = []
    for sequence in random.sample(live, random.randint(1, len(live))):
        if random.random() < 0.15:  # lost its KV, and got other blocks
            sequence.blocks, sequence.computed = [], 0
        length = random.randint(1, len(sequence.tokens) - sequence.computed)
        end = sequence.computed + length
        while len(sequence.blocks) < -(-end // size) + random.randint(0, 1):
            sequence.blocks += [random.randrange(500)]
        chunks.append(Chunk(sequence, sequence.computed, length, sample=True))
    return StepPlan(tuple(chunks))


@pytest.mark.parametrize("seed", range(20))
def test_a_builder_that_saw_other_passes_builds_what_a_fresh_one_does(seed: int) -> None:
    random, size = Random(seed), 4
    builder = BatchBuilder(size)
    live = [a_sequence(random.randint(1, 30), []) for _ in range(12)]
    for _ in range(40):
        plan = random_plan(random, live, size)
        (batch, rows), (fresh, expected) = builder.build(plan), build_batch(plan, size)
        assert rows == expected
        for name in ("token_ids", "positions", "slots", "block_tables", "logit_rows"):
            assert torch.equal(getattr(batch, name), getattr(fresh, name)), name
        for chunk, table in zip(plan.chunks, batch.block_tables.tolist(), strict=True):
            used = -(-(chunk.start + chunk.length) // size)
            blocks = chunk.sequence.blocks
            assert table == blocks[:used] + [blocks[used - 1]] * (len(table) - used)
            chunk.sequence.computed += chunk.length
            if chunk.sequence.computed == len(chunk.sequence.tokens):
                chunk.sequence.tokens.append(7)
        if random.random() < 0.2:
            live[random.randrange(12)] = a_sequence(random.randint(1, 80), [])


def test_a_batch_keeps_its_table_when_the_next_one_is_built() -> None:
    builder, one = BatchBuilder(4), a_sequence(10, [7, 3, 5])
    first, _ = builder.build(StepPlan((Chunk(one, 0, 4, sample=False),)))
    builder.build(StepPlan((Chunk(one, 4, 6, sample=True),)))
    assert first.block_tables.tolist() == [[7]]
