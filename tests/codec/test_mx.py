"""MX formats: what torchao, compressed-tensors, amd-quark and gpt-oss make of the same blocks.

torchao's and amd-quark's answers are recorded (`tests.codec.recorded`); compressed-tensors runs.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.codec import e8m0, mx
from dconv.codec.cast import cast
from dconv.codec.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Minifloat, error_bound, nearest, values
from dconv.codec.pack import pack, unpack
from tests.codec.tensors import KINDS, number, rounded, tensor, tensors

FORMATS = (E2M1, E2M3, E3M2, E4M3, E5M2)
RULES: tuple[mx.Rule, ...] = ("floor", "ceil", "even")
FINITE = tuple(kind for kind in KINDS if kind not in ("nan", "infinite"))
SHAPES = ((3, 64), (32,), (2, 3, 96), (1, 32))
RECORDED = Path(__file__).parent / "recorded"
#: gpt_oss/torch/weights.py of openai/gpt-oss, FP4_VALUES.
GPT_OSS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
every_rule = pytest.mark.parametrize("rule", RULES)


def recorded(name: str) -> Any:
    return np.load(RECORDED / name)


def exponent(amax: Fraction, fmt: Minifloat, rule: mx.Rule) -> int:
    """The rule in whole numbers: of all scales from below the first that will do."""
    if not amax:
        return -127
    if rule == "ceil":
        quotient = Fraction(rounded(amax / Fraction(fmt.largest), "f32"))
        return next((e for e in range(-127, 127) if Fraction(2) ** e >= quotient), 127)
    if rule == "even":  # the next number of so many digits counts from half way up to it
        power = max(next(e for e in range(128, -151, -1) if Fraction(2) ** e <= amax), -126)
        if Fraction(2) ** power <= amax:
            amax += Fraction(2) ** (power - (1 if fmt.bits == 8 else fmt.mantissa) - 1)
    power = next(e for e in range(128, -151, -1) if Fraction(2) ** e <= amax)
    largest = next(e for e in range(20, -5, -1) if 2**e <= fmt.largest)
    return min(max(power - largest, -127), 127)


@every_format
@every_rule
@settings(max_examples=150, deadline=None)
@given(x=st.floats(0, width=32, allow_infinity=False) | st.floats(2.0**-10, 16, width=32))
def test_scale_is_the_rules(fmt: Minifloat, rule: mx.Rule, x: float) -> None:
    block = np.zeros(32, np.float32)
    block[7] = -x
    _, scale = mx.encode(block, fmt, rule)
    assert int(scale[0]) - 127 == exponent(Fraction(x), fmt, rule)


@every_format
@every_rule
def test_codes_are_the_nearest_of_what_is_scaled(fmt: Minifloat, rule: mx.Rule) -> None:
    for x in tensors(200, *SHAPES, kinds=FINITE):
        packed, scale = mx.encode(x, fmt, rule)
        assert packed.shape == (*x.shape[:-1], x.shape[-1] * fmt.bits // 8) and scale.shape == (
            *x.shape[:-1],
            x.shape[-1] // 32,
        )
        unit = np.repeat(e8m0.from_bytes(scale), 32, -1)
        expected = nearest(fmt, (x.astype(np.float64) / unit).astype(np.float32))
        assert np.array_equal(unpack(packed, fmt.bits), expected)
        back = mx.decode(packed, scale, fmt, "f64")
        assert np.array_equal(back, values(fmt)[expected] * unit)
        assert (np.abs(back - x) <= error_bound(fmt, x, unit)).all()


@every_format
@every_rule
def test_encodes_as_torchao(fmt: Minifloat, rule: mx.Rule) -> None:
    """Where it scales by what it stores; its 8-bit EVEN rounds amax by the format's own step."""
    theirs = recorded("torchao_mx.npz")
    x = theirs["x"].view(np.float32)
    assert str(theirs["version"]).startswith("0.18.0") and len(x) >= 200
    codes, scale = theirs[f"{fmt.name} {rule} codes"], theirs[f"{fmt.name} {rule} scale"]
    if fmt.bits == 6:
        codes = pack(codes, 6)
    packed, found = mx.encode(x, fmt, rule)
    finite = np.isfinite(x).all(-1)
    assert np.array_equal(found[np.isnan(x).any(-1)], scale[np.isnan(x).any(-1)])
    if rule == "even" and fmt.bits == 8:
        finite &= (found == scale)[:, 0]
        assert finite.sum() > 120
    assert np.array_equal(found[finite], scale[finite])
    same = finite & (found != 0)[:, 0]  # 2^-127: torchao divides by 2^-126, or by nothing
    assert same.sum() > 90
    assert np.array_equal(packed[same], codes[same])


