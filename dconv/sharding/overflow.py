"""A number that was finite stays finite: weights past the range of their new dtype are refused by name.

Weights of models trained in bf16 pass fp16's 65504, and infinity in their place ruins the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.errors import Refused
from dconv.sharding.ops import MOVE, Cast, Kernel, Op, Scale
from dconv.sharding.plan import Copy, TargetTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Floating dtype -> its largest number, its name, and what to do about larger ones.
_RANGES: Final = {
    "f16": ("65504", "fp16", "--dtype bf16 or f32 holds them"),
    "bf16": ("3.3895e38", "bf16", "--dtype f32 holds larger ones"),
    "f32": ("3.4028e38", "fp32", "leave --dtype out: what is stored keeps its own"),
}
#: The same -> the bits of its magnitude, and those of infinity.
_BITS: Final = {"f16": (0x7FFF, 0x7C00), "bf16": (0x7FFF, 0x7F80), "f32": (0x7FFFFFFF, 0x7F800000)}


def check_range(
    made: NDArray[np.generic], raw: NDArray[np.generic], copy: Copy, tensor: TargetTensor, kernel: Kernel
) -> None:
    """Look at a box of a target tensor.

    Args:
        made: its elements, in the carrier of the tensor's dtype.
        raw: those that they were made of, in the carrier of ``copy.dtype``; the same shape.
        copy: where they come from, and by which op.
        tensor: what they are part of.
        kernel: applies numeric ops.

    Raises:
        Refused: a number became infinite.
    """
    dtype = tensor.spec.dtype
    if not _may_overflow(copy.op, dtype):
        return
    infinite = _infinite(made, dtype)
    if not infinite.any():
        return
    if isinstance(copy.op, Cast | Scale):
        infinite &= np.isfinite(kernel(Cast(copy.dtype, "f64"), raw))
    if count := np.count_nonzero(infinite):
        largest, words, do = _RANGES[dtype]
        raise Refused(
            f"weights are past the range of {words} and would become infinite, the output was removed",
            where=next(s.tensor for s in tensor.slots if s.stored.intersect(copy.region) is not None),
            expected=f"magnitudes of {largest} at most",
            found=f"{count} larger ones, in one stretch of it",
            do=do,
        )


def _may_overflow(op: Op, dtype: str) -> bool:
    """Whether finite numbers may become infinite; what codes and scales say in bf16 or fp32 is theirs to say."""
    if op is MOVE or dtype not in _RANGES:
        return False
    return dtype == "f16" or isinstance(op, Scale) or (isinstance(op, Cast) and not op.exact)


def _infinite(values: NDArray[np.generic], dtype: str) -> NDArray[np.bool_]:
    """Where they are infinite, by their bits: numpy's ``isinf`` of fp16 takes as long as a cast."""
    magnitude, infinity = _BITS[dtype]
    return (values.view(f"<u{values.itemsize}") & magnitude) == infinity
