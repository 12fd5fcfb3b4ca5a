"""Integer codes → weights: W[o, i] = (codes[o, i] - zeros[o, g(i)]) × scales[o, g(i)] × factor, rounded once.

One form for GPTQ, AWQ and compressed-tensors, whose containers the neighbouring files unpack.

Error: the difference is a whole number of 8 bits and a sign, or ±256, so that its product with a scale of at most 24
bits is exact in fp64, and in fp32 for fp16 and bf16 scales. With ``factor`` 1 the result is therefore the correctly
rounded one (half a unit in the last place). Another ``factor`` adds one rounding to fp64, 2^-53 of the value, as
`dconv.sharding.ops.Scale` has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec.cast import cast
from dconv.errors import Damaged
from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SCALES: Final = ("f32", "f16", "bf16")
TARGETS: Final = ("f32", "bf16", "f16", "f64")

#: Elements taken at a time, in whole rows: their temporaries stay in the processor's caches.
_AT_ONCE: Final = 1 << 15


def groups_of(columns: int, size: int, start: int = 0) -> NDArray[np.int32]:
    """The group of each of ``columns`` columns from ``start`` on, where a group has ``size`` of them."""
    return (np.arange(start, start + columns) // size).astype(np.int32)


def decode(
    codes: NDArray[np.uint8],
    scales: NDArray[np.generic],
    zeros: NDArray[np.generic] | int,
    groups: NDArray[np.integer],
    *,
    source: str,
    target: str,
    bits: int = 8,
    factor: float = 1.0,
) -> NDArray[np.generic]:
    """Weights [out, in], in ``carrier(target)``.

    Args:
        codes: u1 [out, in], below ``2**bits``.
        scales: [out, groups], in ``carrier(source)``.
        zeros: whole numbers of 0 to ``2**bits``, [out, groups]; or one for all (a symmetric weight).
        groups: [in], the column of ``scales`` that belongs to each column of ``codes``: `groups_of`, or a ``g_idx``.
        source: what the scales are in, one of `SCALES`.
        target: one of `TARGETS`.
        bits: of a code; a smaller number is quicker.
        factor: multiplies every weight.

    Raises:
        Damaged: a group that ``scales`` lacks.
    """
    if source not in SCALES or target not in TARGETS:
        raise ValueError(f"{source} scales to {target}")
    if bits < 8 and codes.size and int(codes.max()) >> bits:
        raise ValueError(f"not codes of {bits} bits")
    out = np.empty(codes.shape, carrier(target))
    if not out.size:
        return out
    _check_groups(groups, scales.shape[1])
    offsets = np.broadcast_to(np.asarray(zeros), scales.shape)
    narrow = factor == 1.0 and target != "f64" and (target == "f32" or source != "f32")
    wide = "f32" if narrow else "f64"
    every = np.arange(1 << bits, dtype=np.uint8)
    for columns, width in _runs(groups):
        which = groups[columns][::width]
        for rows in _rows(codes.shape[0], which.size * width):
            multiplier = cast(scales[rows][:, which], source, wide)[..., None]
            offset = offsets[rows][:, which].astype(carrier(wide))[..., None]
            code = codes[rows, columns].reshape(*multiplier.shape[:2], width)
            if wide != target and 2 << bits <= width:  # fewer products than codes
                found = _looked_up(cast(_product(every, offset, multiplier, factor), wide, target), code)
            else:
                found = cast(_product(code, offset, multiplier, factor), wide, target)
            out[rows, columns] = found.reshape(multiplier.shape[0], -1)
    return out


def _check_groups(groups: NDArray[np.integer], count: int) -> None:
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise Damaged(
            "a column belongs to a group that has no scale",
            expected=f"groups 0 to {count - 1}",
            found=str(low if low < 0 else high),
        )


def _runs(groups: NDArray[np.integer]) -> Iterator[tuple[slice, int]]:
    """Columns whose neighbours share a group, and how many do: all but a short last group; else each by itself."""
    change = np.flatnonzero(groups != groups[0])
    width = int(change[0]) if change.size else groups.size
    whole = groups.size // width * width
    body = groups[:whole].reshape(-1, width)
    tail = groups[whole:]
    if (body != body[:, :1]).any() or (tail != tail[:1]).any():
        yield slice(0, groups.size), 1
        return
    yield slice(0, whole), width
    if tail.size:
        yield slice(whole, groups.size), tail.size


def _rows(count: int, columns: int) -> Iterator[slice]:
    step = max(_AT_ONCE // columns, 1)
    return (slice(start, start + step) for start in range(0, count, step))


def _product(
    codes: NDArray[np.uint8], offset: NDArray[np.generic], multiplier: NDArray[np.generic], factor: float
) -> NDArray[np.generic]:
    """Codes [..., width], or every code there is, against offset and multiplier [..., 1]; in the type of these."""
    found = np.subtract(codes, offset, dtype=offset.dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # infinity and NaN as IEEE says
        found *= multiplier
        if factor != 1.0:
            found *= found.dtype.type(factor)
    return found


def _looked_up(table: NDArray[np.generic], codes: NDArray[np.uint8]) -> NDArray[np.generic]:
    """``table`` [rows, groups, codes there are], ``codes`` [rows, groups, width]."""
    size: int = table.shape[-1]
    first = np.arange(0, table.size, size).reshape(*table.shape[:-1], 1)
    return np.take(table.reshape(-1), codes + first, mode="wrap")
