"""Rotation and the writing of keys and values, against torch's layers and the pool's own writer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.attention.plane import Plane
from engine.gpu.kernels.rope import rotate_and_store
from engine.model.layers import rotate
from engine.model.pool import KvGeometry, KvPool

_BLOCK, _EPS, _LAYER = 8, 1e-6, 1


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    head_dim: int


_SHAPES = [Heads(4, 2, 16), Heads(9, 3, 64), Heads(2, 1, 80)]


@dataclass
class Case:
    """Tokens at random positions, each in a slot of its own."""

    shape: Heads
    dtype: torch.dtype
    pool: KvPool

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(7)
        shape, device = self.shape, self.pool.storage.device
        tokens, width = 5, (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = torch.randn(tokens, width, generator=random).to(device, self.dtype)
        angles = torch.randn(11, shape.head_dim // 2, generator=random)
        self.rotations = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
        self.rows = torch.tensor([3, 10, 0, 3, 7], device=device)
        self.slots = torch.tensor([0, 17, 9, -1, 31], device=device)
        weights = torch.rand(2, shape.head_dim, generator=random) + 0.5
        self.q_norm, self.k_norm = weights.to(device, self.dtype)

    def run(self, *, norm: bool = False, out: Tensor | None = None) -> Tensor:
        return rotate_and_store(
            self.qkv,
            self.rotations,
            self.rows,
            self.slots,
            self.pool.keys(_LAYER),
            self.pool.values(_LAYER),
            self.pool.scales(_LAYER),
            heads=self.shape.heads,
            kv_heads=self.shape.kv_heads,
            q_norm=self.q_norm if norm else None,
            k_norm=self.k_norm if norm else None,
            eps=_EPS,
            out=out,
        )

    def expected(self, *, norm: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as torch computes them in float32, in the model's format."""
        shape = self.shape
        heads = self.qkv.float().view(len(self.qkv), -1, shape.head_dim)
        q, k, v = heads.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        if norm:
            q = F.rms_norm(q, (shape.head_dim,), self.q_norm.float(), _EPS)
            k = F.rms_norm(k, (shape.head_dim,), self.k_norm.float(), _EPS)
        cos, sin = self.rotations[self.rows].chunk(2, dim=-1)
        cos, sin = torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)


def _case(
    device: torch.device, shape: Heads, dtype: torch.dtype, kv: torch.dtype | None = None
) -> Case:
    geometry = KvGeometry.of("", 2, shape.kv_heads, shape.head_dim, kv or dtype, _BLOCK)
    return Case(shape, dtype, KvPool(geometry, 4, device=device))


