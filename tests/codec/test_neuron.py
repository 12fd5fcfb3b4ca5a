"""Neuron's FP8: what recoding keeps and what it costs, counted over all 256 codes, against torch's own e4m3."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")

from dconv.codec.neuron import (  # noqa: E402
    FITTED,
    HALVED,
    decode,
    encode_rows,
    errors,
    recode,
    rescale,
    row_scales,
    table,
)

CODES = np.arange(256, dtype=np.uint8)
RESCALES = [HALVED, FITTED]


def worth(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What torch reads in bytes of float8_e4m3fn; a byte of at most 240 is the same number on Neuron."""
    return torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).double().numpy()


FINITE = CODES[~np.isnan(worth(CODES))]
POSITIVE = FINITE[worth(FINITE) > 0]


@pytest.mark.parametrize("by", RESCALES, ids=str)
def test_every_code_becomes_the_nearest_that_neuron_has(by: Fraction) -> None:
    """Ties go to the even code. Nearest of all 120 magnitudes, found by trying each in exact fractions."""
    magnitudes = [Fraction(value) for value in worth(np.arange(0x78, dtype=np.uint8))]
    for code in FINITE:
        wanted = abs(Fraction(worth(np.array([code]))[0])) / by
        distance = [abs(value - wanted) for value in magnitudes]
        closest = [i for i, far in enumerate(distance) if far == min(distance)]
        expected = closest[0] if len(closest) == 1 else next(i for i in closest if i % 2 == 0)
        assert table(by)[code] == expected | (code & 0x80)


@pytest.mark.parametrize("by", RESCALES, ids=str)
def test_nothing_reaches_what_is_infinite_or_nan_on_neuron(by: Fraction) -> None:
    assert ((table(by)[FINITE] & 0x7F) <= 0x77).all()
    assert np.abs(worth(recode(FINITE, by))).max() == (224 if by == HALVED else 240)
    assert (table(by)[[0x7F, 0xFF]] == [0x7F, 0xFF]).all()


def test_how_many_codes_survive_and_what_the_others_cost() -> None:
    """The numbers that the ADR and the README give."""
    kept = {by: int((errors(by)[POSITIVE] == 0).sum()) for by in RESCALES}
    assert (len(POSITIVE), kept[HALVED], kept[FITTED]) == (126, 118, 14)
    relative = {by: errors(by)[POSITIVE] / worth(POSITIVE) for by in RESCALES}
    assert errors(HALVED).max() == 2.0**-9, "half of Neuron's smallest step, in the source's scale"
    assert worth(POSITIVE[relative[HALVED] > 0]).tolist() == [n * 2.0**-9 for n in range(1, 16, 2)]
    assert relative[HALVED].max() == 1, "the smallest of all, 2^-9, becomes zero"
    assert errors(FITTED).max() == pytest.approx(12.8)
    normal = worth(POSITIVE) >= 2.0**-5  # a normal number before and after
    assert relative[HALVED][normal].max() == 0
    assert relative[FITTED][normal].max() == pytest.approx(1 / 20)


def test_what_it_adds_to_a_model_that_is_in_fp8_already() -> None:
    """Normal weights in blocks of 128 x 128: by 2 adds nothing that counts, by 448/240 as much as FP8 itself cost."""
    drawn = np.random.default_rng(0).standard_normal((64, 128 * 128))
    scaled = drawn / np.abs(drawn).max(axis=1, keepdims=True) * 448
    codes = torch.from_numpy(scaled).float().to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    before = worth(codes)
    size = np.sqrt((before**2).mean())
    added = {by: np.sqrt(((worth(recode(codes, by)) * float(by) - before) ** 2).mean()) / size for by in RESCALES}
    cost = np.sqrt(((before - scaled) ** 2).mean()) / size
    assert added[HALVED] < 1e-6
    assert added[FITTED] == pytest.approx(0.0266, abs=2e-4)
    assert cost == pytest.approx(0.0264, abs=2e-4)


