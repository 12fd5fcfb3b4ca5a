"""Weights that compressed-tensors keeps in floating codes of 4 and 6 bits: which parts, and the recipe.

``weight_packed`` has the codes side by side in bytes (`dconv.codec.pack`), ``weight_scale`` one byte for 32 columns
(MX) or 16 (NVFP4), whose ``weight_global_scale`` the scales are to be divided by. ModelOpt has other names, and a scale
of NVFP4 tensors that multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import mx, nvfp4
from dconv.codec.minifloat import E2M1, E2M3, Minifloat
from dconv.coded.compressed_parts import Made, Module, matrix
from dconv.coded.decoded import Decoded
from dconv.errors import Damaged
from dconv.sharding.derived import Read
from dconv.sharding.region import Region
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: By bits. compressed-tensors' 6 bits are E2M3 alone.
FORMATS: Final = {4: E2M1, 6: E2M3}


def mx4(module: Module, found: Decoded) -> Made:
    """``mxfp4-pack-quantized``."""
    del found
    return of_mx(module, 4)


def mx6(module: Module, found: Decoded) -> Made:
    """``mxfp6-pack-quantized``."""
    del found
    return of_mx(module, 6)


def of_mx(module: Module, bits: int, codes_in: str = "weight_packed") -> Made:
    """Codes with a power of two for each 32 columns; ``codes_in`` is the part that has them."""
    fmt = FORMATS[bits]
    codes, shape = _packed(module, codes_in, fmt, mx.BLOCK)
    module.check_no_more(codes_in, "weight_scale")
    scale = module.need("weight_scale", ("u8", "f8_e8m0"), (shape[0], shape[1] // mx.BLOCK))
    words = f"{fmt.name} code x the power of two of its {mx.BLOCK} columns"
    return Made(shape, (codes, scale), Mx(bits), words, bits + 8 / mx.BLOCK)


def nv4(module: Module, found: Decoded) -> Made:
    """``nvfp4-pack-quantized``."""
    del found
    return of_nv(module, "weight_packed", "weight_global_scale", divides=True)


def of_nv(module: Module, codes_in: str, whole_in: str, *, divides: bool) -> Made:
    """Codes with a scale for each 16 columns and one for all, in the parts of these names."""
    codes, shape = _packed(module, codes_in, E2M1, nvfp4.BLOCK)
    module.check_no_more(codes_in, "weight_scale", whole_in)
    scale = module.need("weight_scale", ("f8_e4m3",), (shape[0], shape[1] // nvfp4.BLOCK))
    whole = module.need(whole_in, ("f32",), (1,), ())
    words = f"{E2M1.name} code x the e4m3 scale of its {nvfp4.BLOCK} columns {'/' if divides else 'x'} its tensor's"
    recipe = Nv(len(whole.spec.shape), divides)
    return Made(shape, (codes, scale, whole), recipe, words, 4 + 8 / nvfp4.BLOCK)


def _packed(module: Module, part: str, fmt: Minifloat, block: int) -> tuple[Stored, tuple[int, int]]:
    """The codes, and the weight's shape."""
    args = module.args
    if (args.kind, args.bits, args.symmetric, args.group) != ("float", fmt.bits, True, block):
        raise module.refuse(f"{fmt.name} codes have a scale for every {block} columns and no zero points")
    codes = module.need(part, ("u8",))
    rows, count = matrix(codes)
    if count % (block * fmt.bits // 8):
        raise Damaged(
            "packed codes do not fill their groups",
            where=f"{codes.spec.name} in {codes.extents[0].file}",
            expected=f"a multiple of {block * fmt.bits // 8} bytes in a row",
            found=str(count),
        )
    return codes, (rows, count * 8 // fmt.bits)


def groups_in(box: Region, block: int) -> tuple[int, int, slice]:
    """The groups that a box of a matrix touches, by first and number, and where its columns are in these."""
    first = box.start[1] // block
    begin = box.start[1] - first * block
    return first, -(-box.stop[1] // block) - first, slice(begin, begin + box.shape[1])


@dataclass(frozen=True, slots=True)
class Mx:
    """code × power of two (`dconv.codec.mx.decode`); inputs: bytes of codes, scales."""

    bits: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the whole blocks that the box touches, and cut it out."""
        codes, scales, columns = _read(box, mx.BLOCK, self.bits, read)
        return mx.decode(codes, scales, FORMATS[self.bits], dtype, factor=factor)[:, columns]


@dataclass(frozen=True, slots=True)
class Nv:
    """code × scale / the tensor's (`dconv.codec.nvfp4.decode`); inputs: bytes of codes, scales, the tensor's.

    Attributes:
        axes: that the tensor's scale has.
        divides: whether it divides, or multiplies (`dconv.coded.modelopt`).
    """

    axes: int
    divides: bool = True

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the whole blocks that the box touches, and cut it out."""
        codes, scales, columns = _read(box, nvfp4.BLOCK, E2M1.bits, read)
        whole = float(read(2, Region.whole((1,) * self.axes), "").reshape(-1)[0])
        return nvfp4.decode(codes, scales, whole, dtype, divides=self.divides, factor=factor)[:, columns]


def _read(box: Region, block: int, bits: int, read: Read) -> tuple[NDArray[np.uint8], NDArray[np.uint8], slice]:
    first, number, columns = groups_in(box, block)
    (top, _), (rows, _), size = box.start, box.shape, block * bits // 8
    codes = read(0, Region((top, first * size), (rows, number * size)), "").view(np.uint8)
    return codes, read(1, Region((top, first), (rows, number)), "").view(np.uint8), columns
