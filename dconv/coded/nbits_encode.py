"""Weights in the codes of onnxruntime's MatMulNBits: codes and scales as derived tensors, as onnxruntime makes them.

The weight is rounded to the dtype that it would be written in before its scales are taken, as onnxruntime's quantiser
sees it; scales are in that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import nbits
from dconv.coded.encode import Coded
from dconv.coded.fp8_encode import weights_of
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a matrix [out, in] is stored.

    Attributes:
        size: columns of a block; the last one is filled up with zeros.
    """

    bits: int
    size: int = 32

    @property
    def words(self) -> str:
        """How reports call it."""
        return f"int{self.bits}, {self.size} columns with a scale (MatMulNBits)"

    @property
    def nbytes(self) -> int:
        """Bytes of a block's codes."""
        return self.size * self.bits // 8


#: ``--quant`` of FORMAT onnx -> how matrices are stored.
VARIANTS: Final[Mapping[str, Blocks]] = {"int4": Blocks(4), "int8": Blocks(8)}


@dataclass(frozen=True, slots=True)
class Codes:
    """Bytes [out, blocks, bytes of a block]; input: the weight [out, in]."""

    how: Blocks
    rounded: str
    columns: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the rows and blocks of the box whole, and cut the bytes out."""
        del dtype, factor
        weights, real = _filled(self.how, self.rounded, self.columns, box.start[:2], box.shape[:2], read)
        codes = nbits.encode(weights, self.how.bits, self.how.size, self.rounded)
        codes[..., real:] = 0  # as onnxruntime leaves what lies behind the last column
        found = nbits.pack(codes, self.how.bits).reshape(*box.shape[:2], self.how.nbytes)
        return found[..., box.start[2] : box.stop[2]]


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales [out, blocks]; input: the weight."""

    how: Blocks
    rounded: str
    columns: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Find the scales of the blocks in the box."""
        del dtype, factor
        weights, _ = _filled(self.how, self.rounded, self.columns, box.start, box.shape, read)
        return nbits.scales(weights, self.how.bits, self.how.size, self.rounded)


def _filled(
    how: Blocks, dtype: str, columns: int, start: tuple[int, ...], shape: tuple[int, ...], read: Read
) -> tuple[NDArray[np.float32], int]:
    """Rows and whole blocks of the weight, and how many of their columns it has."""
    (row, block), (rows, blocks) = start, shape
    first = block * how.size
    real = min((block + blocks) * how.size, columns) - first
    weights = weights_of(read, Region((row, first), (rows, real)), dtype)
    return np.pad(weights, ((0, 0), (0, blocks * how.size - real))), real


def code(name: str, dense: Array, how: Blocks, dtype: str) -> Coded:
    """Codes u8 [out, blocks, bytes] and scales [out, blocks] of a weight [out, in].

    Args:
        name: of the weight; codes end in ``_Q4``, scales in ``_scales``, as onnxruntime's quantiser calls them.
        dense: where it is.
        how: bits and columns of a block.
        dtype: it is rounded to this before, and its scales are in it.
    """
    rows, columns = dense.shape
    blocks = -(-columns // how.size)
    bits = 8 * ITEMSIZE[dense.dtype]
    codes = TensorSpec(f"{name}_Q{how.bits}", (rows, blocks, how.nbytes), "u8")
    scale = TensorSpec(f"{name}_scales", (rows, blocks), dtype)
    made = Coded()
    said = How(f"rounded once to int{how.bits} by the farthest of {how.size} columns", False, bits * 8 / how.bits)
    made.make(codes, Derived(codes.shape, (dense,), Codes(how, dtype, columns), said, 8 // how.bits))
    said = How("the farthest of its columns", False, bits * how.size)
    made.make(scale, Derived(scale.shape, (dense,), Scales(how, dtype, columns), said, how.size))
    return made
