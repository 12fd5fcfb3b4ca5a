"""Whole-number grids of weights: which scale and which zero point a group of a row gets, and what rounds to what.

All tensors are float32 on one device; a scale is rounded to the dtype that it will be stored in before anything is
rounded with it, so that what is chosen is what a loader computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

#: Of the search for a smaller scale (GPTQ's ``mse``): steps of a hundredth, down to this part of the full range.
_STEPS: Final = 100
_SMALLEST: Final = 0.2
#: The power that the search weighs errors with, GPTQ's own (IST-DASLab/gptq, ``quant.py``).
POWER: Final = 2.4


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a group of weights is rounded to: codes 0 to ``top`` stand for (code - zero) x scale.

    Attributes:
        bits: of a code.
        symmetric: the zero point is half the range for every group.
        stored: torch's name of the scales' dtype.
        least_zero: the smallest zero point, 1 where a format stores zero points less one.
    """

    bits: int
    symmetric: bool
    stored: str = "float16"
    least_zero: int = 0

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(
        self, weights: torch.Tensor, importance: torch.Tensor | None = None, power: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points [rows] for groups of weights [rows, columns].

        Args:
            weights: float32; each row is a group of its own.
            importance: of each column, for the search; all alike without.
            power: search for the scale that makes the sum of |error| to this power least; 0 takes the full range.
        """
        import torch

        low = weights.amin(1).clamp(max=0)
        high = weights.amax(1).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(low.abs(), high)
            low = -high  # of a group without negative weights, too: half of its codes would stand for none of them
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale, zero = self._spanning(low, high)
        if not power:
            return scale, zero
        best = self._badness(weights, scale, zero, importance, power)
        for step in range(1, int(_STEPS * (1 - _SMALLEST)) + 1):
            part = 1 - step / _STEPS
            tried, offset = self._spanning(low * part, high * part)
            badness = self._badness(weights, tried, offset, importance, power)
            better = badness < best
            best = torch.where(better, badness, best)
            scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
        return scale, zero

    def _spanning(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        kind: torch.dtype = getattr(torch, self.stored)
        least = torch.finfo(kind).smallest_normal
        scale = ((high - low) / self.top).clamp(least, torch.finfo(kind).max).to(kind).float()
        if self.symmetric:
            return scale, torch.full_like(scale, (self.top + 1) / 2)
        return scale, (-low / scale).round().clamp(self.least_zero, self.top)

    def _badness(
        self,
        weights: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
        importance: torch.Tensor | None,
        power: float,
    ) -> torch.Tensor:
        error = (self.rounded(weights, scale[:, None], zero[:, None]) - weights).abs_().pow_(power)
        return error.sum(1) if importance is None else error @ importance

    def code(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes of weights, as float32 of their shape; scales and zero points broadcast to it."""
        return (weights / scale).round_().add_(zero).clamp_(0, self.top)

    def rounded(self, weights: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What codes nearest to weights stand for, float32 of their shape; scales and zero points broadcast to it."""
        return self.code(weights, scale, zero).sub_(zero).mul_(scale)
