"""What AWQ counts of a module's inputs, over ranks and blocks in any order with one result (`dconv.quant.sums`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dconv.quant.sums import add_exactly

if TYPE_CHECKING:
    import torch


class _Exact:
    """A sum of float32 tensors of one shape, and of how many tokens it is. Threads may add to it at once."""

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        import torch

        self.count = 0
        self._coarse = torch.zeros(shape, dtype=torch.float64, device=device)
        self._fine = torch.zeros_like(self._coarse)
        self._lock = threading.Lock()

    def put(self, value: torch.Tensor, count: int) -> None:
        with self._lock:
            add_exactly(value, self._coarse, self._fine)
            self.count += count

    def parts(self) -> Iterator[torch.Tensor]:
        """The tensors that ranks have to add up."""
        yield self._coarse
        yield self._fine

    def total(self) -> torch.Tensor:
        """The sum, float32."""
        return (self._coarse + self._fine).float()


class Magnitudes:
    """Σ |x| of the inputs of one module, channel by channel.

    Args:
        columns: of the inputs.
        device: torch's name.
    """

    def __init__(self, columns: int, device: str = "cpu") -> None:
        self.sum = _Exact((columns,), device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs of a block of tokens, float32 [tokens, columns]."""
        self.sum.put(inputs.abs().sum(0), len(inputs))


class Hessians:
    """Σ x xᵀ of the inputs of one module within each group of columns, [groups, size, size].

    Args:
        columns: of the inputs.
        size: columns of a group.
        device: torch's name.
    """

    def __init__(self, columns: int, size: int, device: str = "cpu") -> None:
        self.size = size
        self.sum = _Exact((columns // size, size, size), device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add the inputs of a block of tokens, float32 [tokens, columns]."""
        parts = inputs.reshape(len(inputs), -1, self.size).transpose(0, 1)
        self.sum.put(parts.transpose(1, 2).bmm(parts), len(inputs))
