"""The number types that a config may ask for: how many bits, what shares a scale, and which elements there are.

Sources: OCP "Microscaling formats (MX)" 1.0 for the MX types; NVFP4 (e2m1, 16 with an e4m3 scale) for ``fp4``, the one
FP4 beside MX that a public loader reads; blocks of 128 x 128 or whole rows for ``fp8``, as DeepSeek-V3's and
compressed-tensors' checkpoints have them; GPTQModel 7.7.0 for the groups of whole numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

#: A scale for a whole row.
ROW: Final = -1
#: Multiples of 32, so that a group is whole words at any width; 16, which GPTQModel has too, is not at 3 bits.
INT_GROUPS: Final = (ROW, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Kind:
    """A type of weights.

    Attributes:
        groups: how many columns may share a scale, `ROW` for all of a row; none where there are no scales.
        group: the one that stands where none is said.
        elements: formats of a floating code, the default first.
        blocks: whether a group is a block of as many rows, whose last one may be cut off.
    """

    name: str
    bits: int
    groups: tuple[int, ...] = ()
    group: int = 0
    elements: tuple[str, ...] = ()
    blocks: bool = False

    @property
    def integer(self) -> bool:
        """Whether codes are whole numbers, which a scale turns into values."""
        return bool(self.groups) and not self.elements


PLAIN: Final = "bf16"
_ALL: Final = (
    *(Kind(f"int{bits}", bits, INT_GROUPS, 128) for bits in range(2, 9)),
    Kind("fp4", 4, (16,), 16, ("e2m1",)),
    Kind("fp6", 6, INT_GROUPS, 128, ("e2m3", "e3m2")),
    Kind("fp8", 8, (ROW, 128), 128, ("e4m3",), blocks=True),
    Kind("mxfp4", 4, (32,), 32, ("e2m1",)),
    Kind("mxfp6", 6, (32,), 32, ("e2m3", "e3m2")),
    Kind("mxfp8", 8, (32,), 32, ("e4m3",)),
    Kind(PLAIN, 16),
)
#: What ``wq`` may be.
KINDS: Final[Mapping[str, Kind]] = {kind.name: kind for kind in _ALL}
#: What ``aq`` may be: rounded as they come, with a scale for each token, or none at all.
ACTIVATIONS: Final = (PLAIN, "fp8", "mxfp8")
