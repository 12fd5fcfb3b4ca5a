"""Random tensors with what numbers can be odd in, and one slow rounding to judge by."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from dconv.sharding.dtypes import carrier

#: Bits of significand with the hidden one, exponent of the smallest subnormal, exponent past the largest finite.
FORMAT = {"f64": (53, -1074, 1024), "f32": (24, -149, 128), "f16": (11, -24, 16), "bf16": (8, -133, 128)}
KINDS = ("weights", "wide", "tiny", "huge", "bits", "zeros", "some zeros", "nan", "infinite", "steps")


def tensor(kind: str, seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """fp32 numbers of one kind: ``bits`` are any finite patterns at all, ``steps`` many ties of short formats."""
    draw = np.random.default_rng([seed, KINDS.index(kind)])
    x = draw.normal(0, 0.02, shape)
    if kind == "wide":
        x *= 2.0 ** draw.integers(-30, 30, shape)
    if kind == "tiny":
        x *= 2.0 ** draw.integers(-149, -118)
    if kind == "huge":
        x *= 2.0 ** draw.integers(120, 130)
    if kind == "zeros":
        x *= 0.0
    if kind == "steps":
        x = draw.integers(-1024, 1025, shape) * 2.0 ** draw.integers(-12, -2)
    with np.errstate(over="ignore"):
        found = x.astype(np.float32)
    if kind == "bits":
        found = draw.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)
        found[~np.isfinite(found)] = 0
    odd = draw.random(shape)
    if kind == "some zeros":
        found[odd < 0.97] = 0
    if kind in ("nan", "infinite"):
        found[odd < 0.01] = np.nan if kind == "nan" else np.inf
        found[odd > 0.99] *= -np.inf if kind == "infinite" else np.float32(1)
    return found


def tensors(count: int, *shapes: tuple[int, ...], kinds: tuple[str, ...] = KINDS) -> Iterator[NDArray[np.float32]]:
    """``count`` of them, of all kinds, in these shapes by turns."""
    for seed in range(count):
        yield tensor(kinds[seed % len(kinds)], seed, shapes[seed // len(kinds) % len(shapes)])


def number(found: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """What a carrier holds."""
    with np.errstate(invalid="ignore"):
        return found.view(ml_dtypes.bfloat16 if dtype == "bf16" else carrier(dtype)).astype(np.float64)


def rounded(exact: Fraction, dtype: str) -> float:
    """The nearest number of a plain type, ties to even, by whole numbers."""
    digits, least, top = FORMAT[dtype]
    size = abs(exact)
    if not size:
        return 0.0
    power = size.numerator.bit_length() - size.denominator.bit_length()
    power -= Fraction(2) ** power > size
    step = Fraction(2) ** max(power - digits + 1, least)
    whole = round(size / step) * step  # of a Fraction, round() is to even
    found = float(whole) if whole < Fraction(2) ** top else float("inf")
    return found if exact > 0 else -found
