"""Scaling: the product of the exact factor, rounded once to the nearest; `fractions` and `decimal` judge."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from dconv.codec.kernels import apply
from dconv.codec.scale import _AT_ONCE
from dconv.errors import Refused
from dconv.sharding.dtypes import carrier
from dconv.sharding.ops import MOVE, Cast, Scale, op_between
from tests.laws.test_cast import EVERY, FORMAT, Numbers, number, same

ROOT_40 = 1.4 / 40**0.5
FACTORS = (12.0, ROOT_40, 1 / 9, 0.0625, 3.0e-5)
FLOATS = ("bf16", "f16", "f32")


def scaled(values: Numbers, source: str, target: str, factor: float) -> Numbers:
    return apply(Scale(source, target, factor), values)


def steps(values: np.ndarray, target: str) -> list[Fraction]:
    """The distance from each value of a target dtype to the next larger one."""
    bits, least, _ = FORMAT[target]
    return [Fraction(2) ** max(int(np.frexp(value)[1]) - bits, least) for value in values]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", ["bf16", "f16"])
def test_every_value_is_the_nearest_to_its_product(source: str, target: str, factor: float) -> None:
    """But for what the op states: 13.5 / 9 is a tie between two numbers, 13.5 times fp64's 1 / 9 no longer is."""
    values = EVERY[::7]
    given = values.view(carrier(source))
    found = number(scaled(given, source, target, factor), target)
    before = number(given, source)
    top = np.ldexp(1.0, FORMAT[target][2])
    with np.errstate(invalid="ignore"):  # a signalling NaN
        kept = np.isfinite(before) & (np.abs(before * factor) < top * (1 - 2.0**-12))
    assert kept.sum() > 5000
    exact = [Fraction(float(value)) * Fraction(factor) for value in before[kept]]
    for product, result, step in zip(exact, found[kept], steps(found[kept], target), strict=True):
        assert abs(Fraction(float(result)) - product) <= step / 2 + abs(product) / 2**51


@pytest.mark.parametrize("target", FLOATS)
def test_the_error_stays_within_what_the_op_states(target: str) -> None:
    """Against the real 1.4 / sqrt(40), not its fp64 neighbour."""
    draw = np.random.default_rng(4).standard_normal(4000).astype(np.float32)
    found = number(scaled(draw, "f32", target, ROOT_40), target)
    with localcontext() as context:
        context.prec = 60
        real = Fraction(Decimal("1.4") / Decimal(40).sqrt())
    bound = Fraction(2) ** -FORMAT[target][0] + Fraction(2) ** -51
    for value, result in zip(draw, found, strict=True):
        product = Fraction(float(value)) * real
        assert abs(Fraction(float(result)) - product) <= bound * abs(product)


@pytest.mark.parametrize("target", FLOATS)
def test_infinities_nan_and_signs_stay(target: str) -> None:
    values = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.0e38], np.float32)
    found = number(scaled(values, "f32", target, 12.0), target)
    assert found[0] == np.inf
    assert found[1] == -np.inf
    assert np.isnan(found[2])
    assert [found[3], found[4]] == [0.0, 0.0]
    assert list(np.signbit(found[3:5])) == [False, True]
    assert found[5] == np.inf  # past the range, as a cast does


@pytest.mark.parametrize("source", FLOATS)
def test_how_the_work_is_cut_changes_nothing(source: str) -> None:
    count = 2 * _AT_ONCE + 77
    bits = np.random.default_rng(1).bytes(count * np.dtype(carrier(source)).itemsize)
    values = np.frombuffer(bits, carrier(source))
    whole = scaled(values, source, "bf16", ROOT_40)
    one_by_one = [scaled(values[i : i + 1], source, "bf16", ROOT_40)[0] for i in range(0, count, 97)]
    same(whole[::97], np.array(one_by_one), "bf16")
    assert np.array_equal(scaled(values.reshape(1, -1, 1), source, "bf16", ROOT_40).reshape(-1), whole)


def test_which_op_a_factor_makes() -> None:
    assert op_between("bf16", "bf16", 1.0) is MOVE
    assert op_between("bf16", "f32", 1.0) == Cast("bf16", "f32")
    assert op_between("bf16", "f32", 0.5) == Scale("bf16", "f32", 0.5)
    assert not op_between("f32", "f32", 2.0).exact
    for dtype in ("i64", "f8_e4m3"):
        assert op_between(dtype, dtype) is MOVE
        with pytest.raises(Refused):
            op_between(dtype, dtype, 2.0)
