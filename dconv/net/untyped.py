"""What torch and its modules leave without annotations, with those that it would have.

A call of these costs what the call of torch costs. torch is imported when one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


def from_numpy(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of an array's shape and dtype, on the CPU and over the same memory."""
    return _torch().from_numpy(array)


def listed(tensor: Any) -> list[Any]:
    """The elements of a tensor of one axis or more as Python's numbers, in lists of lists."""
    return tensor.tolist()


def distinct(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that a tensor has, sorted, and in its own shape where among them each element is."""
    return _torch().unique(tokens, return_inverse=True)


def lengths(vectors: Any) -> torch.Tensor:
    """Euclidean norms of vectors [..., channels]: [...]."""
    return vectors.norm(dim=-1)


def linalg() -> Any:
    """The module ``torch.linalg``, whose functions are compiled."""
    return _torch().linalg


def class_of(module: Any) -> Any:
    """A module's class, for attributes that no annotation speaks of."""
    return cast("Any", type(module))


def own_forward(module: Any) -> Callable[..., Any]:
    """The forward pass of a module's class, bound to the module, whatever stands in its place there."""
    return class_of(module).forward.__get__(module)


def first_of(made: tuple[Any, ...] | torch.Tensor) -> Any:
    """The first of what a module made, which is where its hidden states are, or the only one."""
    return made[0] if isinstance(made, tuple) else made


def _torch() -> Any:
    import torch

    return torch
