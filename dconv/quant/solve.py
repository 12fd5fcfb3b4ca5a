"""GPTQ of the weights of a stage: a factor for each Hessian that this rank's rows need, then their rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dconv.quant.gptq import Factor, Recipe, factor, nearest, quantise
from dconv.quant.parts import Made, Part, Result, cut, share, together
from dconv.quant.passes import Group
from dconv.quant.ranks import Ranks

if TYPE_CHECKING:
    import torch


def solve(
    groups: Sequence[Group],
    hessians: list[torch.Tensor],
    counts: Sequence[int],
    weight: Callable[[str], torch.Tensor],
    recipes: Mapping[str, Recipe],
    ranks: Ranks,
    threads: int,
) -> dict[str, Result]:
    """Quantise the weights of some groups.

    Args:
        groups: of weights with one input.
        hessians: Σ x xᵀ of each group, float32; the list is emptied, so that each goes as soon as it was of use.
        counts: tokens of each.
        weight: a weight by name, float32 [rows, columns].
        recipes: of the weights, by name.
        ranks: that have these weights; the rows are divided over them.
        threads: parts that are computed at once.
    """
    import torch

    group_of = {name: i for i, group in enumerate(groups) for name in group.names}
    shapes = {name: (weight(name).shape[0], weight(name).shape[1]) for name in group_of}
    parts = cut(shapes, lambda columns: columns**2)
    mine = share(parts, ranks)
    needed = list(dict.fromkeys((group_of[part.name], recipes[part.name]) for part in mine))
    recipes_of = Counter(group for group, _ in needed)
    held = {group: hessians[group] for group in recipes_of}
    hessians.clear()

    def factored(key: tuple[int, Recipe]) -> Factor | None:
        ranks.hear()
        torch.set_num_threads(1)
        group, recipe = key
        hessian = held[group].clone() if recipes_of[group] > 1 else held.pop(group)
        return factor(hessian, recipe) if counts[group] else None

    def make(part: Part) -> Made:
        recipe = recipes[part.name]
        rows = weight(part.name)[part.start : part.stop]
        found = made[group_of[part.name], recipe]
        if found is None:
            return Made(nearest(rows, recipe), float(rows.square().sum(dtype=torch.float64)), None)
        return Made(quantise(rows, found, recipe), found.power(rows), found.damp)

    with ThreadPoolExecutor(threads) as pool:
        made: dict[tuple[int, Recipe], Factor | None] = {}
        with ranks.leaving_together():
            made |= zip(needed, pool.map(factored, needed), strict=True)
        tokens = {name: counts[group] for name, group in group_of.items()}
        return together(parts, mine, make, pool, tokens, shapes, recipes, ranks)
