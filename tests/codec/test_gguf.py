"""GGUF blocks, bit for bit as gguf-py decodes and encodes them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv.codec import gguf, gguf_encode
from dconv.codec.cast import cast
from dconv.errors import Damaged, Refused, ToolMissing

theirs = pytest.importorskip("gguf", reason="gguf is not installed")

TENSORS = 200


def dequantize(blocks: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return theirs.quants.dequantize(blocks, theirs.GGMLQuantizationType[kind])


def quantize(weights: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    with np.errstate(all="ignore"):
        return theirs.quants.quantize(weights, theirs.GGMLQuantizationType[kind])


def same(found: NDArray[np.generic], expected: NDArray[np.generic]) -> None:
    """In bits; a NaN is any NaN."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view("u1"), expected[~nan].view("u1"))


def test_the_types_and_sizes_are_theirs() -> None:
    sizes = {kind.name: size for kind, size in theirs.GGML_QUANT_SIZES.items()}
    decodable = {kind.name for kind in theirs.quants._type_traits} | {"F32", "F16"}
    assert {kind: sizes[kind] for kind in decodable} == gguf.BLOCKS


@pytest.mark.parametrize("kind", gguf.BLOCKS)
def test_decoded_as_theirs(kind: str) -> None:
    """Any bytes at all: scales that are denormal, infinite or NaN too."""
    rng = np.random.default_rng(len(kind))
    for _ in range(TENSORS):
        rows, count = int(rng.integers(1, 4)), int(rng.integers(1, 4))
        blocks = rng.integers(0, 256, (rows, count * gguf.BLOCKS[kind][1]), dtype=np.uint8)
        same(gguf.decode(blocks, kind, "f32"), dequantize(blocks, kind))


