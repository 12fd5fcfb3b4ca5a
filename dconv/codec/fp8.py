"""FP8 with a scale for every block of the last two axes; per tensor and per channel are blocks of other sizes.

Source of the encoding: transformers 5.23, integrations/finegrained_fp8.py, ``Fp8Quantize``, which it equals bit by bit
where that is finite. The stored scale (``weight_scale_inv``) multiplies: w = code × scale.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import e8m0
from dconv.codec.cast import cast
from dconv.codec.minifloat import E4M3, Minifloat, nearest, values
from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_F32: Final = np.finfo(np.float32)
#: A block's 256 products are tabulated where it has more elements than this, else each element is multiplied.
_WORTH_A_TABLE: Final = 1 << 9
#: Elements multiplied at a time, so that their fp64 copies stay in the processor's caches.
_AT_ONCE: Final = 1 << 13


def amax(x: NDArray[np.float32], block: tuple[int, int]) -> NDArray[np.float32]:
    """[…, ceil(rows / m), ceil(cols / n)] The largest finite magnitude in each block of […, rows, cols]."""
    block = _within(x, block)
    if not x.size:
        return np.zeros(_grid(x.shape, block), np.float32)
    found = _largest(x, block)
    return found if np.isfinite(found).all() else _largest(np.where(np.isfinite(x), x, np.float32(0)), block)


def scales(
    largest: NDArray[np.float32], target: Minifloat = E4M3, *, power_of_two: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[…] Of blocks with these finite ``amax``: what a weight is multiplied by, and its reciprocal, which is stored.

    The multiplier is (1 / amax) · target.largest, both steps rounded to fp32 (which is what torch's number / tensor
    is), and 1 where amax is zero. Where that passes fp32's range (amax below 1.4e-36 for E4M3) the largest fp32 number
    stands for it, so that no scale is zero.

    Args:
        largest: `amax` of the blocks, finite, of any shape.
        target: the format of the codes.
        power_of_two: the stored scale is rounded up to a power of two, 2^-126 or more ("ue8m0"), by way of a logarithm
            in fp32: one that is larger by less than that can tell is rounded down, and the block's largest saturate.
            The multiplier is its reciprocal.
    """
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        multiplier = np.minimum(np.float32(1) / largest * np.float32(target.largest), _F32.max)
        multiplier[largest == 0] = 1
        stored = np.divide(1, multiplier, dtype=np.float32)
    if power_of_two:
        log = np.log2(np.maximum(stored, _F32.tiny).astype(np.float64)).astype(np.float32)
        exponent = np.ceil(log).astype(np.int32)
        stored, multiplier = (np.ldexp(1.0, by).astype(np.float32) for by in (exponent, -exponent))
    return multiplier, stored


