"""compressed-tensors' integer tensors, against compressed-tensors itself."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv.codec import bitpack, integer, packed
from dconv.codec.cast import cast

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def helpers():
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized import helpers

    return helpers


def same(found: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    """In bits; a NaN is any NaN."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    at = ~np.isnan(found)
    np.testing.assert_array_equal(found[at], expected[at])
    np.testing.assert_array_equal(np.signbit(found[at]), np.signbit(expected[at]))


@pytest.mark.parametrize("bits", bitpack.BITS)
def test_packed_as_compressed_tensors_packs(helpers, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for _ in range(200):
        rows, columns = (int(n) for n in rng.integers(1, 90, 2))
        codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        signed = torch.from_numpy((codes.astype(np.int16) - packed.middle(bits)).astype(np.int8))
        words = helpers.pack_to_int32(signed, bits).numpy()
        np.testing.assert_array_equal(packed.pack_weight(codes, bits).view("<i4"), words)
        np.testing.assert_array_equal(packed.unpack_weight(words, bits, columns), codes)
        down = helpers.pack_to_int32(signed, bits, packed_dim=0).numpy()
        np.testing.assert_array_equal(packed.pack_zeros(codes, bits).view("<i4"), down)
        np.testing.assert_array_equal(packed.unpack_zeros(down, bits, rows), codes)


def padded(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """What compressed-tensors 0.17 and before wrote, in words."""
    per = 32 // bits
    words = np.zeros((codes.shape[0], -(-codes.shape[1] // per)), np.uint32)
    for (row, column), code in np.ndenumerate(codes):
        words[row, column // per] |= np.uint32(int(code) << (column % per * bits))
    return words


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_the_older_layout_is_seen_from_the_shape(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for _ in range(50):
        codes = rng.integers(0, 1 << bits, (2, 32 * int(rng.integers(1, 5))), dtype=np.uint8)
        words = padded(codes, bits)
        layout = bitpack.layout_of(codes.shape[1], words.shape[1], bits)
        np.testing.assert_array_equal(packed.unpack_weight(words, bits, codes.shape[1], layout), codes)
        np.testing.assert_array_equal(packed.pack_weight(codes, bits, layout), words)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_decompressed_as_compressed_tensors_does(helpers, bits: int, dtype: str, symmetric: bool) -> None:
    """Into the scales' own type its product is rounded once, as ours is."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    rng = np.random.default_rng([bits, len(dtype), symmetric])
    for _ in range(40):
        size, groups, rows = int(rng.integers(1, 40)), int(rng.integers(1, 5)), int(rng.integers(1, 40))
        columns = size * groups
        codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
        zeros = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8)
        scales = extremes(rng, (rows, groups), dtype)
        state = {
            "weight_packed": torch.from_numpy(packed.pack_weight(codes, bits).view("<i4")),
            "weight_scale": as_torch(scales, dtype),
            "weight_shape": torch.tensor(codes.shape),
        }
        if not symmetric:
            state["weight_zero_point"] = torch.from_numpy(packed.pack_zeros(zeros, bits).view("<i4"))
        args = QuantizationArgs(num_bits=bits, strategy="group", group_size=size, symmetric=symmetric)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        found = integer.decode(
            codes,
            scales,
            packed.middle(bits) if symmetric else zeros,
            integer.groups_of(columns, size),
            source=dtype,
            target=dtype,
            bits=bits,
        )
        same(cast(found, dtype, "f64"), weight.double().numpy())


def test_whole_bytes() -> None:
    values = np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    codes = packed.from_int8(values)
    np.testing.assert_array_equal(codes.astype(np.int16) - packed.middle(8), values)
    np.testing.assert_array_equal(packed.from_int8(values.view(np.uint8)), codes)


def extremes(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> NDArray[np.generic]:
    """Any bits at all: denormals, infinities and NaN too."""
    size = 4 if dtype == "f32" else 2
    raw = rng.integers(0, 256, (*shape, size), dtype=np.uint8).view(f"<u{size}")[..., 0]
    return raw if dtype == "bf16" else raw.view(f"<f{size}")


def as_torch(scales: NDArray[np.generic], dtype: str):
    if dtype == "bf16":
        return torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(scales)