@pytest.mark.parametrize("target", ["bf16", "f16", "f64"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1", "Q6_K", "MXFP4", "IQ4_XS"])
def test_another_target_is_that_value_cast(kind: str, target: str) -> None:
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (50, 4 * gguf.BLOCKS[kind][1]), dtype=np.uint8)
    expected = cast(dequantize(blocks, kind), "f32", target)
    same(cast(gguf.decode(blocks, kind, target), target, "f64"), cast(expected, target, "f64"))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_every_scale_of_six_bits(kind: str) -> None:
    size = gguf.BLOCKS[kind][1]
    blocks = np.random.default_rng(0).integers(0, 256, (64 * 8, size), dtype=np.uint8)
    blocks[:, 4:16] = np.arange(64 * 8 * 12).reshape(-1, 12) * 7 % 256
    same(gguf.decode(blocks, kind, "f32"), dequantize(blocks, kind))


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q8_0"])
def test_every_byte(kind: str) -> None:
    blocks = np.repeat(np.arange(256, dtype=np.uint8)[:, None], gguf.BLOCKS[kind][1], axis=1)
    same(gguf.decode(blocks, kind, "f32"), dequantize(blocks, kind))


def weights_of(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Of ordinary size; near powers of two; with ties and equal magnitudes; zero blocks."""
    kind = rng.integers(0, 5)
    if kind == 0:
        found = rng.normal(0, 0.02, count)
    elif kind == 1:
        found = np.ldexp(rng.choice([1, np.nextafter(np.float32(1), 2), np.nextafter(np.float32(1), 0)], count), -5)
        found *= np.ldexp(1, int(rng.integers(-20, 20))) * rng.choice([-1, 1], count)
    elif kind == 2:
        found = rng.integers(-16, 17, count) * np.ldexp(1, int(rng.integers(-12, 8)))
    elif kind == 3:
        found = rng.normal(0, 1, count) * np.ldexp(1.0, rng.integers(-30, 10, count))
    else:
        found = np.where(rng.random(count) < 0.1, 0.3, 0)
    found[: count // 4] *= rng.random() < 0.7
    return found.astype(np.float32)


@pytest.mark.parametrize("kind", gguf_encode.KINDS)
def test_encoded_as_theirs(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    for _ in range(TENSORS):
        rows, count = int(rng.integers(1, 4)), int(rng.integers(1, 4)) * gguf.BLOCKS[kind][0]
        weights = weights_of(rng, rows * count).reshape(rows, count)
        found = gguf_encode.encode(weights, kind)
        np.testing.assert_array_equal(found, quantize(weights, kind))
        same(gguf.decode(found, kind, "f32"), dequantize(found, kind))


@pytest.mark.parametrize("kind", gguf_encode.KINDS)
def test_encoded_in_parts_as_theirs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of several runs, and a last one that is not whole runs; infinities in any of them."""
    size = gguf.BLOCKS[kind][0]
    monkeypatch.setattr(gguf_encode, "_AT_ONCE", 12 * size)
    monkeypatch.setattr(gguf_encode, "_TURNED", 4 * size)
    weights = np.concatenate([weights_of(np.random.default_rng(seed), 41 * size) for seed in range(12)]).reshape(
        -1, size
    )
    np.testing.assert_array_equal(gguf_encode.encode(weights, kind), quantize(weights, kind))
    for block in (0, 11, 12, 491):
        odd = weights.copy()
        odd[block, -1] = -np.inf
        with pytest.raises(Refused, match="NaN or infinity"):
            gguf_encode.encode(odd, kind)


@pytest.mark.parametrize("kind", gguf_encode.KINDS)
def test_denormals_and_zeros_decode_to_nearly_nothing(kind: str) -> None:
    count = gguf.BLOCKS[kind][0]
    for value in (0.0, -0.0, 1e-45, 1e-40, 2e-39, -1e-38):
        weights = np.full((1, count), value, np.float32)
        weights[0, ::2] *= -1
        decoded = gguf.decode(gguf_encode.encode(weights, kind), kind, "f32")
        assert np.abs(decoded).max() <= max(2 * abs(value), 0)


@pytest.mark.parametrize("kind", gguf_encode.KINDS)
def test_what_has_no_form_is_refused(kind: str) -> None:
    count = gguf.BLOCKS[kind][0]
    for value in (np.nan, np.inf, -np.inf):
        weights = np.zeros((2, count), np.float32)
        weights[1, 3] = value
        with pytest.raises(Refused, match="NaN or infinity"):
            gguf_encode.encode(weights, kind)
    with pytest.raises(Refused, match="whole blocks"):
        gguf_encode.encode(np.zeros((2, count + 1), np.float32), kind)
    large = np.full((1, count), 3e38, np.float32)
    large[0, 0] = -3e38
    if kind == "MXFP4":
        np.testing.assert_array_equal(gguf_encode.encode(large, kind), quantize(large, kind))
    else:
        with pytest.raises(Refused, match="too large"):
            gguf_encode.encode(large, kind)


@pytest.mark.parametrize("kind", gguf.BLOCKS)
def test_nothing_and_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, size = gguf.BLOCKS[kind]
    assert gguf.decode(np.zeros((0, 2 * size), np.uint8), kind, "bf16").shape == (0, 2 * weights)
    assert gguf.decode(np.zeros((3, 0), np.uint8), kind, "bf16").shape == (3, 0)
    if kind in gguf_encode.KINDS:
        assert gguf_encode.encode(np.zeros((0, 2 * weights), np.float32), kind).shape == (0, 2 * size)
    with pytest.raises(Damaged, match="whole blocks"):
        gguf.decode(np.zeros(size + 1, np.uint8), kind, "f32")
    monkeypatch.setitem(sys.modules, "gguf", None)
    if kind.startswith("IQ"):
        with pytest.raises(ToolMissing, match="package gguf"):
            gguf.decode(np.zeros(size, np.uint8), kind, "f32")
    else:
        assert gguf.decode(np.zeros(size, np.uint8), kind, "f32").shape == (weights,)


def test_a_type_without_a_decoder_is_refused() -> None:
    with pytest.raises(Refused, match="Q8_K"):
        gguf.decode(np.zeros(292, np.uint8), "Q8_K", "f32")
