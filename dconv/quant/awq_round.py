"""The last step of AWQ: weights rounded, their ranges searched; rows divided over ranks and threads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dconv.quant.awq import choose
from dconv.quant.gptq import Recipe
from dconv.quant.parts import Made, Part, Result, share, together
from dconv.quant.parts import cut as cut_rows
from dconv.quant.ranks import Ranks

if TYPE_CHECKING:
    import torch


def round_off(
    weight: Callable[[str], torch.Tensor],
    hessians: Mapping[str, torch.Tensor],
    counts: Mapping[str, int],
    recipes: Mapping[str, Recipe],
    cut: Collection[str],
    ranks: Ranks,
    threads: int,
) -> dict[str, Result]:
    """Round weights.

    Errors are of groups of columns as if each stood alone: what rounding does in one knows nothing of the others.

    Args:
        weight: one by name, [out, in].
        hessians: of each weight's groups, Σ x xᵀ [groups, size, size].
        counts: tokens of each; where there are none, a weight is rounded to nearest.
        recipes: of each.
        cut: those whose ranges are searched.
        ranks: that have these weights; the rows are divided over them.
        threads: parts that are rounded at once.
    """
    import torch

    shapes = {name: (weight(name).shape[0], weight(name).shape[1]) for name in hessians}
    parts = cut_rows(shapes, lambda columns: columns)

    def make(part: Part) -> Made:
        hessian, seen = hessians[part.name], bool(counts[part.name])
        if not seen:
            hessian = torch.eye(hessian.shape[1], device=hessian.device).expand_as(hessian)
        rows = weight(part.name)[part.start : part.stop]
        chosen, power = choose(rows, hessian, recipes[part.name], cut=seen and part.name in cut)
        return Made(chosen, float(power.sum(dtype=torch.float64)), 0.0)

    with ThreadPoolExecutor(threads) as pool:
        return together(parts, share(parts, ranks), make, pool, counts, shapes, recipes, ranks)
