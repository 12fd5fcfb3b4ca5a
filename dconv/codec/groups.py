"""Runs along the last axis that share a scale of one byte: what the MX formats and NVFP4 have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec.cast import cast
from dconv.codec.minifloat import Minifloat, values
from dconv.codec.pack import unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Elements taken at a time, so that the temporaries stay in the processor's caches.
AT_ONCE: Final = 1 << 14


def grouped(x: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """[…, n] -> [count, size].

    Raises:
        ValueError: the last axis is not of whole groups.
    """
    if not x.ndim or x.shape[-1] % size:
        raise ValueError(f"an array of shape {x.shape} in groups of {size} along its last axis")
    return np.ascontiguousarray(x, np.float32).reshape(x.size // size, size)


def amax(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """[count] The largest magnitude of each of [count, a power of two]; NaN where there is one."""
    size = np.abs(groups).reshape(-1)
    while size.size > len(groups):  # many times as fast as a reduction of short rows
        size = np.maximum(size[0::2], size[1::2])
    return size


def pairs(fmt: Minifloat, scales: NDArray[np.float64], target: str) -> NDArray[np.generic]:
    """Products of every scale and byte of codes, each rounded once from fp64, to be looked up by scale << 8 | byte.

    Returns:
        [65536], two of 4 bits each being seen as one unsigned number of twice the size (complex for fp64); for formats
        of 6 and 8 bits [65536] of one, the byte being a code.
    """
    with np.errstate(all="ignore"):  # infinity and NaN as IEEE says
        products = cast(scales[:, None] * values(fmt), "f64", target)
    if fmt.bits > 4:
        return np.pad(products, ((0, 0), (0, 256 - products.shape[1]))).reshape(-1)
    byte = np.arange(256)
    both = np.stack([products[:, byte & 15], products[:, byte >> 4]], -1)
    return both.view({2: "<u4", 4: "<u8", 8: "<c16"}[both.itemsize]).reshape(-1)


def looked_up(
    packed: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    fmt: Minifloat,
    size: int,
    table: NDArray[np.generic],
    dtype: str,
) -> NDArray[np.generic]:
    """[…, groups · size] The elements of ``packed`` […, groups · bytes of a group] by `pairs`, as ``dtype``.

    Raises:
        ValueError: there is not one scale for each group.
    """
    wanted = (*scale.shape[:-1], (scale.shape[-1] if scale.ndim else 0) * size * fmt.bits // 8)
    if not scale.ndim or packed.shape != wanted:
        raise ValueError(f"bytes of shape {packed.shape} for scales of shape {scale.shape} of {size} elements each")
    count = scale.size
    groups, of = np.ascontiguousarray(packed).reshape(count, wanted[-1] // max(scale.shape[-1], 1)), scale.reshape(-1)
    width = size // 2 if fmt.bits == 4 else size
    out = np.empty((count, width), table.dtype)
    step = AT_ONCE // width
    for start in range(0, count, step):
        run = slice(start, start + step)
        codes = groups[run] if fmt.bits == 4 else unpack(groups[run], fmt.bits)
        index = (of[run].astype(np.uint16) << np.uint16(8))[:, None] | codes
        np.take(table, index, out=out[run], mode="clip")
    return out.view(dtype).reshape(*scale.shape[:-1], math.prod(scale.shape[-1:]) * size)
