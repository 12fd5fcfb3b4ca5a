"""MLX's affine codes against what MLX itself makes of the same weights (recorded by tests/formats/record_mlx.py)."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv.codec import affine, bitpack
from dconv.codec.cast import cast
from dconv.errors import Damaged

RECORDED = Path(__file__).parent / "recorded" / "mlx_quantize.json"
DTYPES = ("f32", "bf16", "f16")
NAMES = [f"{dtype}.{bits}.{group}" for dtype in DTYPES for bits in affine.BITS for group in affine.GROUPS]


def weights(dtype: str) -> NDArray[np.float32]:
    """Rows of many sizes, and those where the rule has edges: zeros, one sign, one value, whole numbers, tiny ones."""
    draw = np.random.default_rng(7)
    found = draw.integers(-(2**20), 2**20, (24, 256)).astype(np.float32) * np.float32(2.0**-20)
    found *= (2.0 ** draw.integers(-9, 5, (24, 1))).astype(np.float32)
    found[0], found[1], found[4], found[5] = 0, 1e-9, 2.5, -0.125
    found[2], found[3] = np.abs(found[2]), -np.abs(found[3])
    found[6] *= np.float32(2.0**-100)
    found[7, ::2] = 0
    found[8] = np.round(found[8] * 8)
    return cast(cast(found, "f32", dtype), dtype, "f32").view(np.float32)


def digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_mlx_s(name: str) -> None:
    dtype, bits, group = name.split(".")
    dense = weights(dtype)
    scales, biases = affine.steps(dense, int(bits), int(group))
    words = bitpack.pack(affine.encode(dense, int(bits), int(group)), int(bits))
    found = [words, cast(scales, "f32", dtype), cast(biases, "f32", dtype)]
    assert [digest(values) for values in found] == json.loads(RECORDED.read_text())[name]


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_with_one_rounding(dtype: str) -> None:
    draw = np.random.default_rng(1)
    codes = draw.integers(0, 256, (3, 64)).astype(np.uint8)
    drawn = [draw.standard_normal((3, 2)).astype(np.float32) for _ in "sb"]
    scales, biases = (cast(values, "f32", dtype) for values in drawn)
    exact_s, exact_b = (cast(values, dtype, "f64").view("<f8") for values in (scales, biases))
    found = affine.decode(codes, scales, biases, source=dtype, target="bf16")
    for row in range(3):
        for column in range(64):
            at = row, column // 32
            exact = Fraction(float(exact_s[at])) * int(codes[row, column]) + Fraction(float(exact_b[at]))
            got = Fraction(float(cast(found[row, column : column + 1], "bf16", "f64").view("<f8")[0]))
            assert abs(got - exact) <= abs(exact) / 2**8
    wide = affine.decode(codes, scales, biases, source=dtype, target="f64")
    assert (wide == codes * np.repeat(exact_s, 32, -1) + np.repeat(exact_b, 32, -1)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_has_no_code(value: float) -> None:
    dense = np.ones((2, 64), np.float32)
    dense[1, 5] = value
    with pytest.raises(Damaged, match="not a finite number"):
        affine.encode(dense, 4, 32)


def test_a_group_whose_range_fp32_has_not_has_no_codes() -> None:
    dense = np.ones((2, 64), np.float32)
    dense[1, 4:6] = 3e38, -3e38
    with pytest.raises(Damaged, match="distance"):
        affine.encode(dense, 4, 32)
