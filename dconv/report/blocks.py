"""Block sizes of FP8 weights: the config's against the shapes of the scales, never one alone.

A shape alone does not tell: 48 rows with 2 scales fit blocks of 24 to 47 rows. All shapes together leave a range, in
which the config's size must lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dconv.coded import fp8
from dconv.errors import Damaged
from dconv.sharding.parsed import mapping_or_empty

Shape = tuple[int, ...]
#: The smallest and the largest size that fits; None where any larger one does.
Range = tuple[int, int | None]


@dataclass(frozen=True)
class Blocks:
    """Rows and columns that share a scale.

    Attributes:
        size: as the config has them; None for one scale a tensor.
        said_by: config.json, or the default where it says nothing.
        odd: what is wrong with what it says.
        admitted: what the shapes of all scales leave, for rows and for columns; None where no size fits them all, or
            there are none.
        disagree: weights whose scales have another shape than ``size`` makes.
    """

    size: tuple[int, int] | None
    said_by: str
    odd: str = ""
    admitted: tuple[Range, Range] | None = None
    disagree: tuple[str, ...] = ()

    def shape_for(self, weight: Shape) -> Shape:
        """The shape that a weight's scales have."""
        if self.size is None:
            return ()
        rest = zip(weight[-2:], self.size, strict=False)
        return (*weight[:-2], *(-(-n // step) for n, step in rest))

    @property
    def words(self) -> str:
        """Rows x columns that share a scale, as a person reads them."""
        return "one scale a tensor" if self.size is None else f"{self.size[0]} x {self.size[1]}"

    @property
    def admitted_words(self) -> str:
        """What the shapes leave, for a person."""
        if self.admitted is None:
            return "no block size fits the shapes of all scales"
        return " x ".join(_words(part) for part in self.admitted)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        admitted = None if self.admitted is None else [list(part) for part in self.admitted]
        agree = not self.odd and not self.disagree
        return {"size": self.size, "said_by": self.said_by, "shapes_admit": admitted, "agree": agree}


def _words(part: Range) -> str:
    low, high = part
    return str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"


def blocks_of(config: Mapping[str, object] | None, pairs: Mapping[str, tuple[Shape, Shape]]) -> Blocks:
    """Hold the config's block size against shapes.

    Args:
        config: config.json, where there is one.
        pairs: shapes of each weight in FP8 and of its scales.
    """
    quantization = (config or {}).get("quantization_config")
    said = mapping_or_empty(quantization)
    size, odd = None, ""
    if "weight_block_size" not in said or said["weight_block_size"] is not None:
        try:
            size = fp8.block_of(config)
        except Damaged as error:
            size, odd = fp8.block_of(None), f"{error.what}: {error.found}"
    by = "config.json" if "weight_block_size" in said else "transformers' default, config.json says none"
    known = Blocks(size, by, odd)
    of_blocks = {
        name: (weight, scale)
        for name, (weight, scale) in pairs.items()
        if known.shape_for(weight) == scale or scale != (*weight[:-1], 1)  # a scale for each row is no block's
    }
    disagree = tuple(name for name, (weight, scale) in of_blocks.items() if known.shape_for(weight) != scale)
    return Blocks(size, by, odd, _admitted(of_blocks.values()), disagree)


def _admitted(pairs: Iterable[tuple[Shape, Shape]]) -> tuple[Range, Range] | None:
    found: list[Range] = []
    pairs = set(pairs)
    if not pairs or any(len(w) != len(s) or len(w) < 2 or w[:-2] != s[:-2] for w, s in pairs):
        return None
    for axis in (-2, -1):
        low, high = 1, None
        for weight, scale in pairs:
            n, count = weight[axis], scale[axis]
            if not 1 <= count <= n:
                return None
            low = max(low, -(-n // count))
            if count > 1:
                largest = -(-n // (count - 1)) - 1
                high = largest if high is None else min(high, largest)
        if high is not None and low > high:
            return None
        found.append((low, high))
    return found[0], found[1]
