"""Products of the compiled backend against float64, for every instruction set and format."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from engine.native.library import Format, Isa, Library
from tests.engine.native.conftest import TeamOf

FORMATS = (Format.F32, Format.BF16, Format.INT8, Format.INT4)
INTEGERS = (Format.INT8, Format.INT4)
# Odd on purpose: panels are 32 columns, k is padded to 64, tiles of rows are 3 to 32 high.
SHAPES = (
    (1, 32, 64),
    (1, 33, 1),
    (2, 31, 63),
    (3, 96, 65),
    (7, 100, 70),
    (12, 1, 192),
    (13, 64, 576),
    (16, 65, 130),
    (17, 200, 96),
    (31, 32, 40),
    (32, 95, 128),
    (33, 33, 257),
    (48, 40, 100),
    (70, 130, 333),
)


def sets_here(library: Library | None) -> list[Isa]:
    return [isa for isa in Isa if library is not None and isa <= library.isa]


def multiply(
    library: Library, team: int, isa: Isa, weights: Format, x: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """x [m, k] times w [n, k] transposed, all float32."""
    (m, k), n = x.shape, w.shape[0]
    y = torch.full((m, n), torch.nan)
    library.check(
        library.functions.baton_multiply(
            team, isa, weights, m, n, k, x.data_ptr(), w.data_ptr(), y.data_ptr(), 1, None
        )
    )
    return y


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
    return torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)


def quantized(rows: torch.Tensor) -> torch.Tensor:
    """Each row as the nearest of 255 multiples of max / 127, in float64."""
    largest = rows.abs().amax(1, keepdim=True)
    # Not 127 / largest, which torch makes 127 times the rounded reciprocal.
    steps = torch.round(rows * torch.div(torch.tensor(127.0), largest))
    return steps.double() * (largest / 127).double()


def packed_int4(library: Library, team: int, w: torch.Tensor) -> torch.Tensor:
    """The weights as int4 keeps them: one-hot rows find them. Zeros come back as such."""
    return multiply(library, team, Isa.PORTABLE, Format.INT4, torch.eye(w.shape[1]), w).T


def rounded(
    library: Library, team: int, isa: Isa, weights: Format, x: torch.Tensor, w: torch.Tensor
) -> list[torch.Tensor]:
    """What the kernels multiply, in float64: the inputs as the format rounds them."""
    if weights is Format.F32:
        return [x.double(), w.double()]
    if weights is Format.INT8:
        return [quantized(x), quantized(w)]
    if weights is Format.INT4:
        return [quantized(x), packed_int4(library, team, w).double()]
    rows = x.bfloat16() if isa >= Isa.AVX512_BF16 else x
    return [rows.double(), w.bfloat16().double()]


@pytest.mark.parametrize("weights", FORMATS, ids=lambda weights: weights.name)
@pytest.mark.parametrize("isa", Isa, ids=lambda isa: isa.name)
def test_products_are_those_of_the_rounded_inputs(
    library: Library, team: TeamOf, isa: Isa, weights: Format
) -> None:
    if isa > library.isa:
        pytest.skip(f"this machine lacks {library.isa_name(isa)}")
    for m, n, k in SHAPES:
        x, w = operands(m, n, k)
        y = multiply(library, team(2), isa, weights, x, w)
        exact_x, exact_w = rounded(library, team(1), isa, weights, x, w)
        # Each of k additions errs by half a unit in the last place of at most the sum of
        # magnitudes; int8 and int4 add up integers, which is exact, and round when they scale.
        additions = 8 if weights in INTEGERS else k + 2
        bound = additions * 2.0**-24 * (exact_x.abs() @ exact_w.abs().T) + 1e-30
        errors = (y.double() - exact_x @ exact_w.T).abs()
        assert bool((errors <= bound).all()), (m, n, k, (errors / bound).max().item())


@pytest.mark.parametrize("weights", FORMATS, ids=lambda weights: weights.name)
@pytest.mark.parametrize("isa", Isa, ids=lambda isa: isa.name)
def test_a_row_is_the_same_bits_in_every_batch(
    library: Library, team: TeamOf, isa: Isa, weights: Format
) -> None:
    if isa > library.isa:
        pytest.skip(f"this machine lacks {library.isa_name(isa)}")
    x, w = operands(100, 70, 330)
    whole = multiply(library, team(2), isa, weights, x, w)
    for row in (0, 15, 16, 31, 32, 63, 95, 96, 99):
        alone = multiply(library, team(1), isa, weights, x[row : row + 1].contiguous(), w)
        assert torch.equal(alone[0], whole[row]), row
    for rows in (2, 3, 4, 5, 11, 16, 17, 33):
        part = multiply(library, team(2), isa, weights, x[:rows].contiguous(), w)
        assert torch.equal(part, whole[:rows]), rows


def test_subnormal_numbers_are_the_same_bits_in_every_batch(library: Library, team: TeamOf) -> None:
    # Tiles take them for zeros; the vectors that few rows go through must do the same.
    x, w = operands(40, 70, 330)
    x[:20] *= 2.0**-130
    x[20:] *= 2.0**-70
    w *= 2.0**-60
    for isa in sets_here(library):
        whole = multiply(library, team(2), isa, Format.BF16, x, w)
        for rows in (slice(0, 1), slice(18, 22), slice(25, 28)):
            part = multiply(library, team(2), isa, Format.BF16, x[rows].contiguous(), w)
            assert torch.equal(part, whole[rows]), (isa, rows)


@pytest.mark.parametrize("weights", FORMATS[1:], ids=lambda weights: weights.name)
def test_rows_that_exceed_the_cache_are_the_same_bits(
    library: Library, team: TeamOf, weights: Format
) -> None:
    # More than 512 rows and several MiB: AMX goes over rows and depth in blocks.
    x, w = operands(600, 330, 2500)
    whole = multiply(library, team(2), library.isa, weights, x, w)
    for rows in (slice(0, 1), slice(500, 540), slice(599, 600)):
        part = multiply(library, team(2), library.isa, weights, x[rows].contiguous(), w)
        assert torch.equal(part, whole[rows]), rows


@pytest.mark.parametrize("weights", INTEGERS, ids=lambda weights: weights.name)
def test_integers_give_the_same_bits_in_every_instruction_set(
    library: Library, team: TeamOf, weights: Format
) -> None:
    for m in (3, 37):
        x, w = operands(m, 70, 200)
        products = [multiply(library, team(2), isa, weights, x, w) for isa in sets_here(library)]
        for other in products[1:]:
            assert torch.equal(other, products[0])


@pytest.mark.parametrize("weights", INTEGERS, ids=lambda weights: weights.name)
def test_integers_do_not_saturate(library: Library, team: TeamOf, weights: Format) -> None:
    # The largest bytes there are, whose pairs do not fit into 16 bits.
    k = 4864
    x, w = torch.ones(5, k), torch.ones(40, k)
    w[::2] = -1
    for isa in sets_here(library):
        y = multiply(library, team(1), isa, weights, x, w)
        torch.testing.assert_close(y, x @ w.T, rtol=1e-6, atol=0)


def test_int8_is_within_two_percent_of_the_float_product(library: Library, team: TeamOf) -> None:
    x, w = operands(64, 256, 896)
    exact = x.double() @ w.double().T
    y = multiply(library, team(2), library.isa, Format.INT8, x, w)
    assert ((y - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize("weights", INTEGERS, ids=lambda weights: weights.name)
def test_integers_refuse_weights_that_are_not_finite(
    library: Library, team: TeamOf, weights: Format
) -> None:
    for bad in (torch.nan, torch.inf):
        x, w = operands(1, 40, 64)
        w[37, 5] = bad
        with pytest.raises(Exception, match="row 37 has weights that are not finite"):
            multiply(library, team(2), library.isa, weights, x, w)


def test_zero_weights_and_rows_give_zeros(library: Library, team: TeamOf) -> None:
    for isa, weights in itertools.product(sets_here(library), FORMATS):
        x, w = operands(5, 40, 64)
        x[2] = 0
        w[7] = 0
        y = multiply(library, team(1), isa, weights, x, w)
        assert not y[2].any()
        assert not y[:, 7].any()
        assert bool(y[0, :7].all())


def test_a_nan_stays_in_its_row(library: Library, team: TeamOf) -> None:
    for isa, weights in itertools.product(sets_here(library), (Format.F32, Format.BF16)):
        x, w = operands(40, 40, 64)
        clean = multiply(library, team(1), isa, weights, x, w)
        x[20, 3] = torch.nan
        y = multiply(library, team(1), isa, weights, x, w)
        assert bool(y[20].isnan().all())
        others = torch.arange(40) != 20
        assert torch.equal(y[others], clean[others])


def test_formats_and_sets_without_kernels_are_refused(library: Library, team: TeamOf) -> None:
    x, w = operands(1, 32, 64)
    with pytest.raises(Exception, match="float32, bfloat16, int8 or int4"):
        multiply(library, team(1), Isa.PORTABLE, Format.F16, x, w)
    with pytest.raises(Exception, match="lacks the instruction set"):
        code = library.functions.baton_multiply(
            team(1), len(Isa), Format.F32, 1, 32, 64, x.data_ptr(), w.data_ptr(), None, 1, None
        )
        library.check(code)


def test_repeats_are_timed_one_by_one(library: Library, team: TeamOf) -> None:
    x, w = operands(2, 32, 64)
    y, seconds = torch.empty(2, 32), (ctypes.c_double * 3)()
    library.check(
        library.functions.baton_multiply(
            team(1), library.isa, Format.F32, 2, 32, 64,
            x.data_ptr(), w.data_ptr(), y.data_ptr(), 3, seconds,
        )
    )  # fmt: skip
    assert all(duration > 0 for duration in seconds)
