"""Σ x xᵀ over tokens, exact, so that neither the number of ranks nor their order changes one bit of it.

What one block of tokens adds is a float32 product, a function of that block alone. Blocks are added in float64, in two
parts on fixed grids: whole multiples of 2⁻¹⁰, and of what remains multiples of 2⁻⁵². Sums of such numbers are exact as
long as they stay below 2⁴² and 2⁰, so that additions may be done in any order, on any rank. What is dropped is below
2⁻⁵³ a block: a float32 product of values past 10⁻⁴ has no such bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

#: Adding and taking away this leaves multiples of 2^-10 (of 2^-52): 3 x 2^(51 - 10), 3 x 2^(51 - 52).
_COARSE, _FINE = 3 * 2.0**41, 3 * 2.0**-1
#: From here on sums are no longer exact.
LIMIT: Final = 2.0**42
#: Elements added at once: their float64 temporaries stay in the processor's caches.
_AT_ONCE: Final = 1 << 15


def add_exactly(value: torch.Tensor, coarse: torch.Tensor, fine: torch.Tensor) -> None:
    """Add float32 numbers to a sum of two float64 parts, each on its grid."""
    rest = value.double()
    high = rest.add(_COARSE).sub_(_COARSE)
    coarse += high
    fine += rest.sub_(high).add_(_FINE).sub_(_FINE)


class Sum:
    """Σ c x xᵀ of the inputs of one module, and how many there were. Threads may add to it at once.

    Only the lower triangle is kept, in stripes of columns.

    Args:
        columns: of the inputs.
        device: torch's name.
    """

    def __init__(self, columns: int, device: str = "cpu") -> None:
        import torch

        self.columns, self.count = columns, 0
        self._stripes: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        for start, stop in _stripes(columns):
            zeros = torch.zeros(columns - start, stop - start, dtype=torch.float64, device=device)
            self._stripes.append((start, stop, zeros, zeros.clone()))
        self._lock = threading.Lock()

    @staticmethod
    def bytes_for(columns: int) -> int:
        """What it takes, about."""
        return 16 * sum((columns - start) * (stop - start) for start, stop in _stripes(columns))

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the inputs of a block of tokens.

        Args:
            inputs: float32 [tokens, columns].
            weights: of each token, float32 [tokens] and not negative; one for all without.
        """
        scaled = inputs if weights is None else inputs * weights.sqrt()[:, None]
        for start, stop, coarse, fine in self._stripes:
            product = scaled[:, start:].t() @ scaled[:, start:stop]
            with self._lock:
                for rows in range(0, len(product), step := max(1, _AT_ONCE // (stop - start))):
                    some = slice(rows, rows + step)
                    add_exactly(product[some], coarse[some], fine[some])
        with self._lock:
            self.count += len(inputs)

    def parts(self) -> Iterator[torch.Tensor]:
        """The tensors that ranks have to add up, always the same ones in the same order."""
        for _, _, coarse, fine in self._stripes:
            yield coarse
            yield fine

    def total(self) -> torch.Tensor:
        """The sum, float32 [columns, columns]; what was kept of it is given back."""
        import torch

        device = self._stripes[0][2].device if self._stripes else "cpu"
        out = torch.empty(self.columns, self.columns, device=device)
        while self._stripes:
            start, stop, coarse, fine = self._stripes.pop()
            block = coarse.add_(fine).float()
            out[start:, start:stop] = block
            out[start:stop, stop:] = block[stop - start :].t()
        return out


def _stripes(columns: int, width: int = 256) -> Iterator[tuple[int, int]]:
    for start in range(0, columns, width):
        yield start, min(start + width, columns)
