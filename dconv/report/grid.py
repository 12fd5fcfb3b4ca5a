"""Weights rounded to the nearest whole number of a step that a group of columns shares: int4 without calibration.

Sources: GPTQ's ``Quantizer.find_params`` and compressed-tensors' ``calculate_qparams``, which agree; AutoAWQ's
``pseudo_quantize_tensor`` is the one with zero points. Scales are rounded to fp16, as they are stored, and codes chosen
with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: fp16's smallest number: what stands for a scale that would be zero.
_TINIEST: Final = 2.0**-24


def nearest(x: NDArray[np.float64], bits: int, group: int, *, symmetric: bool) -> NDArray[np.float64]:
    """[rows, columns] What the weights are worth after it; infinite or no number where a group has such a weight.

    Args:
        x: [rows, columns] weights.
        bits: of a code.
        group: columns that share a scale, of which there are whole ones.
        symmetric: zero is code 2^(bits - 1), and the step 2 largest / (2^bits - 1); else the codes span 0 and all
            weights, and zero is one of them.
    """
    top = (1 << bits) - 1
    groups = x.reshape(x.shape[0], -1, group)
    high, low = np.maximum(groups.max(-1, keepdims=True), 0), np.minimum(groups.min(-1, keepdims=True), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    with np.errstate(all="ignore"):  # infinity and NaN are counted by whoever measures
        scale = np.maximum(((high - low) / top).astype(np.float16).astype(np.float64), _TINIEST)
        zero = 1 << (bits - 1) if symmetric else np.clip(np.rint(-low / scale), 0, top)
        return ((np.clip(np.rint(groups / scale) + zero, 0, top) - zero) * scale).reshape(x.shape)
