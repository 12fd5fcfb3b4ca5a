"""AWQ (Lin et al., 2023): scales that spare the weights of large activations, and ranges that spare the rest.

A channel's weights are multiplied before they are rounded, and what they are multiplied with is divided out of what
makes the channel (`dconv.quant.awq_maps`). The scales are a family of one parameter, searched on a grid; afterwards the
range of each group of a row is cut where that lessens the error. All is float32 on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.quant.gptq import Chosen, Recipe

if TYPE_CHECKING:
    import torch

#: Of AutoAWQ (``awq/quantize/quantizer.py``): what keeps quotients finite, and the smallest scale.
_WEIGHT_FLOOR: Final = 1e-6
_QUOTIENT_FLOOR: Final = 1e-4
_LEAST: Final = 1e-4
#: Of the same: ranges are cut by twentieths, to no less than half.
_CUTS: Final = tuple(1 - step / 20 for step in range(10))
#: Rows that are rounded at once: their temporaries stay small.
_ROWS: Final = 1024


@dataclass(frozen=True)
class Search:
    """The points that are tried.

    Attributes:
        points: of the grid.
        duo: from activations and weights, not from activations alone.
    """

    points: int = 20
    duo: bool = True

    def __len__(self) -> int:
        return 1 + self.points

    def scales(self, inputs: torch.Tensor, weights: torch.Tensor) -> Iterator[torch.Tensor]:
        """Scales of each channel [channels], around 1: none at first, so that nothing gets worse, then AWQ's own.

        These are ``x^r / (w^(1 - r) + 1e-4)`` (``x^r`` if not ``duo``) with ``r`` = 0, 1/n, …

        Args:
            inputs: the mean magnitude of each channel, [channels].
            weights: the mean over rows of each weight's magnitude, as a part of its group's largest.
        """
        import torch

        yield torch.ones_like(inputs)
        for point in range(self.points):
            ratio = point / self.points
            made = inputs**ratio
            if self.duo:
                made = made / (weights ** (1 - ratio) + _QUOTIENT_FLOOR)
            made = made.clamp(min=_LEAST)
            made = made / (made.max() * made.min()).sqrt()
            yield torch.where(made.isfinite() & (made > 0), made, 1.0)


def magnitudes(weight: torch.Tensor, group: int) -> torch.Tensor:
    """Sums over the rows of a weight [rows, columns] of each element's part in its group's largest, float64 [columns].

    Those of all weights that read the same channels, over all of their rows, are what `Search.scales` takes.
    """
    import torch

    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for some in torch.split(weight, _ROWS):
        parts = in_groups(some.abs(), group)
        total += (parts / (parts.amax(2, keepdim=True) + _WEIGHT_FLOOR)).reshape(-1, len(total)).sum(0).double()
    return total


def in_groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """A weight [rows, columns] as [rows, groups, columns of a group].

    Raises:
        ValueError: its columns are no whole groups.
    """
    rows, columns = weight.shape
    size = columns if group < 0 else group
    if columns % size:
        raise ValueError(f"{columns} columns in groups of {size}")
    return weight.reshape(rows, columns // size, size)


def rounded(weight: torch.Tensor, scales: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """A weight [rows, columns] whose channels are rounded as ``scales`` times themselves."""
    import torch

    out = torch.empty_like(weight)
    for start in range(0, len(weight), _ROWS):
        parts = in_groups(weight[start : start + _ROWS] * scales, recipe.group)
        flat = parts.flatten(0, 1)
        scale, zero = recipe.numbers.fit(flat)
        made = recipe.numbers.rounded(flat, scale[:, None], zero[:, None])
        out[start : start + _ROWS] = made.reshape(-1, weight.shape[1]) / scales
    return out


def choose(weight: torch.Tensor, hessians: torch.Tensor, recipe: Recipe, *, cut: bool) -> tuple[Chosen, torch.Tensor]:
    """Round to nearest, each group of a row in the range that makes its own error least.

    Args:
        weight: [rows, columns].
        hessians: Σ x xᵀ of the columns of each group, [groups, size, size].
        recipe: its numbers and group.
        cut: search ranges smaller than the whole one.

    Returns:
        The numbers, whose error is ``Σ Δ H Δᵀ`` over the groups of a row; the same of the row itself, [rows].
    """
    import torch

    numbers, columns = recipe.numbers, weight.shape[1]
    parts = in_groups(weight, recipe.group).transpose(0, 1).contiguous()  # [groups, rows, size]
    count, rows, size = parts.shape
    top = parts.abs().amax(2, keepdim=True)
    best = torch.full((count, rows), torch.inf, device=weight.device)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for part in _CUTS if cut else _CUTS[:1]:
        clipped = parts.clamp(-part * top, part * top) if part < 1 else parts
        tried, offset = (found.reshape(count, rows) for found in numbers.fit(clipped.reshape(count * rows, size)))
        error = numbers.rounded(parts, tried[..., None], offset[..., None]).sub_(parts)
        badness = _power(error, hessians)
        better = badness < best
        best = torch.where(better, badness, best)
        scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    codes = numbers.code(parts, scale[..., None], zero[..., None]).to(torch.uint8)
    groups = torch.arange(columns, dtype=torch.int32, device=weight.device) // size
    chosen = Chosen(
        codes.transpose(0, 1).reshape(rows, columns).contiguous(),
        scale.t().contiguous(),
        zero.t().to(torch.uint8).contiguous(),
        groups,
        best.sum(0),
    )
    return chosen, _power(parts, hessians).sum(0)


def _power(vectors: torch.Tensor, hessians: torch.Tensor) -> torch.Tensor:
    """What vectors [groups, rows, size] come to, v H vᵀ: [groups, rows]."""
    return (vectors.bmm(hessians) * vectors).sum(2).clamp_(min=0)


def settled(norm: torch.Tensor, scales: torch.Tensor, offset: float, stored: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weight divided by scales and rounded as it will be stored; the scales that this makes exact.

    What reads the norm is multiplied by the quotient of what was and what is, so that rounding the norm changes no
    function, however coarse its dtype (of a weight near -1 with an offset of 1, it is very coarse).

    Args:
        norm: the weight as stored.
        scales: what it is to be divided by, one a channel.
        offset: what the module adds to it.
        stored: torch's name of the dtype.
    """
    import torch

    before = norm.double() + offset
    made = (before / scales.double() - offset).to(getattr(torch, stored)).float()
    after = made.double() + offset
    fits = (after != 0) & (before != 0) & after.isfinite()
    found = torch.where(fits, before / torch.where(fits, after, 1.0), 1.0).float()
    fits = fits & found.isfinite() & (found != 0)
    return torch.where(fits, made, norm), torch.where(fits, found, 1.0)
