"""MatMulNBits' codes against onnxruntime's own quantiser, bit by bit, and against the bound that is stated."""

from __future__ import annotations

import numpy as np
import pytest

from dconv.codec import nbits
from dconv.codec.cast import cast
from dconv.errors import Damaged

ort = pytest.importorskip("onnxruntime.capi._pybind_state")


def weights(columns: int, seed: int = 0) -> np.ndarray:
    """[48, columns] of several magnitudes, with a row of zeros, and one whose extremes are as far apart as can be."""
    draw = np.random.default_rng(seed)
    found = draw.standard_normal((48, columns)) * np.exp(draw.standard_normal((48, 1)))
    found[3], found[4, :2], found[5, :2] = 0, (1.5, -1.5), (-2, 2)
    return found.astype(np.float32)


def theirs(found: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = found.shape
    blocks = -(-columns // block)
    packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros((rows, blocks), found.dtype)
    zeros = np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
    padded = np.ascontiguousarray(np.pad(found, ((0, 0), (0, blocks * block - columns))).T)
    quantise = ort.quantize_matmul_4bits if bits == 4 else ort.quantize_matmul_8bits
    quantise(packed, padded, scales, zeros, block, rows, columns, True)
    return packed, scales


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("bits", nbits.BITS)
def test_codes_are_those_of_onnxruntime(bits: int, block: int, dtype: str) -> None:
    found = weights(4 * block)
    narrow = cast(found, "f32", dtype).view(np.float32 if dtype == "f32" else np.float16)
    packed, scales = theirs(narrow, bits, block)
    wide = narrow.astype(np.float32)
    mine = nbits.pack(nbits.encode(wide, bits, block, dtype), bits).reshape(packed.shape)
    assert np.array_equal(mine, packed)
    assert np.array_equal(nbits.scales(wide, bits, block, dtype).view(scales.dtype), scales)


@pytest.mark.parametrize("bits", nbits.BITS)
def test_error_is_within_the_bound(bits: int) -> None:
    found = weights(256)
    scales = nbits.scales(found, bits, 32, "f32").view(np.float32)
    codes = nbits.encode(found, bits, 32, "f32")
    assert np.array_equal(nbits.unpack(nbits.pack(codes, bits), bits), codes)
    parts = found.reshape(48, -1, 32)
    step = np.abs(parts).max(-1, keepdims=True) / (1 << (bits - 1))
    error = np.abs(nbits.decode(codes, scales, bits).reshape(parts.shape) - parts)
    opposite = parts * np.sign(scales[..., None]) > (step * ((1 << (bits - 1)) - 1))  # past the last code
    assert (error <= np.where(opposite, step, step / 2) * (1 + 1e-5)).all()
    assert opposite.any()


def test_what_is_no_number_has_no_code() -> None:
    found = weights(64)
    found[1, 7] = np.nan
    with pytest.raises(Damaged):
        nbits.encode(found, 4, 32, "f32")