def encode(
    x: NDArray[np.float32],
    block: tuple[int, int],
    target: Minifloat = E4M3,
    *,
    power_of_two: bool = False,
    largest: NDArray[np.float32] | None = None,
    row0: int = 0,
    col0: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes of ``x``, and the scales that multiply them; `dconv.codec.minifloat.error_bound` of both bounds the error.

    See `scales`. A NaN stays NaN, an infinity becomes the format's, or NaN where it has none; neither changes the rest
    of its block.

    Args:
        x: […, rows, cols].
        block: (m, n); blocks at the edges count as padded with zeros.
        target: the format of the codes.
        power_of_two: see `scales`.
        largest: `amax` of the blocks that ``x`` touches, where they reach beyond it: a channel or tensor in parts.
        row0: with ``largest``, the row in its block where ``x`` begins.
        col0: with ``largest``, the column in its block where ``x`` begins.

    Returns:
        codes […, rows, cols], one a byte; scale […, ceil(rows / m), ceil(cols / n)], or in the shape of ``largest``.

    Raises:
        ValueError: fewer than two axes, a block of no size, or ``largest`` is not of the blocks touched.
    """
    if largest is None:
        if row0 or col0:
            raise ValueError("a part of a block is coded by the whole block's amax")
        largest, block = amax(x, block), _within(x, block)
    tops, lefts = _touched(x.shape, largest.shape, block, (row0, col0))
    multiplier, stored = scales(largest, target, power_of_two=power_of_two)
    codes = np.empty(x.shape, np.uint8)
    if not x.size:
        return codes, stored
    cols, widths = x.shape[-1], np.diff(lefts)
    heights = np.tile(np.diff(tops), math.prod(x.shape[:-2]))
    flat, found, grid = x.reshape(-1, cols), codes.reshape(-1, cols), multiplier.reshape(-1, widths.size)
    with np.errstate(under="ignore", over="ignore", invalid="ignore"):
        for part, of in _pieces(heights, cols):
            found[part] = nearest(target, flat[part] * np.repeat(grid[of], widths, -1), saturate=False)
    return codes, stored


def decode(
    codes: NDArray[np.uint8],
    scale: NDArray[np.generic],
    block: tuple[int, int],
    target: str,
    *,
    fmt: Minifloat = E4M3,
    factor: float = 1.0,
    row0: int = 0,
    col0: int = 0,
    reciprocal: bool = False,
) -> NDArray[np.generic]:
    """Code × scale × factor in ``carrier(target)``: multiplied in fp64, where code × scale is exact, and rounded once.

    Args:
        codes: […, rows, cols].
        scale: of the blocks that the codes touch, with the codes' leading axes: floats, bf16 patterns (``<u2``) or E8M0
            bytes (``u1``).
        block: (m, n).
        target: f64, f32, f16 or bf16.
        fmt: the format of the codes.
        factor: multiplies every weight.
        row0: the row in its block where the codes begin.
        col0: the column in its block where the codes begin.
        reciprocal: the scale divides instead, as GPTQModel 7.7 stores it under the same name.

    Raises:
        ValueError: the scales are not those of the blocks touched, or ``row0``, ``col0`` lie beyond the first block.
    """
    tops, lefts = _touched(codes.shape, scale.shape, block, (row0, col0))
    out = np.empty(codes.shape, carrier(target))
    with np.errstate(all="ignore"):  # infinity and NaN as IEEE says
        grid = _numbers(scale)
        grid = factor / grid if reciprocal else grid * factor
        if codes.size:
            fill = _by_table if codes.size > grid.size * _WORTH_A_TABLE else _by_element
            fill(codes, grid, (tops, lefts), fmt, out, target)
    return out


def _within(array: NDArray[np.generic], block: tuple[int, int]) -> tuple[int, int]:
    """The block, no larger than the array."""
    if array.ndim < 2 or min(block) < 1:
        raise ValueError(f"blocks of {block} in an array of shape {array.shape}")
    return min(block[0], max(array.shape[-2], 1)), min(block[1], max(array.shape[-1], 1))


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def _largest(x: NDArray[np.float32], block: tuple[int, int]) -> NDArray[np.float32]:
    """[…, ceil(rows / m), ceil(cols / n)] The largest magnitude of each block; NaN where there is one."""
    if block[0] == 1:
        return _runs(np.maximum, np.abs(x), block[1], -1)
    above, below = (_runs(extreme, x, block[0], -2) for extreme in (np.maximum, np.minimum))
    return _runs(np.maximum, np.maximum(np.abs(above), np.abs(below)), block[1], -1)


def _runs(extreme: np.ufunc, x: NDArray[np.float32], length: int, axis: int) -> NDArray[np.float32]:
    """The extremes of runs of ``length`` along one of the last two axes; the last run may be shorter."""
    count = x.shape[axis] // length
    whole, rest = np.split(x, [count * length], axis)
    after = x.shape[x.ndim + axis + 1 :]
    found = extreme.reduce(whole.reshape(*x.shape[:axis], count, length, *after), axis)
    return np.concatenate([found, extreme.reduce(rest, axis, keepdims=True)], axis) if rest.shape[axis] else found


def _touched(
    shape: tuple[int, ...], given: tuple[int, ...], block: tuple[int, int], first: tuple[int, int]
) -> tuple[list[int], list[int]]:
    """Where the blocks that an array touches begin and end, in its rows and in its columns."""
    if len(shape) < 2 or not all(0 <= at < of for at, of in zip(first, block, strict=True)):
        raise ValueError(f"an array of shape {shape} that begins at {first} of blocks of {block}")
    tops, lefts = (
        [0, *range(of - at, length, of), length] if length else [0]
        for length, of, at in zip(shape[-2:], block, first, strict=True)
    )
    if given != (wanted := (*shape[:-2], len(tops) - 1, len(lefts) - 1)):
        raise ValueError(f"scales of shape {given} for blocks of shape {wanted}")
    return tops, lefts


def _numbers(scale: NDArray[np.generic]) -> NDArray[np.float64]:
    if scale.dtype == np.uint8:
        return e8m0.from_bytes(scale.view(np.uint8))
    return (cast(scale, "bf16", "f32") if scale.dtype == np.uint16 else scale).astype(np.float64)


def _by_table(
    codes: NDArray[np.uint8],
    grid: NDArray[np.float64],
    cuts: tuple[list[int], list[int]],
    fmt: Minifloat,
    out: NDArray[np.generic],
    target: str,
) -> None:
    products = cast(values(fmt) * grid[..., None], "f64", target)
    for lead in np.ndindex(codes.shape[:-2]):
        for i, (top, bottom) in enumerate(pairwise(cuts[0])):
            for j, (left, right) in enumerate(pairwise(cuts[1])):
                box = (*lead, slice(top, bottom), slice(left, right))
                out[box] = np.take(products[(*lead, i, j)], codes[box])


def _by_element(
    codes: NDArray[np.uint8],
    grid: NDArray[np.float64],
    cuts: tuple[list[int], list[int]],
    fmt: Minifloat,
    out: NDArray[np.generic],
    target: str,
) -> None:
    cols, widths = codes.shape[-1], np.diff(cuts[1])
    heights = np.tile(np.diff(cuts[0]), math.prod(codes.shape[:-2]))
    flat, found, grid = codes.reshape(-1, cols), out.reshape(-1, cols), grid.reshape(-1, widths.size)
    for rows, of in _pieces(heights, cols):
        products = np.take(values(fmt), flat[rows]) * np.repeat(grid[of], widths, -1)
        found[rows] = cast(products, "f64", target)


def _pieces(heights: NDArray[np.intp], cols: int) -> Iterator[tuple[slice, NDArray[np.intp] | slice]]:
    """Runs of rows, the blocks having these heights, with each row's block: a slice of one where it is one for all."""
    block = np.repeat(np.arange(heights.size), heights)
    step = max(1, _AT_ONCE // cols)
    for start in range(0, block.size, step):
        of = block[start : start + step]
        yield slice(start, start + of.size), slice(of[0], of[0] + 1) if of[0] == of[-1] else of
