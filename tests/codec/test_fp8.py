"""Block FP8: bit by bit what transformers writes, read as transformers reads it, and right where that is not."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from dconv.codec import e8m0, fp8
from dconv.codec.cast import cast
from dconv.codec.minifloat import E4M3, E4M3_IEEE, E5M2, Minifloat, error_bound, nearest, values
from dconv.sharding.dtypes import carrier
from tests.codec.tensors import KINDS, number, rounded, tensor, tensors

#: Shapes with blocks that divide them: square, one for a row, one for all, three axes.
TILED = (((32, 48), (16, 16)), ((6, 40), (1, 40)), ((24, 8), (24, 8)), ((3, 16, 64), (8, 32)))
RAGGED = (((33, 50), (16, 16)), ((7, 40), (1, 64)), ((24, 9), (100, 4)), ((2, 3, 17, 31), (8, 8)), ((1, 1), (128, 128)))
FINITE = tuple(kind for kind in KINDS if kind not in ("nan", "infinite"))
#: Below this a block of E4M3 has an amax whose 448 / amax is past fp32: transformers' scale is zero there.
LEAST = np.float32(448 / 2**128 * (1 + 2**-20))


def hub(block: tuple[int, int], scale_fmt: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))


def by_transformers(
    x: NDArray[np.float32], block: tuple[int, int], scale_fmt: str | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    found = Fp8Quantize(hub(block, scale_fmt)).convert({"a.weight": torch.from_numpy(x)})  # pyright: ignore
    return found["a.weight"].view(torch.uint8).numpy(), found["a.weight_scale_inv"].float().numpy()


def spread(grid: NDArray[np.generic], block: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Each element's scale, slowly."""
    found = np.empty(shape, grid.dtype)
    for at in np.ndindex(shape):
        found[at] = grid[(*at[:-2], at[-2] // block[0], at[-1] // block[1])]
    return found


def padded(x: NDArray[np.float32], block: tuple[int, int]) -> NDArray[np.float32]:
    by = [(0, -n % of) for n, of in zip(x.shape[-2:], block, strict=True)]
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + by)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize(("shape", "block"), TILED)
def test_encodes_as_transformers(shape: tuple[int, ...], block: tuple[int, int], scale_fmt: str | None) -> None:
    for x in tensors(240, shape, kinds=FINITE):
        codes, scale = fp8.encode(x, block, power_of_two=scale_fmt is not None)
        expected, their_scale = by_transformers(x, block, scale_fmt)
        same = np.ones(scale.shape, bool) if scale_fmt else (fp8.amax(x, block) == 0) | (fp8.amax(x, block) >= LEAST)
        assert np.array_equal(scale[same], their_scale[same])
        everywhere = spread(same, block, shape)
        assert np.array_equal(codes[everywhere], expected[everywhere])


def test_power_of_two_is_rounded_up_as_transformers_does_near_every_power() -> None:
    steps = np.array([-3, -2, -1, 0, 1, 2, 3, 5, 8, 16, 32, 64], np.int64)
    powers = (np.arange(1, 255, dtype=np.int64) << 23) + (448 - 256 << 15)  # 1.75 · 2^k: 448 / amax is a power of two
    x = (powers[:, None] + steps).astype(np.uint32).view(np.float32).reshape(-1, 1)
    codes, scale = fp8.encode(x, (1, 1), power_of_two=True)
    expected, their_scale = by_transformers(x, (1, 1), "ue8m0")
    assert np.array_equal(scale, their_scale) and np.array_equal(codes, expected)
    assert np.array_equal(e8m0.from_bytes(e8m0.to_bytes(scale)), scale)


@pytest.mark.parametrize(("shape", "block"), RAGGED)
@pytest.mark.parametrize("fmt", [E4M3, E5M2, E4M3_IEEE], ids=lambda fmt: fmt.name)
def test_edges_are_those_of_the_tensor_padded_with_zeros(
    shape: tuple[int, ...], block: tuple[int, int], fmt: Minifloat
) -> None:
    inside = (..., slice(shape[-2]), slice(shape[-1]))
    for x in tensors(200, shape):
        codes, scale = fp8.encode(x, block, fmt)
        whole, their_scale = fp8.encode(padded(x, block), block, fmt)
        assert np.array_equal(codes, whole[inside]) and np.array_equal(scale, their_scale)
        if fmt is E4M3 and np.isfinite(x).all() and (scale > 3e-39).all():
            expected, by_them = by_transformers(padded(x, block), block)
            assert np.array_equal(codes, expected[inside]) and np.array_equal(scale, by_them)


def test_a_block_too_small_for_a_multiplier_is_right_where_transformers_makes_nan() -> None:
    for size in (LEAST / 2, np.float32(1e-37), np.float32(1e-40)):
        x = np.array([[0, size], [-size, size / 2]], np.float32)
        theirs, their_scale = by_transformers(x, (2, 2))
        assert their_scale == 0 and theirs[0, 0] == 0xFF  # zero times infinity
        codes, scale = fp8.encode(x, (2, 2))
        assert scale == np.float32(1) / np.finfo(np.float32).max
        assert (np.abs(fp8.decode(codes, scale, (2, 2), "f64") - x) <= error_bound(E4M3, x, scale)).all()
        assert codes[0, 0] == 0


def test_nan_and_infinity_leave_the_rest_of_their_block_as_it_is() -> None:
    """transformers gives the block of a NaN the scale 1, and makes zeros of the one of an infinity."""
    for seed in range(200):
        x = tensor("weights", seed, (16, 16))
        plain, scale = fp8.encode(x, (16, 16))
        odd = x.copy()
        at = np.random.default_rng(seed).random(x.shape)
        at[np.unravel_index(np.abs(x).argmax(), x.shape)] = 1  # amax stays
        odd[at < 0.02], odd[at < 0.01] = np.nan, -np.inf
        for fmt, infinity in ((E4M3, 0xFF), (E5M2, 0xFC)):
            plain, scale = fp8.encode(x, (16, 16), fmt)
            codes, found = fp8.encode(odd, (16, 16), fmt)
            assert np.array_equal(found, scale)
            assert np.array_equal(codes[at >= 0.02], plain[at >= 0.02])
            assert (codes[at < 0.01] == infinity).all()
            assert np.isnan(values(fmt)[codes[(at >= 0.01) & (at < 0.02)]]).all()
    for value, theirs in ((np.nan, 1.0), (np.inf, np.inf)):
        assert by_transformers(np.array([[0.5, value]], np.float32), (1, 2))[1] == theirs
    only = np.full((2, 2), np.nan, np.float32)
    assert fp8.encode(only, (2, 2))[1] == 1


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("fmt", [E4M3, E5M2, E4M3_IEEE], ids=lambda fmt: fmt.name)
def test_error_is_within_the_bound(fmt: Minifloat, power_of_two: bool) -> None:
    for x in tensors(240, *(shape for shape, _ in RAGGED), kinds=FINITE):
        codes, scale = fp8.encode(x, (8, 16), fmt, power_of_two=power_of_two)
        back = fp8.decode(codes, scale, (8, 16), "f64", fmt=fmt)
        each = spread(scale, (8, 16), x.shape)
        assert (np.abs(back - x) <= error_bound(fmt, x, each)).all()
        assert np.array_equal(np.signbit(back), np.signbit(x))


@pytest.mark.parametrize("target", ["f32", "bf16", "f16"])
def test_decodes_as_transformers(target: str) -> None:
    """Theirs goes through fp32 and may round twice, unless the product is exact there."""
    kind = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[target]
    for seed, (shape, block) in enumerate(TILED * 50):
        x = tensor(FINITE[seed % len(FINITE)], seed, shape)
        for power_of_two in (False, True):
            codes, scale = fp8.encode(x, block, power_of_two=power_of_two)
            theirs = Fp8Dequantize(hub(block))._dequantize_one(  # pyright: ignore
                torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale), kind
            )
            expected = theirs.view(torch.int32 if target == "f32" else torch.int16).numpy().view(carrier(target))
            found = fp8.decode(codes, scale, block, target)
            if power_of_two or target == "f32":
                assert np.array_equal(found, expected)
            else:
                patterns = (of.view(np.int16).astype(np.int32) for of in (found, expected))
                assert (np.abs(np.subtract(*patterns)) <= 1).all()


