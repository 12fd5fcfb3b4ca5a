"""NVFP4: E2M1 codes, two a byte, a scale in E4M3 for every 16 along the last axis, and one in fp32 for the tensor.

compressed-tensors stores what the scales were multiplied by (``weight_global_scale``: w = code × scale / global),
NVIDIA's ModelOpt what they are to be multiplied by (``weight_scale_2``). Source of the encoding: compressed-tensors
0.20.0, ``generate_gparam`` and ``calculate_qparams``, which it equals bit by bit where ``dtype`` and
``positive_zeros`` say so; else a bf16 weight is taken in fp32, and zeros keep their sign.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import groups
from dconv.codec.minifloat import E2M1, E4M3, nearest, values
from dconv.codec.pack import pack
from dconv.codec.qparams import TINY, rounded
from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK: Final = 16
#: Codes of scales: 0.125, for a block whose own rounds to zero, and NaN.
_NONE: Final = 0x20
_NAN: Final = 0x7F


def global_scale(amax: float, dtype: str = "f32") -> np.float32:
    """The divisor of a tensor, or of fused ones as one, by the largest finite magnitude: (1 / amax) · 2688 in fp32.

    1 where that is not finite, which is for amax below 7.9e-36; ModelOpt's ``weight_scale_2`` is the reciprocal.
    fp16 does not hold it for amax below 0.041: it is then taken in fp32, where compressed-tensors has 1, by which all
    weights below 0.005 would become zero.

    Args:
        amax: the largest finite magnitude, 0 or more.
        dtype: of the weights, to which each step is rounded where it holds the divisor.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        largest = np.full(1, max(amax, TINY[dtype]), np.float32)
        reciprocal = rounded(np.reciprocal(largest), dtype)
        found = rounded(reciprocal * np.float32(2688), dtype)[0]
    if np.isfinite(found) and found > 0:
        return found
    return np.float32(1) if dtype == "f32" else global_scale(amax)


def encode(
    x: NDArray[np.float32], divisor: np.float32, dtype: str = "f32", *, positive_zeros: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Packed codes and E4M3 scales, by `global_scale`.

    A block's scale is amax / 6 · divisor rounded to E4M3, and 0.125 where that is zero. A block with a NaN or an
    infinity has scale NaN. `dconv.codec.minifloat.error_bound` of E2M1 and scale / divisor bounds the error.

    Args:
        x: […, n].
        divisor: what `global_scale` gives for the tensor.
        dtype: of the weights, to which amax / 6 is rounded.
        positive_zeros: -0.0 and what scaling makes it become 0.0, as compressed-tensors has it; else they stay.

    Returns:
        packed […, n / 2]; scale […, n / 16].

    Raises:
        ValueError: n is not a multiple of 16.
    """
    blocks = groups.grouped(x, BLOCK)
    packed, scale = np.empty((len(blocks), BLOCK // 2), np.uint8), np.empty(len(blocks), np.uint8)
    step, plus = groups.AT_ONCE // BLOCK, np.float32(0.0 if positive_zeros else -0.0)
    for start in range(0, len(blocks), step):
        run = slice(start, start + step)
        part = blocks[run]
        codes = _scales(groups.amax(part), divisor, dtype)
        with np.errstate(all="ignore"):
            unit = values(E4M3)[codes].astype(np.float32) / divisor
            packed[run] = pack(nearest(E2M1, np.divide(part, unit[:, None], dtype=np.float32) + plus), E2M1.bits)
        scale[run] = codes
    lead = x.shape[:-1]
    return packed.reshape(*lead, x.shape[-1] // 2), scale.reshape(*lead, x.shape[-1] // BLOCK)


def scales(x: NDArray[np.float32], divisor: np.float32, dtype: str = "f32") -> NDArray[np.uint8]:
    """[…, n / 16] The scales of `encode` alone, many times as fast."""
    blocks = groups.grouped(x, BLOCK)
    found, step = np.empty(len(blocks), np.uint8), groups.AT_ONCE // BLOCK
    for start in range(0, len(blocks), step):
        found[start : start + step] = _scales(groups.amax(blocks[start : start + step]), divisor, dtype)
    return found.reshape(*x.shape[:-1], x.shape[-1] // BLOCK)


def _scales(amax: NDArray[np.float32], divisor: np.float32, dtype: str) -> NDArray[np.uint8]:
    with np.errstate(all="ignore"):
        codes = nearest(E4M3, rounded(amax / np.float32(6), dtype) * divisor)
    codes[codes == 0] = _NONE
    codes[~np.isfinite(amax)] = _NAN
    return codes


def decode(
    packed: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    whole: float,
    target: str,
    *,
    divides: bool,
    factor: float = 1.0,
) -> NDArray[np.generic]:
    """[…, n] code × scale × factor, by the tensor's scale, in ``carrier(target)``: taken in fp64 and rounded once.

    Args:
        packed: […, n / 2].
        scale: […, n / 16], E4M3.
        whole: the tensor's scale.
        target: f64, f32, f16 or bf16.
        divides: as compressed-tensors' ``weight_global_scale`` does; ModelOpt's ``weight_scale_2`` multiplies.
        factor: multiplies every weight.

    Raises:
        ValueError: there is not one scale for each 16 elements.
    """
    table = _table(float(whole), divides, target, factor)
    return groups.looked_up(packed, scale, E2M1, BLOCK, table, carrier(target))


@lru_cache(maxsize=8)
def _table(whole: float, divides: bool, target: str, factor: float) -> NDArray[np.generic]:
    with np.errstate(all="ignore"):  # infinity and NaN as IEEE says
        by = np.float64(factor) / whole if divides else np.float64(factor) * whole
        return groups.pairs(E2M1, values(E4M3) * by, target)