def _close(found: Tensor, expected: Tensor) -> None:
    """Equal to the last digit, which products that are fused round differently."""
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def _written(case: Case) -> tuple[Tensor, Tensor]:
    """What lies in the slots of the tokens that have one."""
    kept = case.slots[case.slots >= 0]
    blocks, offsets = kept // _BLOCK, kept % _BLOCK
    keys, values = Plane.pair(case.pool, _LAYER)
    return tuple(  # type: ignore[return-value]
        plane.read(blocks, torch.float32)[torch.arange(len(kept)), offsets]
        for plane in (keys, values)
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_queries_are_returned_and_keys_and_values_are_in_their_slots(
    device: torch.device, shape: Heads, norm: bool
) -> None:
    case = _case(device, shape, torch.float32)
    q, k, v = case.expected(norm=norm)
    _close(case.run(norm=norm), q)
    keys, values = _written(case)
    _close(keys, k[case.slots >= 0])
    assert torch.equal(values, v[case.slots >= 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_once(device: torch.device, dtype: torch.dtype) -> None:
    case = _case(device, _SHAPES[0], dtype)
    q, k, v = case.expected(norm=True)
    _close(case.run(norm=True), q)
    keys, values = _written(case)
    _close(keys.to(dtype), k[case.slots >= 0])
    assert torch.equal(values.to(dtype), v[case.slots >= 0])


@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_int8_is_what_the_pools_writer_makes(device: torch.device, shape: Heads) -> None:
    case = _case(device, shape, torch.float32, torch.int8)
    beside = _case(device, shape, torch.float32, torch.int8)
    case.run()
    _, k, v = case.expected()
    kept = case.slots >= 0
    slots = (case.slots[kept] // _BLOCK, case.slots[kept] % _BLOCK)
    keys, values = Plane.pair(beside.pool, _LAYER)
    keys.write(slots, k[kept])
    values.write(slots, v[kept])
    found_keys, found_values = Plane.pair(case.pool, _LAYER)
    assert torch.equal(found_values.numbers, values.numbers)
    assert found_values.scales is not None
    assert values.scales is not None
    assert torch.equal(found_values.scales, values.scales)
    off = (found_keys.numbers.int() - keys.numbers.int()).abs()
    assert off.max() <= 1  # a last digit of the rotation
    assert off.float().mean() < 0.01
    assert found_keys.scales is not None
    torch.testing.assert_close(found_keys.scales, keys.scales)


def test_what_is_not_a_number_becomes_zero_in_int8(device: torch.device) -> None:
    case = _case(device, _SHAPES[0], torch.float32, torch.int8)
    case.qkv[0, -1] = float("nan")  # the last value head
    case.qkv[1, -1] = float("inf")
    case.qkv[2, -16:] = 0.0
    case.run()
    _, values = _written(case)
    assert not values[:3, -1].any()
    assert values[:3, 0].any(-1).all()


def test_float8_is_scaled_to_its_largest_number(device: torch.device) -> None:
    case = _case(device, _SHAPES[0], torch.float32)
    shape = (2, 4, _BLOCK, 2)  # keys and values, [blocks, block_size, kv_heads]
    numbers = torch.zeros(*shape, 16, device=device).to(torch.float8_e4m3fn)
    scales = torch.zeros(shape, device=device)
    rotate_and_store(
        case.qkv,
        case.rotations,
        case.rows,
        case.slots,
        numbers[0],
        numbers[1],
        (scales[0], scales[1]),
        heads=4,
        kv_heads=2,
    )
    kept = case.slots >= 0
    rows, scale_rows = numbers.float().flatten(1, 2), scales.flatten(1, 2)
    for index, expected in enumerate(case.expected()[1:]):
        found = rows[index, case.slots[kept]]  # [T, kv_heads, head_dim]
        assert (found.abs().amax(-1) == 448).all()
        read = found * scale_rows[index, case.slots[kept]][..., None]
        # Four bits: half of a sixteenth of the number; below the normal ones, of the least of them.
        atol = float(scales.max()) * 2**-10
        torch.testing.assert_close(read, expected[kept], rtol=2**-4, atol=atol)


def test_padding_writes_nothing(device: torch.device) -> None:
    case = _case(device, _SHAPES[0], torch.float32)
    case.slots.fill_(-1)
    case.run()
    assert not case.pool.storage.any()


def test_other_slots_and_layers_are_left_alone(device: torch.device) -> None:
    case = _case(device, _SHAPES[0], torch.float32)
    case.pool.storage.fill_(5.0)
    case.run()
    assert (case.pool.keys(0) == 5).all()
    assert (case.pool.values(0) == 5).all()
    for plane in (case.pool.keys(_LAYER), case.pool.values(_LAYER)):
        rows = plane.flatten(0, 1)
        untouched = torch.ones(len(rows), dtype=torch.bool, device=device)
        untouched[case.slots[case.slots >= 0]] = False
        assert (rows[untouched] == 5).all()
        assert (rows[~untouched] != 5).any(-1).all()


def test_queries_go_where_they_are_wanted(device: torch.device) -> None:
    case = _case(device, _SHAPES[0], torch.float32)
    out = torch.empty(5, 4, 16, device=device)
    assert case.run(out=out) is out
    _close(out, case.expected()[0])
