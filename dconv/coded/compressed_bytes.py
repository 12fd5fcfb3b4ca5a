"""Weights in codes that compressed-tensors keeps in whole bytes or packed in words: which parts, and the recipe.

FP8 and MXFP8 are blocks of `dconv.coded.fp8`; integers, whose values are signed, are raised by half the range
(`dconv.codec.packed`), and so are their zero points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import bitpack, integer, packed
from dconv.coded import fp8
from dconv.coded.compressed_parts import SCALES, Made, Module, as_grid, blocks_of, matrix, of_words
from dconv.coded.decoded import Decoded
from dconv.errors import Damaged, DconvError
from dconv.sharding.derived import Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.region import Region

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: MX: columns that share a scale.
_MX: Final = 32


def float8(module: Module, found: Decoded) -> Made:
    """``float-quantized``: code × scale, of a tensor, a row, a group of columns or a block."""
    del found
    args = module.args
    weight = module.need("weight", (fp8.FP8,) if args.kind == "float" else ("i8",))
    if (args.kind, args.bits) != ("float", 8) or not args.symmetric:
        raise module.refuse("FP8 weights have codes of 8 bits without zero points")
    module.check_no_more("weight", "weight_scale")
    shape = matrix(weight)
    block, shapes = blocks_of(module, shape)
    scale = module.need("weight_scale", SCALES, *shapes)
    words = f"e4m3 code x the scale of {of_words(block, shape)}"
    bits = 8 + 8 * ITEMSIZE[scale.spec.dtype] / (block[0] * block[1])
    recipe = fp8.Decode(block, weight.spec.dtype)
    return Made(shape, (weight, as_grid(scale, fp8.scales_shape(shape, block))), recipe, words, bits)


def naive(module: Module, found: Decoded) -> Made:
    """``naive-quantized`` is what fits a byte."""
    return (float8 if module.args.kind == "float" else int8)(module, found)


def mxfp8(module: Module, found: Decoded) -> Made:
    """``mxfp8-quantized``: e4m3 code × a power of two for every 32 columns."""
    del found
    args = module.args
    if (args.kind, args.bits, args.symmetric, args.group) != ("float", 8, True, _MX):
        raise module.refuse("MXFP8 has FP8 codes with a scale for every 32 columns")
    module.check_no_more("weight", "weight_scale")
    weight = module.need("weight", (fp8.FP8,))
    shape = matrix(weight)
    block, shapes = blocks_of(module, shape)
    scale = module.need("weight_scale", ("u8", "f8_e8m0"), *shapes)
    words = "e4m3 code x the power of two of its 32 columns"
    return Made(shape, (weight, scale), fp8.Decode(block, weight.spec.dtype), words, 8 + 8 / _MX)


def int8(module: Module, found: Decoded) -> Made:
    """``int-quantized``: (code - zero point) × scale, one code a byte whatever ``num_bits`` says."""
    del found
    args = module.args
    if args.kind != "int":
        raise module.refuse("codes in signed bytes are whole numbers")
    weight = module.need("weight", ("i8",))
    shape = matrix(weight)
    block, shapes = blocks_of(module, shape)
    grid = fp8.scales_shape(shape, block)
    scale = module.need("weight_scale", SCALES, *shapes)
    inputs = [weight, as_grid(scale, grid)]
    named = ["weight", "weight_scale"]
    if not args.symmetric or "weight_zero_point" in module.parts:  # of symmetric ones zeros were once written, too
        inputs.append(as_grid(module.need("weight_zero_point", ("i8",), *shapes), grid))
        named.append("weight_zero_point")
    module.check_no_more(*named)
    each = sum(8 * ITEMSIZE[part.spec.dtype] for part in inputs[1:]) / (block[0] * block[1])
    words = f"int8 code{' less its zero point' if len(inputs) > 2 else ''} x the scale of {of_words(block, shape)}"
    return Made(shape, tuple(inputs), Int8(block, scale.spec.dtype, len(inputs) > 2), words, 8 + each)


def packed_words(module: Module, found: Decoded) -> Made:
    """``pack-quantized``: codes of 1 to 8 bits in words along the columns, zero points in words along the rows."""
    args = module.args
    if args.kind != "int" or args.strategy not in ("tensor", "channel", "group"):
        raise module.refuse("packed words hold whole numbers, by tensor, channel or group")
    if not args.symmetric and args.strategy == "tensor":
        raise module.refuse("zero points are packed by channel or group")
    codes = module.need("weight_packed", ("i32",))
    shape = _whole_shape(module, found, matrix(codes)[0])
    (rows, columns), count = shape, codes.spec.shape[1]
    try:
        layout = bitpack.layout_of(columns, count, args.bits)
    except DconvError as error:
        error.where = f"{codes.spec.name} in {codes.extents[0].file}"
        raise
    block, shapes = blocks_of(module, shape)
    grid = fp8.scales_shape(shape, block)
    scale = module.need("weight_scale", SCALES, *shapes)
    inputs = [codes, as_grid(scale, grid)]
    named = ["weight_packed", "weight_scale", "weight_shape"]
    if not args.symmetric:
        of_rows = (bitpack.words_for(rows, args.bits, layout), grid[1])
        inputs.append(module.need("weight_zero_point", ("i32",), of_rows))
        named.append("weight_zero_point")
    ordered = "weight_g_idx" in module.parts
    if ordered:
        if args.strategy != "group":
            raise module.refuse("columns are ordered by group only where there are groups")
        inputs.append(module.need("weight_g_idx", ("i32",), (columns,)))
        named.append("weight_g_idx")
    module.check_no_more(*named)
    recipe = Packed(args.bits, layout, shape, block, scale.spec.dtype, not args.symmetric, ordered)
    each = 8 * ITEMSIZE[scale.spec.dtype] / (block[0] * block[1]) + 32 * ordered / rows
    words = f"int{args.bits} code{'' if args.symmetric else ' less its zero point'} x the scale of "
    words += of_words(block, shape) + (", in the order of activations" if ordered else "")
    return Made(shape, tuple(inputs), recipe, words, args.bits + each)


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
class Int8:
    """(code - zero point) × scale; inputs: signed bytes, scales, zero points where there are any."""

    block: tuple[int, int]
    scale: str
    zeros: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        rows, columns = (np.arange(a, b) // n - a // n for a, b, n in zip(box.start, box.stop, self.block, strict=True))
        touched = Region(
            (box.start[0] // self.block[0], box.start[1] // self.block[1]), (int(rows[-1]) + 1, int(columns[-1]) + 1)
        )
        return integer.decode(
            packed.from_int8(read(0, box, "")),
            read(1, touched, "")[rows],
            packed.from_int8(read(2, touched, ""))[rows] if self.zeros else packed.middle(8),
            columns,
            source=self.scale,
            target=dtype,
            factor=factor,
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """(code - zero point) × scale; inputs: words, scales, zero points and columns' groups where there are any.

    Attributes:
        shape: of the weight.
        block: rows (1, or all) and columns that share a scale.
    """

    bits: int
    layout: bitpack.Layout
    shape: tuple[int, int]
    block: tuple[int, int]
    scale: str
    zeros: bool
    ordered: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        (top, left), (rows, columns) = box.start, box.shape
        words, first, count = self._span(left, columns, self.shape[1])
        stored = read(0, Region((top, words[0]), (rows, words[1])), "")
        codes = packed.unpack_weight(stored, self.bits, count, self.layout)
        if self.ordered:
            begin, number = 0, -(-self.shape[1] // self.block[1])
            groups = read(2 + self.zeros, Region((left,), (columns,)), "").view("<i4")
        else:
            begin = left // self.block[1]
            number = -(-(left + columns) // self.block[1]) - begin
            groups = integer.groups_of(columns, self.block[1], left) - begin
        if self.block[0] == 1:
            scales = read(1, Region((top, begin), (rows, number)), "")
        else:
            scales = np.repeat(read(1, Region((0, begin), (1, number)), ""), rows, 0)
        return integer.decode(
            codes[:, first : first + columns],
            scales,
            self._zeros(read, top, rows, begin, number) if self.zeros else packed.middle(self.bits),
            groups,
            source=self.scale,
            target=dtype,
            bits=self.bits,
            factor=factor,
        )

    def _zeros(self, read: Read, top: int, rows: int, begin: int, number: int) -> NDArray[np.uint8]:
        words, first, count = self._span(top, rows, self.shape[0])
        stored = read(2, Region((words[0], begin), (words[1], number)), "")
        return packed.unpack_zeros(stored, self.bits, count, self.layout)[first : first + rows]

    def _span(self, start: int, count: int, whole: int) -> tuple[tuple[int, int], int, int]:
        """Words that hold some codes, by start and number; where the first is in them; how many codes they hold."""
        codes, words = bitpack.period(self.bits, self.layout)
        low = start // codes
        high = min(-(-(start + count) // codes) * codes, whole)
        held = high - low * codes
        return (low * words, bitpack.words_for(held, self.bits, self.layout)), start - low * codes, held