@pytest.mark.parametrize("target", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("reciprocal", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    code=st.integers(0, 0x7E),
    scale=st.floats(2.0**-126, 2.0**100, width=32) | st.floats(2.0**-16, 2.0**-8, width=32),
    many=st.booleans(),
)
def test_rounds_once(target: str, reciprocal: bool, code: int, scale: float, many: bool) -> None:
    shape = (24, 32) if many else (2, 2)  # by table, and one by one
    codes, grid = np.full(shape, code, np.uint8), np.full((1, 1), scale, np.float32)
    found = number(fp8.decode(codes, grid, (32, 32), target, reciprocal=reciprocal), target)
    exact = Fraction(float(values(E4M3)[code]))
    exact = exact / Fraction(scale) if reciprocal else exact * Fraction(scale)
    assert (found == rounded(exact, target)).all() or (target == "f64" and reciprocal)
    assert np.allclose(found, rounded(exact, target), rtol=2.0**-52, atol=0)


def test_reciprocal_is_gptqmodels_meaning() -> None:
    x = tensor("weights", 1, (16, 16))
    stored, _ = fp8.scales(fp8.amax(x, (16, 16)))
    codes = nearest(E4M3, x * stored)
    back = fp8.decode(codes, stored, (16, 16), "f64", reciprocal=True)
    assert np.allclose(back, x, rtol=2.0**-4, atol=float(2.0**-10 / stored[0, 0]))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_part_decodes_by_the_scales_that_it_touches(data: st.DataObject) -> None:
    block = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 40)))
    rows, cols = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 90)))
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, cols))
    target, factor = (
        data.draw(st.sampled_from(["f32", "bf16", "f16", "f64"])),
        data.draw(st.sampled_from([1.0, 0.3, 12.0])),
    )
    x = tensor("weights", rows * cols, (2, rows, cols))
    codes, scale = fp8.encode(x, block)
    whole = fp8.decode(codes, scale, block, target, factor=factor)
    grid = scale[:, top // block[0] : -(-bottom // block[0]), left // block[1] : -(-right // block[1])]
    place = {"row0": top % block[0], "col0": left % block[1]}
    part = fp8.decode(codes[:, top:bottom, left:right], grid, block, target, factor=factor, **place)
    assert np.array_equal(part, whole[:, top:bottom, left:right])
    exact = values(E4M3)[codes] * spread(scale, block, x.shape).astype(np.float64) * factor
    assert np.array_equal(whole, cast(exact, "f64", target)) or factor == 0.3  # which multiplies in another order
    assert np.allclose(number(whole, target), exact, rtol=2.0**-8, atol=2.0**-25)
    largest = fp8.amax(x, block)[:, top // block[0] : -(-bottom // block[0]), left // block[1] : -(-right // block[1])]
    again, stored = fp8.encode(x[:, top:bottom, left:right], block, largest=largest, **place)
    assert np.array_equal(again, codes[:, top:bottom, left:right]) and np.array_equal(stored, grid)


@pytest.mark.parametrize("target", ["f32", "bf16", "f16", "f64"])
def test_scales_of_every_kind(target: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    powers = np.array([[-20, 3], [0, -7]])
    plain = number(fp8.decode(codes, np.ldexp(np.float32(1), powers), (2, 32), target), target)
    for scale in ((powers + 127).astype(np.uint8), ((powers + 127) << 7).astype(np.uint16)):
        found = number(fp8.decode(codes, scale, (2, 32), target), target)
        assert np.array_equal(found, plain, equal_nan=True) and np.isnan(found).sum() == 2
    for odd in (np.uint8(255), np.float32(np.nan)):
        found = fp8.decode(codes, np.full((2, 2), odd), (2, 32), target)
        assert np.isnan(number(found, target)).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 7), (0, 4, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = np.empty(shape, np.float32)
    codes, scale = fp8.encode(x, (2, 3))
    assert codes.shape == shape and scale.shape == (*shape[:-2], -(-shape[-2] // 2), -(-shape[-1] // 3))
    assert fp8.decode(codes, scale, (2, 3), "bf16").shape == shape


def test_what_has_no_blocks_is_an_error() -> None:
    one, square = np.zeros(4, np.float32), np.zeros((4, 4), np.float32)
    codes, grid = np.zeros((4, 4), np.uint8), np.ones((2, 2), np.float32)
    for wrong in (
        lambda: fp8.encode(one, (2, 2)),
        lambda: fp8.encode(np.float32(1).reshape(()), (2, 2)),
        lambda: fp8.encode(square, (0, 2)),
        lambda: fp8.encode(square, (2, 2), row0=1),
        lambda: fp8.encode(square, (2, 2), largest=np.ones((2, 3), np.float32)),
        lambda: fp8.decode(codes, grid, (4, 4), "bf16"),
        lambda: fp8.decode(codes, grid, (2, 2), "bf16", row0=2),
        lambda: fp8.decode(codes, grid, (2, 2), "bf16", col0=1),
        lambda: fp8.decode(codes, grid[:, :1], (2, 2), "bf16"),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_bytes_of_scales_are_those_of_torch() -> None:
    every = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(every).view(torch.float8_e8m0fnu).double().numpy()
    assert np.array_equal(e8m0.from_bytes(every), expected, equal_nan=True)
    assert np.array_equal(e8m0.to_bytes(expected), every)
    for wrong in (3.0, 0.0, -1.0, 2.0**128, 2.0**-128, np.inf):
        with pytest.raises(ValueError):
            e8m0.to_bytes(np.array([wrong]))
