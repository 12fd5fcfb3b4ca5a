"""Weights in MLX's affine codes: ``weight``, ``scales`` and ``biases`` as derived tensors, the numbers MLX's own.

The weight is rounded to the dtype that it is written in before its steps are taken, as ``mlx_lm.convert`` does; scales
and biases are in that dtype. Codes that a source has on the same grid are kept, since encoding what they make would not
give them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from dconv.codec import affine, bitpack
from dconv.codec.cast import cast
from dconv.coded.encode import Coded, kept
from dconv.coded.fp8_encode import weights_of
from dconv.coded.integers import around
from dconv.coded.mlx import Decode, Grid
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Dtypes that MLX quantises.
DTYPES: Final = ("bf16", "f16", "f32")


@dataclass(frozen=True, slots=True)
class Codes:
    """Words [..., in]; input: the weight."""

    grid: Grid
    rounded: str
    columns: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the whole groups whose codes lie in the words of the box, and cut it out."""
        del dtype, factor
        bits, group = self.grid.bits, self.grid.group
        begin, number, _ = around(box.start[-1], box.shape[-1], bits)
        first = begin // group * group
        count = min(-(-(begin + number) // group) * group, self.columns) - first
        region = Region((*box.start[:-1], first), (*box.shape[:-1], count))
        words = bitpack.pack(affine.encode(weights_of(read, region, self.rounded), bits, group), bits)
        at = box.start[-1] - first * bits // 32
        return words[..., at : at + box.shape[-1]]


@dataclass(frozen=True, slots=True)
class Steps:
    """Scales or biases [..., groups]; input: the weight."""

    grid: Grid
    rounded: str
    part: Literal["scales", "biases"]

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Find the scales or biases of the groups in the box."""
        del dtype, factor
        group = self.grid.group
        region = Region((*box.start[:-1], box.start[-1] * group), (*box.shape[:-1], box.shape[-1] * group))
        found = affine.steps(weights_of(read, region, self.rounded), self.grid.bits, group)
        return cast(found[self.part == "biases"], "f32", self.rounded)


def code(spec: TensorSpec, dense: Array, logical: Logical, grid: Grid) -> Coded:
    """What a weight [..., in] of whole groups becomes.

    Args:
        spec: its name, shape and the dtype that it would be written in, one of `DTYPES`.
        dense: where it is.
        logical: the source.
        grid: bits and columns of a group.
    """
    *lead, columns = spec.shape
    module, bits = spec.name.removesuffix(".weight"), 8 * ITEMSIZE[dense.dtype]
    words = TensorSpec(spec.name, (*lead, columns * grid.bits // 32), "u32")
    scales, biases = (
        TensorSpec(f"{module}.{part}", (*lead, columns // grid.group), spec.dtype) for part in ("scales", "biases")
    )
    if found := kept(dense, logical, Decode(grid, spec.dtype), [words, scales, biases]):
        return found
    made = Coded()
    how = How(
        f"rounded once to int{grid.bits} between the edges of its {grid.group} columns", False, bits * 32 / grid.bits
    )
    made.make(words, Derived(words.shape, (dense,), Codes(grid, spec.dtype, columns), how, 32 // grid.bits))
    for part, title in ((scales, "a step of its columns"), (biases, "the farther edge of its columns")):
        recipe = Steps(grid, spec.dtype, "scales" if part is scales else "biases")
        made.make(part, Derived(part.shape, (dense,), recipe, How(title, False, bits * grid.group), grid.group))
    return made
