"""The last step of AWQ: weights rounded, their rows divided over ranks and threads; every rank ends with all of it.

Every row is rounded by itself, and rows are cut at fixed places: so who does what changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from dconv.quant.awq import choose
from dconv.quant.gptq import Chosen, Recipe
from dconv.quant.ranks import Ranks
from dconv.quant.solve import Result

if TYPE_CHECKING:
    import torch

#: Rows of a part: one thread's work.
_ROWS: Final = 1024


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
        cut: those whose ranges are searched.
    """
    import torch

    parts = [
        (name, start, min(start + _ROWS, rows))
        for name in hessians
        for rows in (weight(name).shape[0],)
        for start in range(0, rows, _ROWS)
    ]
    costs = [(stop - start) * weight(name).shape[1] for name, start, stop in parts]
    owners, at = [], 0
    for cost in costs:
        owners.append(min(ranks.world - 1, (at + cost // 2) * ranks.world // sum(costs)))
        at += cost

    def one(part: tuple[str, int, int]) -> tuple[Chosen, torch.Tensor]:
        torch.set_num_threads(1)
        began = time.perf_counter()
        name, start, stop = part
        hessian, seen = hessians[name], bool(counts[name])
        if not seen:
            hessian = torch.eye(hessian.shape[1], device=hessian.device).expand_as(hessian)
        with torch.no_grad():
            chosen, power = choose(weight(name)[start:stop], hessian, recipes[name], cut=seen and name in cut)
        said = [float(power.sum(dtype=torch.float64)), time.perf_counter() - began]
        return chosen, torch.tensor(said, dtype=torch.float64, device=ranks.device)

    mine = [part for part, owner in zip(parts, owners, strict=True) if owner == ranks.rank]
    with ThreadPoolExecutor(threads) as pool:
        done = dict(zip(mine, pool.map(one, mine), strict=True))
    found: dict[str, list[tuple[Chosen, torch.Tensor]]] = {}
    for part, owner in zip(parts, owners, strict=True):
        made = done.get(part) or _blank(part, hessians[part[0]].shape, ranks.device)
        for tensor in (made[0].codes, made[0].scales, made[0].zeros, made[0].groups, made[0].error, made[1]):
            ranks.tell(tensor, owner)
        found.setdefault(part[0], []).append(made)
    return {name: _joined(made, counts[name]) for name, made in found.items()}


def _blank(part: tuple[str, int, int], shape: Sequence[int], device: str) -> tuple[Chosen, torch.Tensor]:
    """Room for what another rank has."""
    import torch

    rows, (groups, size) = part[2] - part[1], shape[:2]
    return Chosen(
        torch.empty(rows, groups * size, dtype=torch.uint8, device=device),
        torch.empty(rows, groups, device=device),
        torch.empty(rows, groups, dtype=torch.uint8, device=device),
        torch.empty(groups * size, dtype=torch.int32, device=device),
        torch.empty(rows, device=device),
    ), torch.empty(2, dtype=torch.float64, device=device)


def _joined(found: Sequence[tuple[Chosen, torch.Tensor]], count: int) -> Result:
    import torch

    chosen = Chosen(
        torch.cat([one.codes for one, _ in found]),
        torch.cat([one.scales for one, _ in found]),
        torch.cat([one.zeros for one, _ in found]),
        found[0][0].groups,
        torch.cat([one.error for one, _ in found]),
    )
    power, seconds = torch.stack([said for _, said in found]).t()
    rows, columns = chosen.codes.shape
    error = float(chosen.error.sum(dtype=torch.float64))
    relative = error / (float(power.sum()) or 1.0)
    return Result(chosen, count, error / max(rows * (count or columns), 1), relative, 0.0, float(seconds.sum()))
