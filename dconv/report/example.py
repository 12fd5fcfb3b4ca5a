"""One weight of the model, followed by hand: from the codes to the number, or from the number to a code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import fp8
from dconv.codec.minifloat import E4M3, Minifloat, values
from dconv.report.cost import Part
from dconv.report.meanings import Meaning
from dconv.report.usage import half_steps
from dconv.sharding.region import Index, Region

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK: Final = (128, 128)


@dataclass(frozen=True)
class Example:
    """A weight as it is stored.

    Attributes:
        index: the element.
        code: as stored, ``value`` what it is worth in ``format``.
        block, blocks: where its scale is among the stored ones, and how many there are along each axis.
        scale_tensor, scale: the stored scale; ``divides`` where it is a reciprocal.
        weight: what the two make.
        step: from here to the next larger number that the format has, with this scale.
        holds: the largest weight that this scale allows.
    """

    tensor: str
    index: Index
    code: int
    format: str
    value: float
    block: Index
    blocks: Index
    scale_tensor: str
    scale: float
    divides: bool
    weight: float
    step: float
    holds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


@dataclass(frozen=True)
class Made:
    """A weight that is not in codes, and what block FP8 would make of it.

    Attributes:
        block: of 128 x 128 weights; ``largest`` is the largest magnitude in it.
        scale: largest / 448.
        decoded: code x scale.
    """

    tensor: str
    index: Index
    weight: float
    block: Index
    largest: float
    scale: float
    code: int
    value: float
    decoded: float
    step: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def stored(
    meaning: Meaning,
    names: tuple[str, ...],
    region: Region,
    codes: NDArray[np.uint8],
    multipliers: NDArray[np.float64],
) -> Example | None:
    """The first telling weight of a box: a normal number that has some mantissa, else any that is not zero.

    Args:
        meaning: of the codes.
        names: of the codes and of the scales.
        region: the box, in the weight.
        codes: [rows, columns] of it.
        multipliers: what multiplies each code's value, of the same shape.
    """
    at = _telling(meaning.fmt, codes)
    if at is None:
        return None
    code, by = int(codes[at]), float(multipliers[at])
    index = (*region.start[:-2], region.start[-2] + at[0], region.start[-1] + at[1])
    value = float(values(meaning.fmt)[code])
    with np.errstate(all="ignore"):
        scale = float(np.float32(1 / np.float64(by))) if meaning.divides else by
    return Example(
        tensor=names[0],
        index=index,
        code=code,
        format=meaning.fmt.name,
        value=value,
        block=meaning.block_of(index),
        blocks=meaning.blocks,
        scale_tensor=names[1],
        scale=scale,
        divides=meaning.divides,
        weight=value * by,
        step=2 * float(half_steps(meaning.fmt)[code]) * by,
        holds=meaning.fmt.largest * by,
    )


def made(part: Part, start: Index) -> Made | None:
    """What block FP8 makes of the first telling weight of a box that begins at ``start``, a block's corner."""
    weights = part.values[: _BLOCK[0], : _BLOCK[1]].astype(np.float32)
    codes, scale = fp8.encode(weights, _BLOCK)
    at = _telling(E4M3, codes)
    if at is None:
        return None
    code, by = int(codes[at]), float(scale[0, 0])
    value = float(values(E4M3)[code])
    return Made(
        tensor=part.name,
        index=(*start[:-2], start[-2] + at[0], start[-1] + at[1]),
        weight=float(weights[at]),
        block=(*start[:-2], start[-2] // _BLOCK[0], start[-1] // _BLOCK[1]),
        largest=float(fp8.amax(weights, _BLOCK)[0, 0]),
        scale=by,
        code=code,
        value=value,
        decoded=value * by,
        step=2 * float(half_steps(E4M3)[code]) * by,
    )


def _telling(fmt: Minifloat, codes: NDArray[np.uint8]) -> tuple[int, int] | None:
    magnitude = codes & np.uint8(fmt.sign - 1)
    good = np.isfinite(values(fmt))[codes] & (magnitude > 0)
    normal = good & (magnitude >> fmt.mantissa > 0) & (magnitude & ((1 << fmt.mantissa) - 1) > 0)
    for which in (normal, good):
        found = np.argwhere(which)
        if len(found):
            return int(found[0, 0]), int(found[0, 1])
    return None
