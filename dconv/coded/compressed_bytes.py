"""Weights in codes that compressed-tensors keeps in whole bytes: which parts, and the recipe.

FP8 and MXFP8 are blocks of `dconv.coded.fp8`; integers, whose values are signed, are raised by half the range
(`dconv.codec.packed`), and so are their zero points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import integer, packed
from dconv.coded import fp8
from dconv.coded.compressed_parts import SCALES, Made, Module, blocks_of, matrix, of_words
from dconv.coded.decoded import Decoded
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
    return Made(shape, (weight, fp8.as_grid(scale)), recipe, words, bits)


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
    scale = module.need("weight_scale", SCALES, *shapes)
    inputs = [weight, fp8.as_grid(scale)]
    named = ["weight", "weight_scale"]
    if not args.symmetric or "weight_zero_point" in module.parts:  # of symmetric ones zeros were once written, too
        inputs.append(fp8.as_grid(module.need("weight_zero_point", ("i8",), *shapes)))
        named.append("weight_zero_point")
    module.check_no_more(*named)
    each = sum(8 * ITEMSIZE[part.spec.dtype] for part in inputs[1:]) / (block[0] * block[1])
    words = f"int8 code{' less its zero point' if len(inputs) > 2 else ''} x the scale of {of_words(block, shape)}"
    return Made(shape, tuple(inputs), Int8(block, scale.spec.dtype, len(inputs) > 2), words, 8 + each)


@dataclass(frozen=True, slots=True)
class Int8:
    """(code - zero point) × scale; inputs: signed bytes, scales, zero points where there are any."""

    block: tuple[int, int]
    scale: str
    zeros: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the bytes of the box, with the scales and zero points of the blocks that it touches."""
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
