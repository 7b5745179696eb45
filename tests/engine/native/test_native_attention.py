"""Paged attention of the compiled step: what it keeps in the pool, and what it may read of it."""

from __future__ import annotations

from ctypes import byref, c_void_p
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.native import library as native
from engine.native.library import BatchView, Format, Isa, Library, Matrix, Vector
from tests.engine.native.conftest import TeamOf

HEADS, KV_HEADS, DIM = 4, 2, 48
QUERIES, KEYS = HEADS * DIM, KV_HEADS * DIM
BLOCK, BLOCKS, HIDDEN = 16, 64, 64
SCALE = DIM**-0.5
ITEM = {Format.F32: 4, Format.BF16: 2, Format.INT8: 1}


@dataclass
class Layer:
    """A model of one layer whose MLP gives zero and whose head is the identity: its logits are the
    last norm of embedding plus attention, and its pool can be looked into."""

    library: Library
    model: c_void_p
    kv: Format
    weights: dict[str, Tensor]
    pool: Tensor  # [blocks, bytes] uint8

    def run(self, ids: Tensor, starts: list[int], lengths: list[int], tables: Tensor) -> Tensor:
        """Logits of all rows of a pass; nothing is rotated."""
        spans = zip(starts, lengths, range(len(starts)), strict=True)
        slots = [
            int(tables[s, p // BLOCK]) * BLOCK + p % BLOCK
            for start, length, s in spans
            for p in range(start, start + length)
        ]
        count = len(ids)
        arrays: dict[str, Tensor] = {
            "token_ids": ids,
            "slots": torch.tensor(slots),
            "starts": torch.tensor(starts, dtype=torch.int32),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "tables": tables,
            "rotations": torch.cat((torch.ones(DIM // 2), torch.zeros(DIM // 2))),
            "rotation_rows": torch.zeros(count, dtype=torch.int32),
            "logit_rows": torch.arange(count),
            "logit_targets": torch.arange(count, dtype=torch.int32),
            "kv": self.pool,
            "logits": torch.empty(count, HIDDEN),
            "best": torch.empty(count, dtype=torch.int64),
            "best_logits": torch.empty(count),
        }
        view = BatchView(
            tokens=count,
            sequences=len(starts),
            rows=count,
            width=tables.shape[1],
            **{name: array.data_ptr() for name, array in arrays.items()},
        )
        self.library.check(self.library.functions.baton_step(self.model, byref(view), None))
        return arrays["logits"]

    def expected(self, ids: Tensor, window: int = 0) -> Tensor:
        """The logits of one whole sequence, in float64."""
        w = {name: tensor.double() for name, tensor in self.weights.items()}
        x = w["embedding"][ids]
        q, k, v = (_norm(x) @ w["qkv"].T).tensor_split((QUERIES, QUERIES + KEYS), dim=-1)
        q = q.view(len(ids), KV_HEADS, HEADS // KV_HEADS, DIM)
        k, v = k.view(len(ids), KV_HEADS, DIM), v.view(len(ids), KV_HEADS, DIM)
        scores = torch.einsum("qhgd,khd->hgqk", q, k) * SCALE
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed = torch.einsum("hgqk,khd->qhgd", weights, v).reshape(len(ids), QUERIES)
        return _norm(x + mixed @ w["output"].T)

    def plane(self, block: int, which: int) -> tuple[Tensor, Tensor | None]:
        """Keys (0) or values (1) of a block, [BLOCK, KV_HEADS, DIM], and their scales."""
        size = self.pool.shape[1] // 2
        plane = self.pool[block, which * size : (which + 1) * size]
        numbers = plane[: BLOCK * KEYS * ITEM[self.kv]]
        shape = (BLOCK, KV_HEADS, DIM)
        match self.kv:
            case Format.INT8:
                scales = plane[BLOCK * KEYS :].view(torch.float32).view(BLOCK, KV_HEADS)
                return numbers.view(torch.int8).view(shape), scales
            case Format.BF16:
                return numbers.view(torch.bfloat16).view(shape), None
            case _:
                return numbers.view(torch.float32).view(shape), None


def _norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def make_layer(
    library: Library, team: int, isa: Isa, kv: Format, window: int = 0, fill: int = 0xFF
) -> Layer:
    """Its pool is filled with a byte; 0xFF makes NaN of the floats."""
    shape = native.Shape(
        layers=1, hidden=HIDDEN, intermediate=16, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM,
        vocabulary=HIDDEN, activation=0, weights=Format.F32, head=Format.F32, kv=kv,
        block_size=BLOCK, max_tokens=512, eps=1e-6, scale=SCALE,
    )  # fmt: skip
    functions = library.functions
    model = c_void_p(functions.baton_model_new(byref(shape), team, isa))
    assert model, library.error()
    noise = torch.Generator().manual_seed(0)
    weights = {
        "embedding": torch.randn(HIDDEN, HIDDEN, generator=noise),
        "qkv": torch.randn(QUERIES + 2 * KEYS, HIDDEN, generator=noise) * HIDDEN**-0.5,
        "output": torch.randn(HIDDEN, QUERIES, generator=noise) * QUERIES**-0.5,
    }
    packed = {
        Matrix.QKV: weights["qkv"],
        Matrix.OUTPUT: weights["output"],
        Matrix.GATE_UP: torch.zeros(32, HIDDEN),
        Matrix.DOWN: torch.zeros(HIDDEN, 16),
        Matrix.HEAD: torch.eye(HIDDEN),
    }
    for matrix, weight in packed.items():
        arguments: Any = (model, 0, matrix, 0, len(weight), weight.data_ptr(), Format.F32)
        library.check(functions.baton_model_pack(*arguments))
    ones = torch.ones(HIDDEN)
    for vector in (Vector.INPUT_NORM, Vector.MLP_NORM, Vector.FINAL_NORM):
        library.check(functions.baton_model_vector(model, 0, vector, 0, HIDDEN, ones.data_ptr()))
    table = weights["embedding"].data_ptr()
    library.check(functions.baton_model_embedding(model, table, Format.F32))
    library.check(functions.baton_model_window(model, 0, window))
    scales = 4 * BLOCK * KV_HEADS if kv is Format.INT8 else 0
    size = 2 * (BLOCK * KEYS * ITEM[kv] + scales)
    return Layer(library, model, kv, weights, torch.full((BLOCKS, size), fill, dtype=torch.uint8))


CASES = [
    pytest.param(kv, bound, window, id=f"{kv.name}-window-{window}")
    for kv, bound in ((Format.F32, 1e-5), (Format.BF16, 0.02), (Format.INT8, 0.05))
    for window in (0, 1, 100)
]


@pytest.mark.parametrize(("kv", "bound", "window"), CASES)
def test_prompts_and_single_tokens_over_pools_of_nan(
    library: Library, team: TeamOf, kv: Format, bound: float, window: int
) -> None:
    ids = torch.randint(HIDDEN, (2, 301), generator=torch.Generator().manual_seed(1))
    tables = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2))[:40].view(2, 20)
    for isa in (isa for isa in Isa if isa <= library.isa):
        layer = make_layer(library, team(2), isa, kv, window)
        first = layer.run(torch.cat((ids[0, :300], ids[1, :9])), [0, 0], [300, 9], tables)
        second = layer.run(torch.cat((ids[0, 300:], ids[1, 9:60])), [300, 9], [1, 51], tables)
        found = torch.cat((first[:300], second[:1])), torch.cat((first[300:], second[1:]))
        for logits, tokens in zip(found, (ids[0], ids[1, :60]), strict=True):
            wanted = layer.expected(tokens, window)
            assert (logits - wanted).abs().max() < bound, isa
        library.functions.baton_model_free(layer.model)


# Heads, key heads and head_dim: one bundle of AMX tiles; one of head_dim 128; several, the last one
# short; groups of 7; a head_dim of three tiles; a group that two tiles of weights share.
SHAPES = [(9, 3, 64), (12, 12, 128), (20, 5, 64), (14, 2, 64), (8, 1, 96), (12, 1, 64)]


@pytest.mark.parametrize("kv", [Format.F32, Format.BF16, Format.INT8])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_single_tokens_of_all_shapes_over_pools_of_nan(
    library: Library,
    team: TeamOf,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    window: int,
    kv: Format,
) -> None:
    heads, kv_heads, dim = shape
    sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "SCALE": dim**-0.5}
    for name, size in (sizes | {"QUERIES": heads * dim, "KEYS": kv_heads * dim}).items():
        monkeypatch.setitem(globals(), name, size)
    ids = torch.randint(HIDDEN, (2, 302), generator=torch.Generator().manual_seed(4))
    tables = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(5))[:40].view(2, 20)
    for isa in (isa for isa in Isa if isa <= library.isa):
        layer = make_layer(library, team(2), isa, kv, window)
        layer.run(torch.cat((ids[0, :300], ids[1, :40])), [0, 0], [300, 40], tables)
        found = [
            layer.run(
                torch.stack((ids[0, 300 + i], ids[1, 40 + i])), [300 + i, 40 + i], [1, 1], tables
            )
            for i in range(2)
        ]
        bound = {Format.F32: 1e-5, Format.BF16: 0.02, Format.INT8: 0.05}[kv]
        for logits, tokens in zip(torch.stack(found, 1), (ids[0], ids[1, :42]), strict=True):
            assert (logits - layer.expected(tokens, window)[-2:]).abs().max() < bound, isa
        library.functions.baton_model_free(layer.model)


@pytest.mark.parametrize("kv", [Format.F32, Format.BF16, Format.INT8])
def test_the_pool_holds_keys_and_values_where_they_are_handed_over(
    library: Library, team: TeamOf, kv: Format
) -> None:
    ids = torch.arange(20)
    for isa in (isa for isa in Isa if isa <= library.isa):
        layer = make_layer(library, team(1), isa, kv)
        layer.run(ids, [0], [20], torch.tensor([[7, 3]]))
        projected = _norm(layer.weights["embedding"][ids]) @ layer.weights["qkv"][QUERIES:].T
        for which, wanted in enumerate(projected.tensor_split(2, dim=-1)):
            wanted = wanted.view(20, KV_HEADS, DIM)
            for block, rows in ((7, slice(0, 16)), (3, slice(16, 20))):
                found, scales = layer.plane(block, which)
                numbers = found[: rows.stop - rows.start].float()
                if scales is not None:
                    largest = wanted[rows].abs().amax(-1)
                    kept = scales[: rows.stop - rows.start]
                    torch.testing.assert_close(kept, largest / 127)
                    assert (numbers * kept[..., None] - wanted[rows]).abs().max() < kept.max()
                else:
                    error = 1e-5 if kv is Format.F32 else 2**-8
                    torch.testing.assert_close(numbers, wanted[rows], rtol=error, atol=1e-5)
        untouched = layer.pool[[i for i in range(BLOCKS) if i not in (3, 7)]]
        assert (untouched == 0xFF).all()
        library.functions.baton_model_free(layer.model)


@pytest.mark.parametrize("kv", [Format.F32, Format.BF16, Format.INT8])
def test_sharing_out_a_long_context_changes_no_bit(
    library: Library, team: TeamOf, kv: Format
) -> None:
    ids = torch.randint(HIDDEN, (501,), generator=torch.Generator().manual_seed(3))
    tables = torch.arange(32).view(1, 32)
    found = []
    for threads in (1, 2, 5):
        layer = make_layer(library, team(threads), library.isa, kv)
        layer.run(ids[:500], [0], [500], tables)
        found.append(layer.run(ids[500:], [500], [1], tables))
        library.functions.baton_model_free(layer.model)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("kv", [Format.F32, Format.BF16, Format.INT8])
def test_a_prompt_gets_the_same_bits_beside_others(
    library: Library, team: TeamOf, kv: Format, window: int
) -> None:
    """Beside others its tokens are attended in larger tiles."""
    ids = torch.randint(HIDDEN, (500,), generator=torch.Generator().manual_seed(6))
    tables = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(7))[:50].view(2, 25)
    for isa in (isa for isa in Isa if isa <= library.isa):
        layer = make_layer(library, team(1), isa, kv, window)
        alone = layer.run(ids[:150], [0], [150], tables)
        beside = layer.run(ids, [0, 0], [150, 350], tables)
        assert torch.equal(alone, beside[:150]), isa
        library.functions.baton_model_free(layer.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 24}, "head_dim"),
        ({"block_size": 24}, "power of two"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv": Format.F16}, "KV"),
        ({"layers": 0}, "positive"),
    ],
)
def test_shapes_that_cannot_be_served_are_refused(
    library: Library, team: TeamOf, change: dict[str, int], message: str
) -> None:
    sizes = {
        "layers": 1, "hidden": 64, "intermediate": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "vocabulary": 64, "kv": Format.F32, "block_size": 16, "max_tokens": 16,
    }  # fmt: skip
    shape = native.Shape(**(sizes | change))
    assert not library.functions.baton_model_new(byref(shape), team(1), Isa.PORTABLE)
    assert message in library.error()
