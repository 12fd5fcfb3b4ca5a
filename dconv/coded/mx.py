"""MX weights in their codes: 32 neighbours of a row share a power of two (`dconv.codec.mx`).

The codes of a row [in] are bytes side by side [in · bits / 8], or gpt-oss's blocks [in / 32, 16]; its scales are
[in / 32] bytes of E8M0. Axes before them, experts and rows, are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Final

from dconv.codec import mx
from dconv.codec.minifloat import Minifloat
from dconv.errors import Refused
from dconv.sharding.derived import Array, Derived, Read, steps
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Piece

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: How the dtypes of scales may be called: bytes, or by what they are.
SCALES: Final = ("u8", "f8_e8m0")


def width(fmt: Minifloat) -> int:
    """Bytes of a block's codes."""
    return mx.BLOCK * fmt.bits // 8


@dataclass(frozen=True, slots=True)
class Decode:
    """code × scale; inputs: codes, scales.

    Attributes:
        blocked: the codes of a block are an axis of their own.
    """

    fmt: Minifloat
    blocked: bool = False

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the whole blocks that the box touches, and cut it out."""
        first, last = box.start[-1] // mx.BLOCK, -(-box.stop[-1] // mx.BLOCK)
        touched = Region((*box.start[:-1], first), (*box.shape[:-1], last - first))
        each = width(self.fmt)
        if self.blocked:
            place = Region((*touched.start, 0), (*touched.shape, each))
        else:
            place = Region((*box.start[:-1], first * each), (*box.shape[:-1], (last - first) * each))
        codes = read(0, place, "").view("u1").reshape(*box.shape[:-1], (last - first) * each)
        values = mx.decode(codes, read(1, touched, "").view("u1"), self.fmt, dtype, factor=factor)
        from_block = box.start[-1] - first * mx.BLOCK
        return values[..., from_block : from_block + box.shape[-1]]


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight's codes; input: the weight [..., out, in].

    Attributes:
        blocked: as of `Decode`.
        pairs: the weight is [..., out / 2, 2, in].
    """

    fmt: Minifloat
    rule: mx.Rule
    blocked: bool = False
    pairs: bool = False

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the whole blocks whose bytes the box touches, and cut it out."""
        del dtype, factor
        each = width(self.fmt)
        if self.blocked:
            codes, _ = _encode(self, read, Region(box.start[:-1], box.shape[:-1]))
            cut = slice(box.start[-1], box.stop[-1])
            return codes.reshape(*box.shape[:-1], each)[..., cut]
        first, last = box.start[-1] // each, -(-box.stop[-1] // each)
        codes, _ = _encode(self, read, Region((*box.start[:-1], first), (*box.shape[:-1], last - first)))
        return codes[..., box.start[-1] - first * each : box.stop[-1] - first * each]


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales that belong to `Codes`; input and attributes are the same."""

    fmt: Minifloat
    rule: mx.Rule
    pairs: bool = False

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Find the scales of the blocks in the box."""
        del dtype, factor
        return mx.scales(_weights(read, box, self.pairs), self.fmt, self.rule)


def _encode(how: Codes, read: Read, groups: Region) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return mx.encode(_weights(read, groups, how.pairs), how.fmt, how.rule)


def _weights(read: Read, groups: Region, pairs: bool) -> NDArray[np.float32]:
    """The weights [..., out, in] of a box in the scales' coordinates."""
    start = (*groups.start[:-1], groups.start[-1] * mx.BLOCK)
    shape = (*groups.shape[:-1], groups.shape[-1] * mx.BLOCK)
    if not pairs:
        return read(0, Region(start, shape), "f32").view("<f4")
    low, high = start[-2] // 2, -(-(start[-2] + shape[-2]) // 2)
    region = Region((*start[:-2], low, 0, start[-1]), (*shape[:-2], high - low, 2, shape[-1]))
    rows = read(0, region, "f32").view("<f4").reshape(*shape[:-2], 2 * (high - low), shape[-1])
    skipped = start[-2] - 2 * low
    return rows[..., skipped : skipped + shape[-2], :]


def encoded(
    dense: Array, shape: Index, fmt: Minifloat, rule: mx.Rule, *, blocked: bool = False, pairs: bool = False
) -> tuple[Derived, Derived]:
    """Codes and scales of a weight of this shape [..., out, in].

    Args:
        dense: the weight, with ``pairs`` [..., out / 2, 2, in].
        shape: of the weight.
        fmt: the format of the codes.
        rule: how a block's scale is found (`dconv.codec.mx.encode`).
        blocked: as of `Decode`.
        pairs: as of `Codes`.

    Raises:
        Refused: the rows are not of whole blocks.
    """
    if shape[-1] % mx.BLOCK:
        raise Refused(
            "a linear layer's rows are not of whole MX blocks, nothing was written",
            where=dense.pieces[0].tensor,
            expected=f"in-features divisible by {mx.BLOCK}",
            found=str(shape[-1]),
        )
    groups, each, bits = shape[-1] // mx.BLOCK, width(fmt), 8 * ITEMSIZE[dense.dtype]
    rounded = f"rounded once to {fmt.name}, {mx.BLOCK} with one power of two"
    codes = Derived(
        (*shape[:-1], groups, each) if blocked else (*shape[:-1], groups * each),
        (dense,),
        Codes(fmt, rule, blocked, pairs),
        How(rounded, exact=False, bits=bits * 8 / fmt.bits),
        cost=ceil(8 / fmt.bits),
        across=1 + blocked,
    )
    how = How(f"a power of two for {mx.BLOCK} elements by {rule}", exact=False, bits=bits * mx.BLOCK)
    scales = Derived((*shape[:-1], groups), (dense,), Scales(fmt, rule, pairs), how, cost=mx.BLOCK, across=1)
    return codes, scales


def kept(
    dense: Array, made_of: Mapping[str, Derived], recipe: Decode
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]] | None:
    """Where a source has this very weight's codes and scales, as bytes; None where it is not decoded from such.

    Args:
        dense: the weight, its axes in the order of its rows.
        made_of: what the source's derived tensors are.
        recipe: what would decode the codes that are wanted.
    """
    if len(dense.pieces) != 1 or dense.twins:
        return None
    piece = dense.pieces[0]
    source = made_of.get(piece.file)
    if source is None or source.recipe != recipe or prod(source.shape) != prod(dense.shape):
        return None
    as_it_is = (piece.offset, piece.factor, piece.strides) == (0, 1.0, steps(dense.shape))
    codes, scales = (tuple(replace(piece, dtype="u8") for piece in array.pieces) for array in source.inputs)
    return (codes, scales) if as_it_is else None
