"""Scales as compressed-tensors computes them from a weight: each step is rounded to the weight's own dtype.

Source: compressed-tensors 0.20.0, ``calculate_qparams`` and ``_quantize``; torch takes a step on bf16 or fp16 in fp32
and rounds its result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec.cast import cast

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What stands for a scale of zero: the distance from 1 to the next number.
_EPS: Final = {"f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10}
DTYPES: Final = tuple(_EPS)
#: The smallest normal numbers.
TINY: Final = {"f32": 2.0**-126, "bf16": 2.0**-126, "f16": 2.0**-14}


def own(dtype: str) -> str:
    """The dtype that a weight's steps are rounded to; one in fp64 is taken in fp32."""
    return dtype if dtype in _EPS else "f32"


def scale(amax: NDArray[np.float32], largest: float, dtype: str) -> NDArray[np.float32]:
    """[…] amax / largest, and `_EPS` where that is zero; the numbers are those of ``dtype``.

    Args:
        amax: finite, of weights in ``dtype``.
        largest: the format's.
        dtype: f32, f16 or bf16: to its numbers each step is rounded.
    """
    found = divided(amax, np.float32(largest), dtype)
    found[found == 0] = _EPS[dtype]
    return found


def divided(x: NDArray[np.float32], by: NDArray[np.float32] | np.float32, dtype: str) -> NDArray[np.float32]:
    """[…] x / by, both being numbers of ``dtype`` as the result is; -0.0 is 0.0, as after adding a zero point of 0."""
    with np.errstate(all="ignore"):  # infinity and NaN as IEEE says
        return rounded(x / by, dtype) + np.float32(0)


def rounded(x: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """[…] The nearest numbers of ``dtype``, as fp32."""
    return x if dtype == "f32" else cast(cast(x, "f32", dtype), dtype, "f32").view(np.float32)
