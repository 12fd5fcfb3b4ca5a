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

    Only the lower triangle is kept, in stripes of columns. A stripe is open while inputs are added to it; closed, it
    takes a quarter of that. Where memory is short a few are open at a time, and the inputs come once for these.

    Args:
        columns: of the inputs.
        device: torch's name.
        room: bytes for stripes to begin with; None for all of them.

    Attributes:
        count: inputs since stripes were opened.
    """

    def __init__(self, columns: int, device: str = "cpu", room: int | None = None) -> None:
        self.columns, self.count, self._device = columns, 0, device
        self._left = list(_stripes(columns))
        self._open: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        self._closed: list[tuple[int, int, torch.Tensor]] = []
        self._lock = threading.Lock()
        self.open(self.bytes_for(columns) if room is None else room)

    @staticmethod
    def bytes_for(columns: int) -> int:
        """Bytes that it takes with all stripes open."""
        return sum(_bytes(columns, *stripe) for stripe in _stripes(columns))

    @property
    def is_whole(self) -> bool:
        """Whether all of it is summed."""
        return not self._left and not self._open

    @property
    def closed_bytes(self) -> int:
        """Bytes that the closed stripes take."""
        return sum(block.numel() * block.element_size() for _, _, block in self._closed)

    def open(self, room: int, *, least: bool = False) -> int:
        """Begin with the next stripes, as many as there is room for; returns the bytes that they take.

        Args:
            room: bytes.
            least: with one in any case.
        """
        import torch

        taken, self.count = 0, 0
        while self._left:
            size = _bytes(self.columns, *self._left[0])
            if taken + size > room and not (least and not taken):
                break
            start, stop = self._left.pop(0)
            zeros = torch.zeros(self.columns - start, stop - start, dtype=torch.float64, device=self._device)
            self._open.append((start, stop, zeros, zeros.clone()))
            taken += size
        return taken

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add the inputs of a block of tokens to the open stripes.

        Args:
            inputs: float32 [tokens, columns].
            weights: of each token, float32 [tokens] and not negative; one for all without.
        """
        scaled = inputs if weights is None else inputs * weights.sqrt()[:, None]
        for start, stop, coarse, fine in self._open:
            product = scaled[:, start:].t() @ scaled[:, start:stop]
            with self._lock:
                for rows in range(0, len(product), step := max(1, _AT_ONCE // (stop - start))):
                    some = slice(rows, rows + step)
                    add_exactly(product[some], coarse[some], fine[some])
        with self._lock:
            self.count += len(inputs)

    def parts(self) -> Iterator[torch.Tensor]:
        """The tensors that ranks have to add up, always the same ones in the same order."""
        for _, _, coarse, fine in self._open:
            yield coarse
            yield fine

    def close(self) -> None:
        """Be done with the open stripes."""
        while self._open:
            start, stop, coarse, fine = self._open.pop(0)
            self._closed.append((start, stop, coarse.add_(fine).float()))

    def total(self) -> torch.Tensor:
        """The sum, float32 [columns, columns]; what was kept of it is given back."""
        import torch

        self.close()
        out = torch.empty(self.columns, self.columns, device=self._device)
        while self._closed:
            start, stop, block = self._closed.pop()
            out[start:, start:stop] = block
            out[start:stop, stop:] = block[stop - start :].t()
        return out


def _bytes(columns: int, start: int, stop: int) -> int:
    return 16 * (columns - start) * (stop - start)


def _stripes(columns: int, width: int = 256) -> Iterator[tuple[int, int]]:
    for start in range(0, columns, width):
        yield start, min(start + width, columns)