def test_fitting_is_what_the_vendor_does() -> None:
    """Its README for rescaling: bf16 codes over 448/240, cast to float8_e4m3fn again. bf16 between costs no more."""
    codes = torch.from_numpy(CODES).view(torch.float8_e4m3fn)
    theirs = (codes.bfloat16() / (448.0 / 240.0)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(theirs[FINITE], table(FITTED)[FINITE])


@pytest.mark.parametrize("by", [Fraction(1), Fraction(3, 2), Fraction(447, 240)], ids=str)
def test_a_number_that_leaves_codes_beyond_240_is_refused(by: Fraction) -> None:
    with pytest.raises(ValueError, match="beyond 240"):
        table(by)


def test_scales_are_multiplied_or_turned_over_with_one_rounding() -> None:
    scale = np.random.default_rng(1).lognormal(-9, 3, 5000).astype(np.float32)
    assert np.array_equal(rescale(scale), scale * np.float32(2))
    for by in RESCALES:
        for found, wanted in (
            (rescale(scale, by), lambda s, by=by: s * by),
            (rescale(scale, by, reciprocal=True), lambda s, by=by: 1 / (s * by)),
        ):
            exact = [wanted(Fraction(float(s))) for s in scale]
            assert all(
                abs(Fraction(float(f)) / e - 1) <= Fraction(1, 1 << 24) for f, e in zip(found, exact, strict=True)
            )


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("by", RESCALES, ids=str)
def test_there_and_back_is_within_the_stated_error(by: Fraction, reciprocal: bool) -> None:
    """Blocks with edges; the product of torch's reading of the bytes and the scale, in fp64."""
    draw = np.random.default_rng(2)
    codes = draw.choice(FINITE, (37, 21))
    scale = draw.lognormal(-9, 1, (3, 2)).astype(np.float32)
    spread = np.kron(scale, np.ones((16, 16)))[:37, :21].astype(np.float64)
    kept, turned = recode(codes, by), rescale(scale, by, reciprocal=reciprocal)
    back = decode(kept, turned, (16, 16), "f64", reciprocal=reciprocal).astype(np.float64)
    original = worth(codes) * spread
    assert (np.abs(back - original) <= errors(by)[codes] * spread + np.abs(original) * 2.0**-22).all()
    if by == HALVED and not reciprocal:
        exact = errors(by)[codes] == 0
        assert np.array_equal(back[exact], original[exact])


@given(
    arrays.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    )
)
def test_a_row_is_scaled_by_its_largest(x: NDArray[np.float32]) -> None:
    largest = np.abs(x).max(axis=1, keepdims=True)
    codes, scale = encode_rows(x), row_scales(largest)
    assert scale.dtype == np.float32
    assert ((codes & 0x7F) <= 0x77).all()
    largest = largest.astype(np.float64)
    whole = (largest > 1e-35)[:, 0]  # below, 240 / largest is more than fp32 holds
    assert np.allclose(scale[whole], largest[whole] / 240, rtol=2**-22, atol=0)
    assert (scale[largest == 0] == 1).all()
    back = worth(codes) * scale
    assert (np.abs(back - x) <= np.maximum(np.abs(x) / 16, scale * 2.0**-10) * (1 + 2**-18))[whole].all()


def test_a_row_in_parts_is_the_row() -> None:
    x = np.random.default_rng(3).normal(0, 1, (6, 40)).astype(np.float32)
    largest = np.abs(x).max(axis=1, keepdims=True)
    parts = [encode_rows(x[:, cut], largest=largest) for cut in (slice(0, 7), slice(7, 40))]
    assert np.array_equal(np.concatenate(parts, axis=1), encode_rows(x))


def test_the_reciprocal_of_a_row_divides() -> None:
    x = np.random.default_rng(4).normal(0, 1, (6, 40)).astype(np.float32)
    largest = np.abs(x).max(axis=1, keepdims=True)
    codes, scale, turned = encode_rows(x), row_scales(largest), row_scales(largest, reciprocal=True)
    assert np.allclose(turned.astype(np.float64) * scale, 1, rtol=2**-23, atol=0)
    back = decode(codes, turned, (1, 40), "f32", reciprocal=True)
    assert np.allclose(back, decode(codes, scale, (1, 40), "f32"), rtol=2**-22, atol=0)
