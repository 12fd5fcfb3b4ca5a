"""``pack-quantized`` of compressed-tensors: codes of 1 to 8 bits in words along columns, zero points along rows.

Source: compressed-tensors 0.20.0, ``compressors/pack_quantized/base.py``. ``weight_g_idx`` is of the versions before,
which had columns in the order of activations (``actorder`` group).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dconv.codec import bitpack, packed
from dconv.coded.compressed_parts import SCALES, Module, blocks_of, matrix
from dconv.coded.decoded import Decoded, array_of
from dconv.coded.fp8 import as_grid, scales_shape
from dconv.coded.integers import Grid, Integers, Listed, span
from dconv.errors import Damaged, DconvError
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Region

if TYPE_CHECKING:
    from numpy.typing import NDArray


def integers(module: Module, found: Decoded) -> Integers:
    """The whole numbers of a module's weight.

    Raises:
        Damaged: a part is missing, or is not what the config makes it.
        Refused: scales shared in a way that the format does not have.
    """
    args = module.args
    if args.kind != "int" or args.strategy not in ("tensor", "channel", "group"):
        raise module.refuse("packed words hold whole numbers, by tensor, channel or group")
    if not args.symmetric and args.strategy == "tensor":
        raise module.refuse("zero points are packed by channel or group")
    words = module.need("weight_packed", ("i32",))
    shape = _whole_shape(module, found, matrix(words)[0])
    (rows, columns), bits = shape, args.bits
    try:
        layout = bitpack.layout_of(columns, words.spec.shape[1], bits)
    except DconvError as error:
        error.where = f"{words.spec.name} in {words.extents[0].file}"
        raise
    block, shapes = blocks_of(module, shape)
    groups = scales_shape(shape, (1, block[1]))[1]
    named = ["weight_packed", "weight_scale", "weight_shape"]
    unpack = Derived(shape, (array_of(words),), Codes(bits, layout, columns), How("codes", True, bits))
    codes = found.help(words, f"{module.name}//codes", unpack, "u8")
    zeros: Array | int = packed.middle(bits)
    if not args.symmetric:
        stored = module.need("weight_zero_point", ("i32",), (bitpack.words_for(rows, bits, layout), groups))
        unpack = Derived((rows, groups), (array_of(stored),), Zeros(bits, layout, rows), How("zeros", True, bits))
        zeros = found.help(stored, f"{module.name}//zeros", unpack, "u8")
        named.append("weight_zero_point")
    order = None
    if "weight_g_idx" in module.parts:
        if args.strategy != "group":
            raise module.refuse("columns are ordered by group only where there are groups")
        stored = module.need("weight_g_idx", ("i32",), (columns,))
        listed = Derived((columns,), (array_of(stored),), Listed(stored.spec.name, groups), How("groups", True, 32))
        order = found.help(stored, f"{module.name}//groups", listed, "i32")
        named.append("weight_g_idx")
    module.check_no_more(*named)
    scale = module.need("weight_scale", SCALES, *shapes)
    scales = array_of(as_grid(scale))
    if block[0] > 1:
        every = Derived((rows, 1), (scales,), Every(), How("the tensor's scale", True, 8 * ITEMSIZE[scale.spec.dtype]))
        scales = found.help(scale, f"{module.name}//scales", every, scale.spec.dtype)
    grid = Grid(bits, args.group or -1, symmetric=args.symmetric, ordered=order is not None)
    return Integers(shape, grid, codes, scales, zeros, order)


def _whole_shape(module: Module, found: Decoded, rows: int) -> tuple[int, int]:
    """``weight_shape``, read: the words of a row do not tell how many columns they hold."""
    stored = module.need("weight_shape", ("i64", "i32"), (2,))
    said = found.values(stored).view(f"<i{ITEMSIZE[stored.spec.dtype]}")
    shape = int(said[0]), int(said[1])
    if shape[0] != rows or not 0 < shape[1] < 1 << 31:
        raise Damaged(
            "packed codes are of another shape than is said beside them",
            where=f"{stored.spec.name} in {stored.extents[0].file}",
            expected=f"{rows} rows",
            found=str(list(shape)),
        )
    return shape


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes u8 [out, in]; input: ``weight_packed``."""

    bits: int
    layout: bitpack.Layout
    columns: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Unpack the words that hold the columns of the box."""
        del dtype, factor
        (top, left), (rows, columns) = box.start, box.shape
        first, words, held, at = span(left, columns, self.columns, self.bits, self.layout)
        stored = read(0, Region((top, first), (rows, words)), "")
        return packed.unpack_weight(stored, self.bits, held, self.layout)[:, at : at + columns]


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros u8 [out, groups]; input: ``weight_zero_point``."""

    bits: int
    layout: bitpack.Layout
    rows: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Unpack the words that hold the rows of the box."""
        del dtype, factor
        (top, left), (rows, groups) = box.start, box.shape
        first, words, held, at = span(top, rows, self.rows, self.bits, self.layout)
        stored = read(0, Region((first, left), (words, groups)), "")
        return packed.unpack_zeros(stored, self.bits, held, self.layout)[at : at + rows]


@dataclass(frozen=True, slots=True)
class Every:
    """A scale for each row, all the same; input: the one scale, [1, 1]."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Repeat the one scale for each row of the box."""
        del dtype, factor
        return np.repeat(read(0, Region((0, 0), (1, 1)), ""), box.shape[0], 0)
