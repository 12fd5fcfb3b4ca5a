"""GPTQ of the weights of a stage, their rows divided over ranks and threads; every rank ends with all of it.

Rows are cut at fixed places, each part is one thread's work, and a Hessian is the same everywhere: so who does what
changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.quant.gptq import Chosen, Factor, Recipe, factor, nearest, quantise
from dconv.quant.passes import Group
from dconv.quant.ranks import Ranks

if TYPE_CHECKING:
    import torch

#: Rows of a part: enough for large products, few enough that a weight's parts occupy several ranks.
_ROWS: Final = 1024


@dataclass(frozen=True)
class Result:
    """A quantised weight and what is to be said of it.

    Attributes:
        tokens: that its Hessian is made of; 0 where it was rounded to nearest.
        error: mean squared error of an output over those tokens, damping included; of a weight rounded to nearest, of
            its elements.
        relative: the same as a part of the outputs' own mean square.
        damp: used, as a part of the mean of the diagonal.
        seconds: of one core.
    """

    chosen: Chosen
    tokens: int
    error: float
    relative: float
    damp: float
    seconds: float


@dataclass(frozen=True)
class _Part:
    group: int
    name: str
    start: int
    stop: int
    cost: int


def solve(
    groups: Sequence[Group],
    hessians: Sequence[torch.Tensor],
    counts: Sequence[int],
    weight: Callable[[str], torch.Tensor],
    recipes: Mapping[str, Recipe],
    ranks: Ranks,
    threads: int,
) -> dict[str, Result]:
    """Quantise the weights of some groups.

    Args:
        hessians: Σ x xᵀ of each group, float32; overwritten.
        counts: tokens of each.
        weight: a weight by name.
    """
    parts = [
        _Part(i, name, start, min(start + _ROWS, rows), (min(start + _ROWS, rows) - start) * group.columns**2)
        for i, group in enumerate(groups)
        for name in group.names
        for rows in (weight(name).shape[0],)
        for start in range(0, rows, _ROWS)
    ]
    owners = _spread([part.cost for part in parts], ranks.world)
    mine = [part for part, owner in zip(parts, owners, strict=True) if owner == ranks.rank]
    with ThreadPoolExecutor(threads) as pool:
        needed = sorted({(part.group, recipes[part.name]) for part in mine}, key=lambda key: (key[0], repr(key[1])))
        factors = pool.map(lambda key: _factored(hessians[key[0]], counts[key[0]], key[1]), needed)
        made = dict(zip(needed, factors, strict=True))
        done = dict(zip(mine, pool.map(lambda part: _quantised(part, weight, recipes, made), mine), strict=True))
    results: dict[str, list[tuple[Chosen, torch.Tensor]]] = {}
    for part, owner in zip(parts, owners, strict=True):
        found = done.get(part) or _blank(part, groups[part.group].columns, recipes[part.name], ranks.device)
        for tensor in (found[0].codes, found[0].scales, found[0].zeros, found[0].groups, found[0].error, found[1]):
            ranks.tell(tensor, owner)
        results.setdefault(part.name, []).append(found)
    group_of = {name: i for i, group in enumerate(groups) for name in group.names}
    return {name: _joined(found, counts[group_of[name]]) for name, found in results.items()}


def _spread(costs: Sequence[int], world: int) -> list[int]:
    """Owners of parts: neighbours to one rank, so that it needs few Hessians."""
    total, at, owners = sum(costs) or 1, 0, []
    for cost in costs:
        owners.append(min(world - 1, (at + cost // 2) * world // total))
        at += cost
    return owners


def _factored(hessian: torch.Tensor, count: int, recipe: Recipe) -> Factor | None:
    import torch

    torch.set_num_threads(1)
    return factor(hessian.clone(), recipe) if count else None


def _quantised(
    part: _Part,
    weight: Callable[[str], torch.Tensor],
    recipes: Mapping[str, Recipe],
    made: Mapping[tuple[int, Recipe], Factor | None],
) -> tuple[Chosen, torch.Tensor]:
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    recipe = recipes[part.name]
    rows = weight(part.name)[part.start : part.stop]
    found = made[part.group, recipe]
    chosen = quantise(rows, found, recipe) if found else nearest(rows, recipe)
    power = found.power(rows) if found else float(rows.square().sum(dtype=torch.float64))
    said = [power, found.damp if found else -1.0, time.perf_counter() - began]
    return chosen, torch.tensor(said, dtype=torch.float64, device=rows.device)


def _blank(part: _Part, columns: int, recipe: Recipe, device: str) -> tuple[Chosen, torch.Tensor]:
    """Room for what another rank has."""
    import torch

    rows = part.stop - part.start
    groups = 1 if recipe.group < 0 else -(-columns // recipe.group)
    return Chosen(
        torch.empty(rows, columns, dtype=torch.uint8, device=device),
        torch.empty(rows, groups, device=device),
        torch.empty(rows, groups, dtype=torch.uint8, device=device),
        torch.empty(columns, dtype=torch.int32, device=device),
        torch.empty(rows, device=device),
    ), torch.empty(3, dtype=torch.float64, device=device)


def _joined(found: Sequence[tuple[Chosen, torch.Tensor]], count: int) -> Result:
    import torch

    chosen = Chosen(
        torch.cat([one.codes for one, _ in found]),
        torch.cat([one.scales for one, _ in found]),
        torch.cat([one.zeros for one, _ in found]),
        found[0][0].groups,
        torch.cat([one.error for one, _ in found]),
    )
    power, damp, seconds = torch.stack([said for _, said in found]).t()
    calibrated = float(damp[0]) >= 0
    rows, columns = chosen.codes.shape
    error = float(chosen.error.sum(dtype=torch.float64))
    tokens = count if calibrated else 0
    return Result(
        chosen,
        tokens,
        error / max(rows * (tokens or columns), 1),
        error / (float(power.sum()) or 1.0),
        max(float(damp[0]), 0.0),
        float(seconds.sum()),
    )
