"""Decoding integer codes: against exact fractions, rounded by the obvious rule."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dconv.codec import integer
from dconv.codec.cast import cast
from dconv.errors import Damaged
from dconv.sharding.dtypes import carrier

#: Bits of the mantissa with the hidden one, and the exponents of the smallest and the first too large power of two.
FORMATS = {"f16": (11, -24, 16), "bf16": (8, -133, 128), "f32": (24, -149, 128), "f64": (53, -1074, 1024)}


def nearest(value: Fraction, dtype: str) -> float:
    """To nearest, ties to even, of an exact number."""
    digits, least, most = FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value.numerator))) - math.floor(math.log2(value.denominator)) - digits - 1
    while abs(value) / Fraction(2) ** exponent >= 2**digits:
        exponent += 1
    step = Fraction(2) ** max(exponent, least)
    rounded = round(value / step) * step
    if abs(rounded) >= Fraction(2) ** most:
        return math.copysign(math.inf, value)
    return float(rounded)


def scales_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, *, finite: bool) -> NDArray[np.generic]:
    """Any bits at all, denormals too, and ordinary ones among them."""
    size = int(carrier(dtype)[-1])
    found = rng.integers(0, 256, (*shape, size), dtype=np.uint8).view(carrier(dtype))[..., 0]
    plain = cast(rng.normal(0, 0.02, shape), "f64", dtype)
    found = np.where(rng.random(shape) < 0.5, found, plain)
    return np.where(np.isfinite(cast(found, dtype, "f64")), found, plain) if finite else found


@pytest.mark.parametrize("target", integer.TARGETS)
@pytest.mark.parametrize("source", integer.SCALES)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_nearest_value(source: str, target: str, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    size = data.draw(st.sampled_from([1, 3, 8, 17, 32]))
    rows, columns = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = -(-columns // size)
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    zeros = rng.integers(0, (1 << bits) + 1, (rows, count), dtype=np.int16)
    scales = scales_of(rng, (rows, count), source, finite=True)
    groups = integer.groups_of(columns, size)
    if data.draw(st.booleans()):
        groups = rng.permutation(groups)
    if symmetric := data.draw(st.booleans()):
        zeros = np.full_like(zeros, 1 << (bits - 1))
    found = integer.decode(
        codes, scales, 1 << (bits - 1) if symmetric else zeros, groups, source=source, target=target, bits=bits
    )
    assert found.dtype == np.dtype(carrier(target))
    assert found.shape == codes.shape
    wide, exact = cast(found, target, "f64"), cast(scales, source, "f64")
    for row, column in itertools.product(range(rows), range(columns)):
        group = groups[column]
        value = (int(codes[row, column]) - int(zeros[row, group])) * Fraction(float(exact[row, group]))
        assert wide[row, column] == nearest(value, target)


def test_the_rounding_of_this_test_is_that_of_the_machine() -> None:
    rng = np.random.default_rng(2)
    for value in cast(scales_of(rng, (2000,), "f32", finite=True), "f32", "f64").tolist():
        for dtype, kind in (("f16", np.float16), ("f32", np.float32)):
            with np.errstate(over="ignore"):
                assert nearest(Fraction(value), dtype) == float(kind(value))


@pytest.mark.parametrize("target", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("source", integer.SCALES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_against_every_zero(bits: int, source: str, target: str) -> None:
    """By tables or not, in pieces of rows or not: the same bits."""
    rng = np.random.default_rng(bits)
    count = 1 << bits
    codes = np.tile(np.arange(count, dtype=np.uint8), (count + 1, 3))
    zeros = np.repeat(np.arange(count + 1, dtype=np.int16)[:, None], 2, axis=1)
    scales = scales_of(rng, zeros.shape, source, finite=False)
    scales[-3:, 0] = cast(np.array([np.nan, np.inf, -np.inf]), "f64", source)
    groups = integer.groups_of(codes.shape[1], codes.shape[1] - count)  # the last is short
    found = integer.decode(codes, scales, zeros, groups, source=source, target=target, bits=bits)
    with np.errstate(invalid="ignore", over="ignore"):
        product = (codes - zeros[:, groups]).astype(np.float64) * cast(scales, source, "f64")[:, groups]
    expected = cast(product, "f64", target)
    nan = np.isnan(product)
    assert nan.any() and not nan.all()
    assert np.isnan(cast(found, target, "f64"))[nan].all()
    np.testing.assert_array_equal(found[~nan].view("u1"), expected[~nan].view("u1"))
    for row, column in rng.integers(0, count, (50, 2)).tolist():
        one = (slice(row, row + 1), slice(column, column + 1))
        which = slice(groups[column], groups[column] + 1)
        alone = integer.decode(
            codes[one], scales[one[0], which], zeros[one[0], which], groups[:1], source=source, target=target
        )
        assert nan[row, column] or alone.tobytes() == found[one].tobytes()


@pytest.mark.parametrize("target", integer.TARGETS)
@pytest.mark.parametrize("factor", [0.5, 1 / 3, -7.25])
def test_a_factor_is_one_rounding_more_in_double_precision(factor: float, target: str) -> None:
    rng = np.random.default_rng(9)
    codes = rng.integers(0, 16, (20, 96), dtype=np.uint8)
    zeros = rng.integers(0, 16, (20, 2), dtype=np.uint8)
    scales = scales_of(rng, (20, 2), "f32", finite=True)
    groups = integer.groups_of(96, 64)
    found = integer.decode(codes, scales, zeros, groups, source="f32", target=target, bits=4, factor=factor)
    for (row, column), value in np.ndenumerate(cast(found, target, "f64")):
        scale = Fraction(float(scales[row, groups[column]]))
        exact = (int(codes[row, column]) - int(zeros[row, groups[column]])) * scale * Fraction(factor)
        assert value == nearest(Fraction(nearest(exact, "f64")), target)


def test_groups() -> None:
    assert integer.groups_of(7, 3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert integer.groups_of(4, 3, start=5).tolist() == [1, 2, 2, 2]
    assert integer.groups_of(0, 3).tolist() == []


@pytest.mark.parametrize("groups", [[0, 2], [-1, 0]])
def test_a_group_without_a_scale_is_damage(groups: list[int]) -> None:
    with pytest.raises(Damaged, match="no scale"):
        integer.decode(
            np.zeros((1, 2), np.uint8), np.ones((1, 2), np.float32), 8, np.array(groups), source="f32", target="bf16"
        )


def test_wrong_uses() -> None:
    ones, groups = np.ones((1, 1), np.float32), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="4 bits"):
        integer.decode(np.full((1, 1), 16, np.uint8), ones, 8, groups, source="f32", target="bf16", bits=4)
    with pytest.raises(ValueError, match="f8_e4m3"):
        integer.decode(np.zeros((1, 1), np.uint8), ones, 8, groups, source="f8_e4m3", target="bf16")
