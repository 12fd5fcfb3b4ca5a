"""The rounding of GPTQ against its textbook form, and the sums that it rests on against any order of adding."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="calibration computes with torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from dconv.quant.gptq import Recipe, factor, nearest, quantise  # noqa: E402
from dconv.quant.grid import POWER, Numbers  # noqa: E402
from dconv.quant.sums import Sum  # noqa: E402
from tests.quant.textbook import textbook  # noqa: E402


def inputs(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations, some channels much larger than others."""
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=made) @ torch.randn(columns, columns, generator=made)
    return mixed * torch.rand(columns, generator=made) ** 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "recipe",
    [
        {"symmetric": True, "group": -1},
        {"symmetric": True, "group": 64},
        {"symmetric": False, "group": 32},
        {"symmetric": False, "group": 64, "desc_act": True},
        {"symmetric": True, "group": 64, "desc_act": True, "static_groups": True},
        {"symmetric": True, "group": 64, "search": POWER},
        {"symmetric": False, "group": 32, "group_aware": True},
        {"symmetric": False, "group": 64, "static_groups": True, "search": 2.0},
    ],
    ids=str,
)
def test_textbook(bits: int, recipe: dict[str, object]) -> None:
    """One factor of the Hessian gives what its inverse's factor gives; ties of rounding may fall otherwise."""
    options = dict(recipe)
    numbers = Numbers(bits, bool(options.pop("symmetric")))
    made = Recipe(numbers, damp=0.01, **options)  # pyright: ignore[reportArgumentType]
    x = inputs(1000, 192)
    x[:, 5] = 0  # a channel that no token reached
    hessian, weight = x.T @ x, torch.randn(24, 192, generator=torch.Generator().manual_seed(1))
    wanted, codes = textbook(weight, hessian, made)
    found = factor(hessian.clone(), made)
    assert found is not None
    chosen = quantise(weight, found, made)
    same = (chosen.codes == codes).float().mean()
    assert same > 0.99
    ours, theirs = (((weight.double() - w) @ x.T.double()).square().sum() for w in (chosen.decode().double(), wanted))
    assert ours == pytest.approx(float(theirs), rel=0.01)
    worse = ((weight - nearest(weight, made).decode()) @ x.T).square().sum()
    assert bits == 2 or ours < 0.9 * worse


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_symmetric_group_of_one_sign_is_not_cut_off(bits: int, sign: int) -> None:
    """Half of the codes stand for the other sign, and no weight is further off than a step, which is 2 / (2^b - 1)."""
    numbers, weights = Numbers(bits, symmetric=True), sign * torch.linspace(0.5, 1, 32)[None]
    scale, zero = numbers.fit(weights)
    assert float(scale) == pytest.approx(2 / (2**bits - 1), rel=1e-3)
    assert float((numbers.rounded(weights, scale[:, None], zero[:, None]) - weights).abs().max()) <= float(scale)


def test_the_error_that_is_told() -> None:
    """It is what the outputs lose, damping included, and ``power`` what there is of them."""
    recipe = Recipe(Numbers(4, symmetric=True), 32)
    x, weight = inputs(500, 96), torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x
    found = factor(hessian.clone(), recipe)
    assert found is not None
    damped = hessian.double() + found.damp * hessian.diagonal().mean() * torch.eye(96)
    chosen = quantise(weight, found, recipe)
    lost = weight.double() - chosen.decode().double()
    assert torch.allclose(chosen.error.double(), ((lost @ damped) * lost).sum(1), rtol=1e-4)
    assert found.power(weight) == pytest.approx(float(((weight.double() @ damped) * weight).sum()), rel=1e-4)


def test_damping_grows_until_it_factors() -> None:
    x = torch.randn(4, 64)  # fewer tokens than channels
    recipe = Recipe(Numbers(4, symmetric=True), 32, damp=0.0, damp_step=0.01)
    found = factor(x.T @ x, recipe)
    assert found is not None
    assert found.damp > 0
    assert factor(x.T @ x, Recipe(Numbers(4, symmetric=True), 32, damp=0.0, damp_step=0.0)) is None


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_no_use_of_a_hessian_without_tokens(value: float) -> None:
    assert factor(torch.full((64, 64), value), Recipe(Numbers(4, symmetric=True), 32)) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_a_format_has_no_place_for(bits: int) -> None:
    """GPTQ's first format stores them less one."""
    weight = torch.rand(16, 64) + 1  # all positive: the natural zero point is 0
    chosen = nearest(weight, Recipe(Numbers(bits, symmetric=False, least_zero=1), 32))
    assert int(chosen.zeros.min()) == 1
    assert int(nearest(weight, Recipe(Numbers(bits, symmetric=False), 32)).zeros.max()) == 0


def test_odd_weights() -> None:
    """Zeros, and what is past fp16, have finite scales."""
    weight = torch.zeros(4, 64)
    weight[1], weight[2], weight[3, 0] = 1e-12, 1e30, -3.0
    for symmetric in (True, False):
        chosen = nearest(weight, Recipe(Numbers(4, symmetric), 32))
        assert bool(chosen.scales.isfinite().all())
        assert bool((chosen.scales > 0).all())
        assert torch.equal(chosen.decode()[0], weight[0])


@settings(max_examples=40, deadline=None)
@given(
    columns=st.integers(1, 300),
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    cuts=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    magnitude=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_do_not_depend_on_who_adds(
    columns: int, tokens: list[int], cuts: list[int], magnitude: float, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(count, columns, generator=made) * magnitude for count in tokens]
    alone, ranks = Sum(columns), [Sum(columns) for _ in range(4)]
    for block in blocks:
        alone.add(block)
    for block, rank in reversed(list(zip(blocks, cuts, strict=False))):
        ranks[rank].add(block)
    for first, *others in zip(*(rank.parts() for rank in ranks), strict=True):
        for other in others:
            first += other
    expected = sum((block.double().T @ block.double() for block in blocks), torch.zeros(columns, columns).double())
    some = Sum(columns, room=0)
    while some.open(0, least=True):
        for block in blocks:
            some.add(block)
        assert some.count == sum(tokens)
        some.close()
    assert some.is_whole
    total = alone.total()
    assert torch.equal(total, some.total())
    assert torch.equal(total, ranks[0].total())
    assert torch.allclose(total.double(), expected, rtol=1e-5, atol=1e-5 * magnitude**2 * max(sum(tokens), 1) / 4)


def test_sums_of_weighted_tokens() -> None:
    x, weights = torch.randn(50, 40), torch.rand(50)
    one = Sum(40)
    one.add(x, weights)
    assert one.count == 50
    assert torch.allclose(one.total(), (x * weights[:, None]).T @ x, rtol=1e-4, atol=1e-4)
