"""NVFP4: what compressed-tensors writes and reads, bit by bit, and ModelOpt's meaning of the tensor's scale."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dconv.codec import nvfp4
from dconv.codec.minifloat import E2M1, E4M3, error_bound, nearest, values
from dconv.codec.pack import pack, unpack
from tests.codec.tensors import KINDS, number, rounded, tensor, tensors

FINITE = tuple(kind for kind in KINDS if kind not in ("nan", "infinite"))
SHAPES = ((3, 64), (16,), (2, 3, 48), (4, 16))
NAN = 0x7F


def divisor_of(x: NDArray[np.float32]) -> np.float32:
    finite = np.abs(x[np.isfinite(x)])
    return nvfp4.global_scale(float(finite.max(initial=0)))


def units(scale: NDArray[np.uint8], divisor: np.float32) -> NDArray[np.float64]:
    return np.repeat(values(E4M3)[scale] / np.float64(divisor), 16, -1)


def test_encodes_and_decodes_as_compressed_tensors() -> None:
    """Its cast drops the sign of a zero, one by underflow included."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype=torch.float8_e4m3fn,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    for x in tensors(240, (3, 64), (4, 16), kinds=FINITE):
        weight = torch.from_numpy(x)
        whole = generate_gparam(weight.amin(), weight.amax())
        divisor = divisor_of(x)
        assert divisor == whole.numpy()[0]
        low, high = (getattr(weight.unflatten(-1, (-1, 16)), by)(-1) for by in ("amin", "amax"))
        scale, _ = calculate_qparams(low, high, args, global_scale=whole)
        state = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
        state = compressor.compress(state, scheme)
        packed, found = nvfp4.encode(x, divisor)
        assert np.array_equal(found, state["weight_scale"].view(torch.uint8).numpy())
        under = x / np.repeat(values(E4M3)[found].astype(np.float32) / divisor, 16, -1) == 0
        assert np.array_equal(np.where(under, 0, unpack(packed, 4)), unpack(state["weight_packed"].numpy(), 4))
        back = compressor.decompress(state, scheme)["weight"].double().numpy()
        ours = number(nvfp4.decode(packed, found, float(divisor), "bf16", divides=True), "bf16")
        assert np.allclose(ours, back, rtol=2.0**-7, atol=0)  # theirs rounds the quotient to fp32 first


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("target", ["f32", "bf16", "f16"])
@settings(max_examples=100, deadline=None)
@given(
    code=st.integers(0, 15), scale=st.integers(0, 0x7E), whole=st.floats(2.0**-100, 2.0**100, width=32),
)  # fmt: skip
def test_rounds_once(target: str, divides: bool, code: int, scale: int, whole: float) -> None:
    packed = pack(np.full(16, code, np.uint8), 4)
    found = number(nvfp4.decode(packed, np.array([scale], np.uint8), whole, target, divides=divides), target)
    exact = Fraction(float(values(E2M1)[code])) * Fraction(float(values(E4M3)[scale]))
    assert (found == rounded(exact / Fraction(whole) if divides else exact * Fraction(whole), target)).all()


def test_modelopts_scale_multiplies() -> None:
    """ModelOpt stores amax / (6 · 448) as weight_scale_2 and amax of a block / (6 · weight_scale_2) as its scale."""
    for seed in range(200):
        x = tensor("weights", seed, (4, 64))
        second = np.float32(np.abs(x).max()) / np.float32(6 * 448)
        scale = nearest(E4M3, np.abs(x).reshape(4, 4, 16).max(-1) / (np.float32(6) * second))
        unit = np.repeat(values(E4M3)[scale] * np.float64(second), 16, -1)
        packed = pack(nearest(E2M1, (x / unit).astype(np.float32)), 4)
        back = nvfp4.decode(packed, scale, float(second), "f64", divides=False)
        assert np.array_equal(back, values(E2M1)[unpack(packed, 4)] * unit)
        assert (np.abs(back - x) <= error_bound(E2M1, x, unit)).all()
        wrong = nvfp4.decode(packed, scale, float(second), "f64", divides=True)
        assert np.abs(wrong).max() > 100 * np.abs(x).max()


