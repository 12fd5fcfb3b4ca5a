"""Is every weight of an output in codes as near to its source's as its scheme says? Asked of the written files.

The output is read back by its own names and config, as any source is, and decoded; the source is read as plain weights.
Neither the encoder nor the writer has a part in it, so that a wrong scale, a code in another's place or a config that
tells of other codes is found, whoever made it. (To encode once more in memory and compare would ask the encoder about
itself; that files hold what it made is what the receipt's digests say.) The bound is `dconv.quantise.Variant.worst`:
what stays within it is not found. Whole numbers that were packed anew have to be worth the very same, and tensors in no
codes are the source's, rounded once where ``--dtype`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import mx, nvfp4
from dconv.codec.kernels import apply
from dconv.coded import compressed_floats, fp8
from dconv.coded import mx as micro
from dconv.compare import distance
from dconv.describe import Described
from dconv.errors import VerifyFailed, group_names
from dconv.pipeline import Job, prepare
from dconv.quantise import OPTIONS, VARIANTS, Variant
from dconv.request import Request
from dconv.sharding.boxes import Boxes
from dconv.sharding.derived import Array, Derived, steps
from dconv.sharding.ops import FLOATS
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Logical, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Weights that are compared at once, unless more share a scale: 32 MB in fp64 of either side.
_AT_ONCE: Final = 1 << 22
#: For scaling in fp32, by scales that were rounded to it.
_SLACK: Final = 1 + 2.0**-20
#: Of a rounded plain weight: half a unit in the last place, and half of the smallest number.
_ROUNDOFF: Final = {"bf16": (2.0**-8, 2.0**-134), "f16": (2.0**-11, 2.0**-25), "f32": (2.0**-24, 2.0**-150)}
#: By the dtype of scales: what a block may lose beside its share of its largest, since a scale has no less than this
#: spacing and that of FP8's 448 is multiplied by it.
_SPACING: Final = {"f16": 448 * 2.0**-24}
_NARROWEST: Final = 448 * 2.0**-133


@dataclass(frozen=True)
class Found:
    """What was compared.

    Attributes:
        tensors: all that the model has; ``coded`` of them are in codes, of ``weights`` elements.
        error: the largest error of one of these, as a part of the largest magnitude that shares its scale.
        bound: what it had to keep.
        calibrated: tensors whose codes calibration chose, which are not the nearest ones, or that have their scales
            folded in: of these only that they are finite is asked here, and what they lose is in the calibration's
            report.
    """

    tensors: int
    coded: int
    weights: int
    error: float
    bound: float
    calibrated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def variant_of(request: Request) -> Variant:
    """What a request for codes asks for."""
    variants = VARIANTS[request.format]
    return variants[request.quant or next(iter(variants))]


def compare(job: Job, written: Described, out: Path) -> Found:
    """Compare every tensor of an output in codes with the source's.

    Args:
        job: the conversion that wrote it.
        written: ``out``, described.
        out: the output's directory, as errors name it.

    Raises:
        VerifyFailed: a tensor is missing, or farther from the source's than it may be.
        DconvError: one of them cannot be read.
    """
    request = job.request
    none = {"quantization_config": None, "calibration": None, "strict": False}
    plain = prepare(replace(request, format="hf", quant=None, dtype=None, **none, **OPTIONS)).logical
    chosen: frozenset[str] = job.calibrating.changed if job.calibrating else frozenset()
    worst, sides = variant_of(request).worst, (plain, written.logical)
    bounds = {name: job.worst.get(name, worst) for name in plain.specs}
    if odd := sorted(plain.specs.keys() ^ written.logical.specs.keys()):
        raise VerifyFailed("the output has other tensors than the source", where=f"{group_names(odd)}\nin {out}")
    error, coded, weights = 0.0, 0, 0
    far: dict[str, float] = {}
    readers = [Boxes(side, apply) for side in sides]
    try:
        for name, spec in plain.specs.items():
            other = written.logical.specs[name]
            if spec.shape != other.shape:
                far[name] = np.inf
                continue
            made = _coded(written, name)
            block = _block(made, written.logical, name) if made else (1,) * len(spec.shape)
            most = 0.0
            for tile in _tiles(spec.shape, block):
                before, after = (
                    reader.array(_array(side, name), tile, "f64" if spec.dtype in FLOATS else spec.dtype)
                    for reader, side in zip(readers, sides, strict=True)
                )
                if spec.dtype not in FLOATS:
                    share = 0.0 if spec.dtype == other.dtype and np.array_equal(before, after) else np.inf
                elif name in chosen:
                    share = 0.0 if np.isfinite(after).all() else np.inf
                elif made:
                    share = _share(before, after, block, bounds[name], _spacing(made, readers[1]))
                else:
                    share = _rounding(before, after, *_allowed(plain, spec, other))
                most = max(most, share)
            if most > (bounds[name] if made else 1.0) * _SLACK:
                far[name] = most
            if made and name not in chosen:
                error, coded, weights = max(error, most), coded + 1, weights + prod(spec.shape)
    finally:
        for reader in readers:
            reader.close()
    if far:
        raise _too_far(far, bounds, job, written, out)
    return Found(len(plain.specs), coded, weights, error, max((worst, *job.worst.values())), len(chosen))


def _too_far(far: dict[str, float], bounds: dict[str, float], job: Job, written: Described, out: Path) -> VerifyFailed:
    name = max(far, key=lambda name: far[name])
    worst = bounds.get(name, 0.0)
    of = f"{worst:.3g} of the largest magnitude that shares its scale ({job.scheme})" if worst else "no change at all"
    return VerifyFailed(
        f"{len(far)} tensor{' is' if len(far) == 1 else 's are'} farther from the source's than these codes move any",
        where=f"{group_names(sorted(far))}\nin {out}",
        expected=of if name in written.source.coded else "the source's values, rounded once at most",
        found=f"{far[name]:.3g} {'of it' if name in written.source.coded else 'x that'} in {name}",
        do="keep the source, and report it",
    )


def _array(logical: Logical, name: str) -> Array:
    spec = logical.specs[name]
    return Array(spec.shape, spec.dtype, logical.pieces[name])


def _coded(written: Described, name: str) -> Derived | None:
    """What computes a weight that is in codes."""
    pieces = written.logical.pieces[name]
    return written.logical.derived.get(pieces[0].file) if name in written.source.coded else None


def _block(made: Derived, logical: Logical, name: str) -> Index:
    """Elements that share a scale, along each axis; of a scheme without them here, all of a matrix."""
    match made.recipe:
        case fp8.Decode(block=block):
            rows, columns = block
        case micro.Decode() | compressed_floats.Mx():
            rows, columns = 1, mx.BLOCK
        case compressed_floats.Nv():
            rows, columns = 1, nvfp4.BLOCK
        case _:
            rows, columns = made.shape[-2:]
    strides = logical.pieces[name][0].strides
    if strides == steps(made.shape):
        return (*(1,) * (len(made.shape) - 2), rows, columns)
    return tuple(columns if stride == 1 else 1 for stride in strides)  # experts turned, whose rows are blocks' own


def _tiles(shape: Index, block: Index) -> Iterator[Region]:
    """Boxes of whole blocks, one after the other along the first axis."""
    if not prod(shape):
        return
    if not shape:
        yield Region((), ())
        return
    step = max(_AT_ONCE // prod(shape[1:]) // block[0], 1) * block[0]
    for start in range(0, shape[0], step):
        yield Region((start, *(0,) * (len(shape) - 1)), (min(step, shape[0] - start), *shape[1:]))


def _spacing(made: Derived, reader: Boxes) -> float:
    """What a block loses of itself at most because its scale is one of few numbers.

    NVFP4's scales are e4m3 divided by the tensor's own, and half of the smallest of them may be lost of each of 6.
    """
    if isinstance(made.recipe, compressed_floats.Nv):
        whole = made.inputs[2]
        divisor = float(reader.array(whole, Region.whole(whole.shape), "f64").reshape(-1)[0])
        return 6 * 2.0**-10 / abs(divisor) if divisor else 0.0
    return _SPACING.get(made.inputs[1].dtype, _NARROWEST)


def _share(
    before: NDArray[np.float64], after: NDArray[np.float64], block: Index, worst: float, spacing: float
) -> float:
    """The largest error as a part of its block's largest magnitude; infinite where a number became none.

    Of a block with no finite largest nothing is asked; errors up to ``spacing`` are none, unless all is to be kept.
    """
    largest: NDArray[np.float64] = np.abs(before)
    reduced: Any = np.maximum.reduceat  # numpy leaves open what it gives
    for axis, size in enumerate(block):
        largest = reduced(largest, np.arange(0, largest.shape[axis], size), axis)
    for axis, size in enumerate(block):
        largest = np.repeat(largest, size, axis)[(slice(None),) * axis + (slice(0, before.shape[axis]),)]
    error = distance(before, after)
    if worst:
        error[error <= spacing] = 0
        error[~np.isfinite(largest)] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error == 0, 0, error / largest)
    share[np.isnan(share)] = np.inf
    return float(share.max(initial=0))


def _allowed(plain: Logical, spec: TensorSpec, other: TensorSpec) -> tuple[float, float]:
    """How far a tensor that is in no codes may move: of itself, and at all."""
    exact = spec.dtype == other.dtype and all(piece.factor == 1.0 for piece in plain.pieces[spec.name])
    return (0.0, 0.0) if exact else _ROUNDOFF.get(other.dtype, (0.0, 0.0))


def _rounding(before: NDArray[np.float64], after: NDArray[np.float64], of: float, least: float) -> float:
    """The largest error by what is allowed."""
    error = distance(before, after)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(error == 0, 0, error / (np.abs(before) * of + least)).max(initial=0))