@every_format
def test_ceil_is_exact_where_torchaos_logarithm_is_not(fmt: Minifloat) -> None:
    theirs = recorded("torchao_mx.npz")
    x, scale = theirs[f"{fmt.name} near"].view(np.float32), theirs[f"{fmt.name} near scale"]
    packed, found = mx.encode(x, fmt, "ceil")
    less = (scale != found)[:, 0]
    assert np.array_equal(scale[less], found[less] - 1) and less.any() and not less.all()
    over = x[less].max(-1) / (e8m0.from_bytes(scale[less])[:, 0] * fmt.largest)
    assert ((over > 1) & (over < 1 + 2.0**-17)).all()
    assert (np.abs(mx.decode(packed, found, fmt, "f64") - x).max(-1) < x.max(-1) * 2.0 ** -(fmt.mantissa + 1)).all()


def test_infinity_is_nan_where_torchao_makes_a_number_of_it() -> None:
    theirs = recorded("torchao_mx.npz")
    x = theirs["x"].view(np.float32)
    odd = np.isinf(x).any(-1) & ~np.isnan(x).any(-1)
    assert (
        odd.any() and (theirs["e2m1 floor scale"][odd] == 253).all() and (theirs["e4m3 ceil scale"][odd] == 254).all()
    )
    for fmt in FORMATS:
        for rule in RULES:
            packed, scale = mx.encode(x[odd], fmt, rule)
            assert (scale == 255).all()
            assert np.isnan(mx.decode(packed, scale, fmt, "f64")).all()


def test_nan_makes_its_block_nan_and_no_other() -> None:
    for seed in range(200):
        x = tensor("weights", seed, (2, 96))
        odd = x.copy()
        odd[1, 32 + seed % 32] = np.nan if seed % 2 else -np.inf
        for fmt in FORMATS:
            plain, found = (mx.decode(*mx.encode(of, fmt, "floor"), fmt, "f32") for of in (x, odd))
            assert np.isnan(found[1, 32:64]).all()
            found[1, 32:64] = plain[1, 32:64]
            assert np.array_equal(found, plain)


@every_format
@every_rule
def test_zeros_keep_their_sign(fmt: Minifloat, rule: mx.Rule) -> None:
    x = np.where(np.arange(64) % 3, 0.0, -0.0).astype(np.float32)
    packed, scale = mx.encode(x, fmt, rule)
    assert not scale.any()
    assert np.array_equal(mx.decode(packed, scale, fmt, "f32").view(np.uint32), x.view(np.uint32))