def test_error_is_within_the_bound() -> None:
    for x in tensors(240, *SHAPES, kinds=FINITE):
        divisor = divisor_of(x)
        packed, scale = nvfp4.encode(x, divisor)
        assert packed.shape == (*x.shape[:-1], x.shape[-1] // 2) and scale.shape == (*x.shape[:-1], x.shape[-1] // 16)
        back = nvfp4.decode(packed, scale, float(divisor), "f64", divides=True)
        assert (np.abs(back - x) <= error_bound(E2M1, x, units(scale, divisor))).all()
        assert np.array_equal(np.signbit(back), np.signbit(x))


def test_fused_tensors_share_a_divisor() -> None:
    """Each alone, and both as one, are the same bytes by the divisor of both."""
    for seed in range(200):
        q, k = tensor("weights", seed, (4, 32)), tensor("weights", seed + 1000, (2, 32)) * np.float32(8)
        divisor = divisor_of(np.concatenate([q, k]))
        apart = [nvfp4.encode(of, divisor) for of in (q, k)]
        together = nvfp4.encode(np.concatenate([q, k]), divisor)
        assert all(np.array_equal(np.concatenate(of), one) for *of, one in zip(*apart, together, strict=True))


def test_nan_and_infinity_make_their_block_nan_and_no_other() -> None:
    for x in tensors(200, (32, 64), kinds=("nan", "infinite")):
        divisor = divisor_of(x)
        packed, scale = nvfp4.encode(x, divisor)
        lost = ~np.isfinite(x).reshape(32, 4, 16).all(-1)
        assert lost.any() and np.array_equal(scale == NAN, lost)
        back = nvfp4.decode(packed, scale, float(divisor), "f32", divides=True).reshape(32, 4, 16)
        assert np.isnan(back[lost]).all()
        plain = nvfp4.encode(np.where(np.repeat(lost, 16, -1), np.float32(0), x), divisor)
        kept = nvfp4.decode(*plain, float(divisor), "f32", divides=True).reshape(32, 4, 16)
        assert np.array_equal(back[~lost], kept[~lost])


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 7e-36, float("nan"), float("inf")])
def test_divisor_of_what_has_none_is_one(amax: float) -> None:
    assert nvfp4.global_scale(amax) == 1
    packed, scale = nvfp4.encode(np.zeros((2, 32), np.float32), nvfp4.global_scale(amax))
    assert (scale == 0x20).all() and not packed.any()


@pytest.mark.parametrize("largest", [0.03, 0.004, 1e-4])
def test_small_weights_in_fp16_are_kept(largest: float) -> None:
    """fp16 does not hold their divisor, which its file stores in fp32."""
    drawn = np.random.default_rng(0).normal(size=(8, 64))
    x = (drawn / np.abs(drawn).max() * largest).astype(np.float16).astype(np.float32)
    divisor = nvfp4.global_scale(float(np.abs(x).max()), "f16")
    packed, scale = nvfp4.encode(x, divisor, "f16")
    back = nvfp4.decode(packed, scale, float(divisor), "f64", divides=True)
    assert np.sqrt(((back - x) ** 2).mean()) < 0.1 * np.sqrt((x**2).mean())


def test_empty_and_ragged() -> None:
    for shape in ((0,), (0, 32), (3, 0)):
        packed, scale = nvfp4.encode(np.empty(shape, np.float32), np.float32(1))
        assert nvfp4.decode(packed, scale, 1.0, "bf16", divides=True).shape == shape
    for wrong in (
        lambda: nvfp4.encode(np.zeros((2, 24), np.float32), np.float32(1)),
        lambda: nvfp4.encode(np.float32(1).reshape(()), np.float32(1)),
        lambda: nvfp4.decode(np.zeros(8, np.uint8), np.zeros(2, np.uint8), 1.0, "bf16", divides=True),
    ):
        with pytest.raises(ValueError):
            wrong()
