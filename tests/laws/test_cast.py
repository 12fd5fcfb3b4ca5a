"""Casts: widening is exact, narrowing rounds once to the nearest even, over every pattern and kind of edge.

Three judges: torch for fp32, `fractions` and ml_dtypes for fp64 (torch goes through fp32 there and may round twice).
"""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dconv.codec.cast import cast
from dconv.codec.kernels import apply
from dconv.sharding.dtypes import carrier
from dconv.sharding.ops import Cast

TORCH = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
QUIET = {"f64": 1 << 51, "f32": 1 << 22, "f16": 1 << 9, "bf16": 1 << 6}
BITS = {"f64": np.uint64, "f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}
#: (bits of significand with the hidden one, exponent of the smallest subnormal, exponent past the largest finite)
FORMAT = {"f32": (24, -149, 128), "f16": (11, -24, 16), "bf16": (8, -133, 128)}
EVERY = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)

Numbers = NDArray[np.generic]


def number(values: Numbers, dtype: str) -> NDArray[np.float64]:
    """The values that a carrier holds, as fp64, by ml_dtypes where numpy has no such type."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.view(ml_dtypes.bfloat16 if dtype == "bf16" else carrier(dtype)).astype(np.float64)


def same(found: Numbers, expected: Numbers, target: str) -> None:
    """Bit by bit; of a NaN only that it is one."""
    assert found.dtype == np.dtype(carrier(target))
    nan = np.isnan(number(expected, target))
    assert np.array_equal(np.isnan(number(found, target)), nan)
    a, b = found.view(BITS[target]), expected.view(BITS[target])
    wrong = np.flatnonzero((a != b) & ~nan)
    assert not wrong.size, [(hex(a[i]), hex(b[i])) for i in wrong[:4]]


def by_torch(values: Numbers, source: str, target: str) -> Numbers:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    given = torch.from_numpy(values.view(f"<i{values.itemsize}").copy()).view(TORCH[source]).to(TORCH[target])
    return given.view(bits[given.element_size()]).numpy().view(carrier(target))


def edges(target: str, source: type[np.floating]) -> NDArray[np.floating]:
    """Every finite value of a 16-bit type, every point half way to the next, and their neighbours, both signs."""
    values = number(EVERY[: 1 << 15], target)
    values = values[np.isfinite(values)]
    top = np.ldexp(1.0, FORMAT[target][2])
    halves = (values + np.append(values[1:], top)) / 2
    exact = np.concatenate([values, halves, [top, top * 2]]).astype(np.float64)
    with np.errstate(over="ignore"):
        given = exact.astype(source)
    ends = [np.nextafter(given, source(end)) for end in (-np.inf, np.inf)]
    info = np.finfo(source)
    odd = np.array([info.max, info.tiny, info.smallest_subnormal, np.inf], source)
    found = np.concatenate([given, *ends, odd])
    return np.concatenate([found, -found])


def nans(dtype: str) -> Numbers:
    """Quiet and signalling, of both signs, with the payload high, low, or in bits that no shorter type keeps."""
    bits, digits, exponent = {"f64": (64, 52, 0x7FF), "f32": (32, 23, 0xFF)}[dtype]
    payloads = [1, 2, 1 << (digits - 1), (1 << (digits - 1)) + 1, (1 << digits) - 1, 1 << (digits - 8)]
    return np.array([s << (bits - 1) | exponent << digits | p for s in (0, 1) for p in payloads], f"<u{bits // 8}")


@pytest.mark.parametrize("source", ["bf16", "f16"])
@pytest.mark.parametrize("target", ["f32", "f64"])
def test_every_16_bit_pattern_widens_exactly(source: str, target: str) -> None:
    values = EVERY.view(carrier(source))
    wide = cast(values, source, target)
    with np.errstate(invalid="ignore"):
        same(wide, number(values, source).astype(carrier(target)), target)
    same(wide, by_torch(values, source, target), target)
    back = cast(wide, target, source).view(np.uint16)
    plain = ~np.isnan(number(values, source))
    assert np.array_equal(back[plain], EVERY[plain])
    assert np.array_equal(np.signbit(wide[plain]), EVERY[plain] >> 15 == 1)  # the two zeros, too


@pytest.mark.parametrize(("source", "target"), [("bf16", "f16"), ("f16", "bf16")])
def test_every_16_bit_pattern_to_the_other_type(source: str, target: str) -> None:
    values = EVERY.view(carrier(source))
    same(cast(values, source, target), by_torch(values, source, target), target)


@pytest.mark.parametrize("target", ["bf16", "f16"])
def test_fp32_rounds_to_the_nearest_even(target: str) -> None:
    values = np.concatenate([edges(target, np.float32), nans("f32").view("<f4")])
    found = cast(values, "f32", target)
    same(found, by_torch(values, "f32", target), target)
    assert np.array_equal(number(found, target)[-len(nans("f32")) :], np.full(12, np.nan), equal_nan=True)


@pytest.mark.parametrize("target", ["bf16", "f16"])
def test_random_fp32_patterns(target: str) -> None:
    values = np.frombuffer(np.random.default_rng(0).bytes(1 << 20), "<f4")
    same(cast(values, "f32", target), by_torch(values, "f32", target), target)


def nearest(value: float, target: str) -> float:
    """IEEE 754 round to nearest even in whole numbers and fractions only; infinity past the range."""
    digits, lowest, top = FORMAT[target]
    if value == 0 or not np.isfinite(value):
        return value
    exact = abs(Fraction(value))
    exponent = lowest
    while exact >= Fraction(2) ** (exponent + digits):
        exponent += 1
    rounded = round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent  # round() of a Fraction: ties to even
    size = np.inf if rounded >= Fraction(2) ** top else float(rounded)
    return float(np.copysign(size, value))


def twice(target: str) -> list[float]:
    """fp64 values that another rounding on the way (to fp32) would put on the wrong side."""
    digits = FORMAT[target][0]
    found = []
    for scale in (1.0, 3.0, 2.0**-10, 2.0**-14, 2.0**-20):
        for step in range(4):
            half = scale * (1 + (step + 0.5) * 2.0 ** (1 - digits))
            found += [half + side * half * 2.0**-k for side in (-1, 1) for k in (26, 30, 40, 51)]
    return found


@pytest.mark.parametrize("target", ["bf16", "f16", "f32"])
def test_fp64_rounds_once(target: str) -> None:
    most = float(np.finfo(np.float32).max)
    singles = np.array([most, most + 2.0**103, most + 2.0**103 - 2.0**80, 2.0**-149, 2.0**-150, 2.0**-151, 1.0, 3e-40])
    around = [np.nextafter(singles, end) for end in (-np.inf, np.inf)]
    shorter = "bf16" if target == "f32" else target
    some = edges(shorter, np.float64)[::41]
    more = np.array(twice(shorter))
    values = np.concatenate([some, singles, *around, more, -more, [0.0, -0.0, np.inf, -np.inf, 5e-324, 1e308]])
    expected = np.array([nearest(float(value), target) for value in values])
    found = cast(values, "f64", target)
    wrong = [v.hex() for v, a, b in zip(values, number(found, target), expected, strict=True) if a != b]
    assert not wrong, wrong[:4]
    assert np.array_equal(np.signbit(number(found, target)), np.signbit(values))


@pytest.mark.parametrize("target", ["bf16", "f16"])
def test_fp64_at_every_edge_of_a_16_bit_type(target: str) -> None:
    """All of them, against one correct rounding of fp64 by way of whole-number arithmetic on ordered bit patterns."""
    values = edges(target, np.float64)
    grid = number(EVERY[: 1 << 15], target)
    grid = np.append(grid[np.isfinite(grid)], np.ldexp(1.0, FORMAT[target][2]))
    at = np.clip(np.searchsorted(grid, np.abs(values), side="right") - 1, 0, len(grid) - 2)
    size = np.minimum(np.abs(values), grid[-1])
    below, above = size - grid[at], grid[at + 1] - size  # both exact: fp64 has 42 bits to spare
    index = np.where((above < below) | ((above == below) & (at % 2 == 1)), at + 1, at)
    expected = (index | np.where(np.signbit(values), 1 << 15, 0)).astype(np.uint16).view(carrier(target))
    same(cast(values, "f64", target), expected, target)


@pytest.mark.parametrize("target", ["bf16", "f16", "f32"])
def test_nan_of_fp64_stays_nan(target: str) -> None:
    found = cast(nans("f64").view("<f8"), "f64", target)
    assert found.dtype == np.dtype(carrier(target))
    assert np.isnan(number(found, target)).all()


def test_a_nan_comes_out_quiet() -> None:
    """As the module says; numpy's own fp16 casts quiet it or not, by how numpy was built. bf16 → fp32 appends zeros."""
    signalling = {"bf16": 0x7F81, "f16": 0x7C01, "f32": 0x7F80_0001, "f64": 0x7FF0_0000_0000_0001}
    loud: list[str] = []
    for source, bits in signalling.items():
        for target in TORCH.keys() - {source}:
            found = cast(np.array([bits], BITS[source]).view(carrier(source)), source, target)
            if not int(found.view(BITS[target])[0]) & QUIET[target]:
                loud.append(f"{source} to {target}")
    assert loud == ["bf16 to f32"]