@pytest.mark.parametrize("fmt", [E2M1, E2M3, E4M3], ids=lambda fmt: fmt.name)
def test_encodes_and_decodes_as_compressed_tensors(fmt: Minifloat) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    how = {E2M1: "mxfp4-pack-quantized", E2M3: "mxfp6-pack-quantized", E4M3: "mxfp8-quantized"}[fmt]
    args = QuantizationArgs(
        num_bits=fmt.bits, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(how)
    for x in tensors(200, (3, 64), (8, 32), kinds=FINITE):
        x = np.where(np.abs(x) > 2.0**126, np.float32(1), x)  # theirs makes infinity of those
        weight = torch.from_numpy(x)
        low, high = (getattr(weight.unflatten(-1, (-1, 32)), by)(-1) for by in ("amin", "amax"))
        scale, _ = calculate_qparams(low, high, args)
        state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        codes = state["weight" if fmt.bits == 8 else "weight_packed"].view(torch.uint8).numpy()
        packed, found = mx.encode(x, fmt, "even")
        assert np.array_equal(found, state["weight_scale"].numpy())
        under = fmt is E2M1 and x / np.repeat(e8m0.from_bytes(found), 32, -1).astype(np.float32) == 0
        ours = np.where(under, 0, unpack(packed, fmt.bits))  # theirs drops the sign of what underflows before its cast
        assert np.array_equal(ours, unpack(codes, fmt.bits))
        back = compressor.decompress(state, scheme)["weight"]
        assert np.array_equal(number(mx.decode(codes, found, fmt, "bf16"), "bf16"), back.double().numpy())


def test_reads_gpt_oss_blocks() -> None:
    """gpt-oss: index the table by the low nibble, then the high, and ldexp by scale - 127."""
    draw = np.random.default_rng(3)
    for _ in range(200):
        blocks = draw.integers(0, 256, (2, 5, 3, 16), dtype=np.uint8)
        scales = draw.integers(1, 240, (2, 5, 3), dtype=np.uint8)
        table = torch.tensor(GPT_OSS, dtype=torch.bfloat16)
        out = torch.empty(*blocks.shape[:-1], 32, dtype=torch.bfloat16)
        out[..., 0::2], out[..., 1::2] = table[blocks.astype(int) & 15], table[blocks.astype(int) >> 4]
        out = torch.ldexp(out, torch.from_numpy(scales.astype(np.int32) - 127)[..., None]).flatten(-2)
        found = mx.decode(blocks.reshape(2, 5, 48), scales, E2M1, "bf16")
        assert np.array_equal(found, out.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("fmt", [E2M3, E3M2], ids=lambda fmt: fmt.name)
def test_six_bits_lie_as_amd_quark_puts_them(fmt: Minifloat) -> None:
    theirs = recorded("quark_fp6.npz")
    assert str(theirs["version"]) == "0.13" and len(theirs["codes"]) >= 200
    assert np.array_equal(pack(theirs["codes"], 6), theirs[f"{fmt.name} packed"])
    ones = np.full((240, 1), 127, np.uint8)
    assert np.array_equal(mx.decode(theirs[f"{fmt.name} packed"], ones, fmt, "f32"), theirs[f"{fmt.name} values"])


@pytest.mark.parametrize("bits", [4, 6, 8])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_packed_codes_are_a_little_endian_stream_of_bits(bits: int, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 9).map(lambda fours: fours * 4)))
    codes = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 1 << bits, shape, dtype=np.uint8)
    packed = pack(codes, bits)
    assert np.array_equal(unpack(packed, bits), codes)
    for row, stream in zip(codes, packed, strict=True):
        assert int.from_bytes(stream.tobytes(), "little") == sum(int(code) << bits * i for i, code in enumerate(row))


@every_format
@pytest.mark.parametrize("target", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_every_code_by_every_scale_is_rounded_once(fmt: Minifloat, target: str, factor: float) -> None:
    codes = np.tile(np.resize(np.arange(1 << fmt.bits, dtype=np.uint8), max(32, 1 << fmt.bits)), (256, 1))
    scale = np.repeat(np.arange(256, dtype=np.uint8)[:, None], codes.shape[1] // 32, 1)
    found = mx.decode(pack(codes, fmt.bits), scale, fmt, target, factor=factor)
    with np.errstate(all="ignore"):
        power = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).double().numpy()[:, None] * factor
        exact = values(fmt)[codes] * power
    assert np.array_equal(number(found, target), number(cast(exact, "f64", target), target), equal_nan=True)


@every_format
def test_empty_and_ragged(fmt: Minifloat) -> None:
    for shape in ((0,), (0, 64), (3, 0), (2, 0, 32)):
        packed, scale = mx.encode(np.empty(shape, np.float32), fmt, "floor")
        assert mx.decode(packed, scale, fmt, "bf16").shape == shape
    good = np.zeros(24 * fmt.bits // 6, np.uint8)
    for wrong in (
        lambda: mx.encode(np.zeros((2, 33), np.float32), fmt, "floor"),
        lambda: mx.encode(np.float32(1).reshape(()), fmt, "floor"),
        lambda: mx.decode(good, np.zeros(2, np.uint8), fmt, "bf16"),
        lambda: mx.decode(good[:-1], np.zeros(1, np.uint8), fmt, "bf16"),
        lambda: mx.decode(np.zeros((2, len(good)), np.uint8), np.zeros(1, np.uint8), fmt, "bf16"),
    ):
        with pytest.raises(ValueError):
            wrong()
