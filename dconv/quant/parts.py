"""Weights in parts of their rows, divided over ranks and threads; every rank ends with all of them.

Rows are rounded each by itself and cut at fixed places, and a part is one thread's work: who does what changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dconv.quant.gptq import Chosen, Recipe
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

    def line(self, layer: int, name: str, recipe: Recipe, seconds: float) -> dict[str, Any]:
        """The report's line of a weight.

        Args:
            layer: its number.
            name: the weight's.
            recipe: how it was quantised.
            seconds: of the stage that it was part of, by the clock.
        """
        return {
            "layer": layer,
            "weight": name,
            "bits": recipe.numbers.bits,
            "group_size": recipe.group,
            "tokens": self.tokens,
            "error": self.error,
            "relative_error": self.relative,
            "damp": self.damp,
            "seconds": round(self.seconds, 3),
            "stage_seconds": round(seconds, 3),
            **({} if self.tokens else {"rounded_to_nearest": True}),
        }


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a weight; ``cost`` is relative."""

    name: str
    start: int
    stop: int
    cost: int


@dataclass(frozen=True)
class Made:
    """A part, quantised: its numbers, the power of what it answers, the damping used (None: rounded to nearest)."""

    chosen: Chosen
    power: float
    damp: float | None


def cut(shapes: Mapping[str, tuple[int, int]], cost: Callable[[int], int]) -> list[Part]:
    """The parts of weights, by name and shape; ``cost`` is of a row of so many columns."""
    return [
        Part(name, start, min(start + _ROWS, rows), (min(start + _ROWS, rows) - start) * cost(columns))
        for name, (rows, columns) in shapes.items()
        for start in range(0, rows, _ROWS)
    ]


def share(parts: Sequence[Part], ranks: Ranks) -> list[Part]:
    """Those of this rank: neighbours, so that it needs few Hessians."""
    return [part for part, owner in zip(parts, _owners(parts, ranks.world), strict=True) if owner == ranks.rank]


def _owners(parts: Sequence[Part], world: int) -> list[int]:
    total, at = sum(part.cost for part in parts) or 1, 0
    owners: list[int] = []
    for part in parts:
        owners.append(min(world - 1, (at + part.cost // 2) * world // total))
        at += part.cost
    return owners


def together(
    parts: Sequence[Part],
    mine: Sequence[Part],
    make: Callable[[Part], Made],
    pool: Executor,
    counts: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    recipes: Mapping[str, Recipe],
    ranks: Ranks,
) -> dict[str, Result]:
    """Quantise this rank's parts, and have those of all others, too.

    Args:
        parts: of all ranks (`cut`), the same on each.
        mine: of `share`.
        make: quantises a part.
        pool: its threads.
        counts: tokens of each weight.
        shapes: [rows, columns] of each weight.
        recipes: of each weight.
        ranks: that divide the parts among them.

    Raises:
        Preempted: a rank was told to stop, or has gone.
    """
    import torch

    def alone(part: Part) -> tuple[Chosen, torch.Tensor]:
        ranks.hear()
        torch.set_num_threads(1)
        began = time.perf_counter()
        with torch.no_grad():
            made = make(part)
        said = [made.power, -1.0 if made.damp is None else made.damp, time.perf_counter() - began]
        return made.chosen, torch.tensor(said, dtype=torch.float64, device=ranks.device)

    done: dict[Part, tuple[Chosen, torch.Tensor]] = {}
    with ranks.leaving_together():
        done |= zip(mine, pool.map(alone, mine), strict=True)
    found: dict[str, list[tuple[Chosen, torch.Tensor]]] = {}
    for part, owner in zip(parts, _owners(parts, ranks.world), strict=True):
        one = done.get(part) or _blank(part, shapes[part.name][1], recipes[part.name], ranks.device)
        for tensor in (one[0].codes, one[0].scales, one[0].zeros, one[0].groups, one[0].error, one[1]):
            ranks.tell(tensor, owner)
        found.setdefault(part.name, []).append(one)
    return {name: _joined(made, counts[name]) for name, made in found.items()}


def _blank(part: Part, columns: int, recipe: Recipe, device: str) -> tuple[Chosen, torch.Tensor]:
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
    tokens = count if float(damp[0]) >= 0 else 0
    rows, columns = chosen.codes.shape
    error = float(chosen.error.sum(dtype=torch.float64))
    return Result(
        chosen,
        tokens,
        error / max(rows * (tokens or columns), 1),
        error / (float(power.sum()) or 1.0),
        max(float(damp[0]), 0.0),
        float(seconds.sum()),
    )