def test_fp32_widens_to_fp64_exactly() -> None:
    values = np.concatenate([np.frombuffer(np.random.default_rng(1).bytes(1 << 18), "<f4"), nans("f32").view("<f4")])
    same(cast(values, "f32", "f64"), number(values, "f32"), "f64")


@pytest.mark.parametrize("source", ["bf16", "f16", "f32", "f64"])
@pytest.mark.parametrize("target", ["bf16", "f16", "f32", "f64"])
def test_shape_and_strides_do_not_matter_and_the_kernel_is_this_cast(source: str, target: str) -> None:
    flat = np.frombuffer(np.random.default_rng(2).bytes(24 * np.dtype(carrier(source)).itemsize), carrier(source))
    turned = flat.reshape(2, 3, 4).transpose(2, 0, 1)
    expected = cast(flat, source, target).reshape(2, 3, 4).transpose(2, 0, 1)
    assert cast(turned, source, target).tobytes() == expected.tobytes()
    if source != target:
        assert apply(Cast(source, target), turned).tobytes() == expected.tobytes()


def test_any_shape_stays_what_it_is() -> None:
    """A tensor of no axis, of one element, and of none."""
    for shape in ((), (1,), (1, 1), (0,), (3, 0, 2)):
        for source in TORCH:
            for target in TORCH:
                given = np.zeros(shape, carrier(source))
                assert cast(given, source, target).shape == shape, (source, target)
