"""Linear layers in FP8, as transformers and vLLM read it: ``weight`` in e4m3, ``weight_scale_inv`` for its blocks.

Codes and scales equal transformers' own (`dconv.codec.fp8`) bit by bit. A source that has the same codes already keeps
them: encoding what was decoded would move scales by a rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import e8m0, fp8
from dconv.codec.cast import cast
from dconv.coded.encode import Coded, kept
from dconv.coded.fp8 import FP8, SUFFIX, Decode, scales_shape
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Logical, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Elements of a block read at once: one of a tensor's own may be all of it.
_AT_ONCE: Final = 1 << 18


@dataclass(frozen=True)
class BlockFP8:
    """See the module.

    Attributes:
        block: rows and columns that share a scale; None gives a tensor one.
        power_of_two: scales are powers of two, stored as E8M0 (``scale_fmt`` ue8m0).
    """

    block: tuple[int, int] | None = (128, 128)
    power_of_two: bool = False
    columns: int = field(default=1, init=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        of = f"{self.block[0]} x {self.block[1]} block" if self.block else "tensor"
        return f"FP8 (e4m3) with a scale for each {of}"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """Codes in e4m3 [out, in]; ``weight_scale_inv``, one for each block, in fp32 or E8M0."""
        block = self.block or (spec.shape[0], spec.shape[1])
        shape = scales_shape(spec.shape, block)
        codes = TensorSpec(spec.name, spec.shape, FP8)
        kind = "f8_e8m0" if self.power_of_two else "f32"
        scale = TensorSpec(spec.name + SUFFIX, shape if self.block else (), kind)
        if found := kept(dense, logical, Decode(block, FP8), [codes, scale]):
            return found
        made = Coded()
        cost, bits = prod(block), 8 * ITEMSIZE[dense.dtype]
        words = f"rounded once to e4m3 with {'a power of two' if self.power_of_two else 'absmax / 448'} for its scale"
        largest = Derived(shape, (dense,), Amax(block, spec.shape), How("absmax", False, 0), cost, remembered=True)
        amax = made.help(f"{spec.name}//amax", largest, "f32")
        made.make(codes, Derived(spec.shape, (dense, amax), Codes(block, self.power_of_two), How(words, False, bits)))
        recipe = Scale(self.power_of_two, self.block is None)
        made.make(scale, Derived(scale.shape, (amax,), recipe, How("absmax / 448 in fp32", True, bits * cost)))
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`: transformers reads one name of the list, vLLM the other."""
        del coded
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.block) if self.block else None,
            **({"scale_fmt": "ue8m0"} if self.power_of_two else {}),
            "modules_to_not_convert": plain,
            "ignored_layers": plain,
        }


def weights_of(read: Read, box: Region, dtype: str) -> NDArray[np.float32]:
    """A box of the first input, rounded to a dtype, as fp32."""
    return cast(read(0, box, dtype), dtype, "f32").view(np.float32)


@dataclass(frozen=True, slots=True)
class Amax:
    """The largest finite magnitude of each block; input: the weight, of this shape, rounded to a dtype before."""

    block: tuple[int, int]
    shape: Index
    rounded: str = "f32"

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Read the blocks of the box whole.

        One that is large is read in parts, so that one scale for a tensor takes no more memory than others.
        """
        del dtype, factor
        start = tuple(at * step for at, step in zip(box.start, self.block, strict=True))
        stop = (min(end * step, n) for end, step, n in zip(box.stop, self.block, self.shape, strict=True))
        region = Region(start, tuple(b - a for a, b in zip(start, stop, strict=True)))
        if region.volume <= _AT_ONCE or prod(box.shape) > 1:
            return fp8.amax(weights_of(read, region, self.rounded), self.block)
        parts = (weights_of(read, part, self.rounded) for part in region.bands(_AT_ONCE))
        return np.full(box.shape, max(fp8.amax(part, self.block).max() for part in parts), np.float32)


@dataclass(frozen=True, slots=True)
class Codes:
    """The weight's codes; inputs: the weight, its blocks' `Amax`."""

    block: tuple[int, int]
    power_of_two: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the weights of the box by the `Amax` of the blocks that it touches."""
        del dtype, factor
        (m, n), (row, column) = self.block, box.start
        blocks = Region((row // m, column // n), (-(-box.stop[0] // m) - row // m, -(-box.stop[1] // n) - column // n))
        codes, _ = fp8.encode(
            read(0, box, "f32"),
            self.block,
            power_of_two=self.power_of_two,
            largest=read(1, blocks, ""),
            row0=row % m,
            col0=column % n,
        )
        return codes


@dataclass(frozen=True, slots=True)
class Scale:
    """What multiplies the codes; input: the blocks' `Amax`, one for all where ``single``."""

    power_of_two: bool
    single: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The scales of the blocks in the box, as fp32 or as E8M0 bytes."""
        del dtype, factor
        largest = read(0, Region((0, 0), (1, 1)) if self.single else box, "")
        _, stored = fp8.scales(largest, power_of_two=self.power_of_two)
        found = e8m0.to_bytes(stored) if self.power_of_two else stored
        return found.reshape(box.shape)
