"""Short floating formats: their values, and rounding to them, by ml_dtypes, torch and whole numbers."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dconv.codec import minifloat
from dconv.codec.minifloat import E4M3, E5M2, FORMATS, Minifloat, error_bound, nearest, values
from tests.codec.tensors import tensors

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e4m3_ieee": ml_dtypes.float8_e4m3,
    "e2m1": ml_dtypes.float4_e2m1fn, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn,
}  # fmt: skip
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def around_every_step(fmt: Minifloat) -> NDArray[np.float32]:
    """Every value, every point half way to the next, and fp32's neighbours of both, to beyond the largest."""
    finite = values(fmt)[: fmt.largest_code + 1]
    points = np.append(finite, [(a + b) / 2 for a, b in zip(finite, [*finite[1:], fmt.largest * 2], strict=True)])
    exact = points.astype(np.float32)
    assert np.array_equal(exact, points)
    near = np.concatenate([exact, *(np.nextafter(exact, np.float32(end)) for end in (-np.inf, np.inf))])
    return np.concatenate([near, -near])


def by_whole_numbers(fmt: Minifloat, x: float) -> int:
    """Slow and plain: of all finite codes of the sign the closest, of two the even one."""
    sign = fmt.sign if np.signbit(x) else 0
    size = Fraction(min(abs(x), fmt.largest))
    return sign | min(
        range(fmt.largest_code + 1), key=lambda code: (abs(Fraction(float(values(fmt)[code])) - size), code % 2)
    )


@every_format
def test_values_are_those_of_ml_dtypes(fmt: Minifloat) -> None:
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    found, expected = values(fmt), codes.view(ML_DTYPES[fmt.name]).astype(np.float64)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found)[~np.isnan(found)], np.signbit(expected)[~np.isnan(found)])
    assert fmt.largest == float(ml_dtypes.finfo(ML_DTYPES[fmt.name]).max)
    assert fmt.tiniest == float(ml_dtypes.finfo(ML_DTYPES[fmt.name]).smallest_subnormal)


@pytest.mark.parametrize("name", TORCH)
def test_values_are_those_of_torch(name: str) -> None:
    fmt = next(fmt for fmt in FORMATS if fmt.name == name)
    expected = torch.arange(256, dtype=torch.uint8).view(TORCH[name]).double().numpy()
    assert np.array_equal(values(fmt), expected, equal_nan=True)


@every_format
def test_rounds_as_ml_dtypes_does(fmt: Minifloat) -> None:
    for x in (around_every_step(fmt), *tensors(240, (40, 50), (0,), ())):
        for factor in (1, fmt.largest * 20):
            with np.errstate(invalid="ignore", over="ignore"):
                scaled = x * np.float32(factor)
                expected = np.clip(scaled, -fmt.largest, fmt.largest).astype(ML_DTYPES[fmt.name]).view(np.uint8)
            number = ~np.isnan(scaled)
            found = nearest(fmt, scaled)
            assert found.shape == x.shape and found.dtype == np.uint8
            assert np.array_equal(found[number], expected[number])
            assert np.isnan(values(fmt)[found[~number]]).all() if fmt.nan else not found[~number].any()


@pytest.mark.parametrize("name", TORCH)
def test_rounds_as_torch_does_nan_included(name: str) -> None:
    fmt = next(fmt for fmt in FORMATS if fmt.name == name)
    for x in (around_every_step(fmt), *tensors(240, (40, 50))):
        clamped = torch.from_numpy(x).clamp(-fmt.largest, fmt.largest)
        assert np.array_equal(nearest(fmt, x), clamped.to(TORCH[name]).view(torch.uint8).numpy())


@every_format
@settings(max_examples=300, deadline=None)
@given(x=st.floats(width=32, allow_nan=False) | st.floats(-64, 64, width=32))
def test_rounds_to_the_closest_even_of_two(fmt: Minifloat, x: float) -> None:
    assert int(nearest(fmt, np.float32(x))) == by_whole_numbers(fmt, x)


@every_format
def test_every_value_is_its_own_code(fmt: Minifloat) -> None:
    finite = np.flatnonzero(np.isfinite(values(fmt)))
    assert np.array_equal(nearest(fmt, values(fmt)[finite].astype(np.float32)), finite)


def test_infinity_is_kept_nan_or_saturated() -> None:
    x = np.array([np.inf, -np.inf, 3e38, -3e38], np.float32)
    assert nearest(E4M3, x).tolist() == [0x7E, 0xFE, 0x7E, 0xFE]
    assert nearest(E4M3, x, saturate=False).tolist() == [0x7F, 0xFF, 0x7E, 0xFE]
    assert nearest(E5M2, x, saturate=False).tolist() == [0x7C, 0xFC, 0x7B, 0xFB]
    assert nearest(minifloat.E2M1, x, saturate=False).tolist() == [7, 15, 7, 15]


@every_format
def test_error_bound_is_kept_and_reached(fmt: Minifloat) -> None:
    x = np.concatenate([around_every_step(fmt), np.float32(fmt.largest) * np.linspace(-3, 3, 999, dtype=np.float32)])
    error, bound = np.abs(values(fmt)[nearest(fmt, x)] - x), error_bound(fmt, x, 1.0)
    assert (error <= bound).all()
    reached, within = error > bound * 0.99, np.abs(x) < fmt.largest
    assert reached[within].any() and reached[~within].any()
