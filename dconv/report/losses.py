"""What a conversion lost of the weights that it put into codes, layer by layer, for the conversion report.

Of calibrated weights the calibration has said it (`dconv.quant.report`). Of all others it is measured: boxes of weights
are decoded from the written files and held against the same boxes of the source, a sample where the model is large.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.checkpoint.fold import fold
from dconv.coded.places import place_of
from dconv.describe import Described
from dconv.report.cost import Loss
from dconv.report.sample import SEED, Looking, Weight
from dconv.sharding.boxes import Plain
from dconv.sharding.derived import Array
from dconv.sharding.region import Region

if TYPE_CHECKING:
    from dconv.pipeline import Job

MEASURED: Final = "relative error of weights"
CALIBRATED: Final = "relative squared error of outputs"
#: Boxes that are read of a large model, and how many weights are read of a small one, all of it: some seconds of work.
_BOXES: Final = 768
_WHOLE: Final = 1 << 22
_BOX: Final = (16, 1024)


@dataclass(frozen=True)
class Losses:
    """See the module.

    Attributes:
        measure: what ``layers`` are, parts of 1.
        words: how that was found.
        layers: by class of modules and layer (-1 outside of layers).
        lines: by class: name, number of weights looked at, mean, largest, where the largest is.
        why_not: why nothing could be measured; "" where it was.
    """

    measure: str = MEASURED
    words: str = ""
    layers: Mapping[str, Mapping[int, float]] = field(default_factory=dict[str, Mapping[int, float]])
    lines: Sequence[tuple[str, int, float, float, str]] = ()
    why_not: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For the page's JSON."""
        return {
            "measure": self.measure,
            "words": self.words,
            "layers": {
                kind: {str(layer): value for layer, value in each.items()} for kind, each in self.layers.items()
            },
            "why_not": self.why_not,
        }


def of_calibration(lines: Iterable[Mapping[str, Any]]) -> Losses:
    """What a calibration said of its weights; experts of a layer by their mean."""
    by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        by_kind[place_of(line["weight"], (1, 1)).kind].append(line)
    layers: dict[str, dict[int, float]] = {}
    rows: list[tuple[str, int, float, float, str]] = []
    for kind, found in by_kind.items():
        errors: dict[int, list[float]] = defaultdict(list)
        for line in found:
            errors[line["layer"]].append(line["relative_error"])
        layers[kind] = {layer: sum(each) / len(each) for layer, each in sorted(errors.items())}
        worst = max(found, key=lambda line: line["relative_error"])
        mean = sum(line["relative_error"] for line in found) / len(found)
        rows.append((kind, len(found), mean, worst["relative_error"], worst["weight"]))
    words = (
        "Of each calibrated weight: squared error of what it answers on the calibration's samples, as a part of the "
        "squared answer. All weights, all samples."
    )
    return Losses(CALIBRATED, words, layers, rows)


def measured(job: Job, source: Described, written: Described) -> Losses:
    """Weights of an output in codes, decoded, held against the source's.

    Args:
        job: the conversion.
        source: described anew, without codes to come.
        written: the output.

    Raises:
        DconvError: weights cannot be read.
    """
    before = source.logical
    if job.folded:
        before = fold(source.family, source.config, before, source.source.shapes).logical
    after = written.logical
    coded = [
        name
        for name in written.source.coded
        if name in after.specs and name in before.specs and before.specs[name].shape == after.specs[name].shape
    ]
    if not coded:
        return Losses(why_not="no weight in codes has a name and a shape that the source has, too")
    boxes, whole = _drawn([(name, after.specs[name].file_shape, after.specs[name].shape) for name in coded])
    found: dict[tuple[str, int], Loss] = defaultdict(Loss)
    was, became = Looking(before), Looking(after)
    try:
        for name, region in boxes:
            place = place_of(name, after.specs[name].file_shape)
            values = [
                looking.values(Weight(name, place.kind, spec.shape, (_array(name, logical),), Plain()), region, "f64")
                for looking, logical, spec in (
                    (was, before, before.specs[name]), (became, after, after.specs[name])
                )
            ]  # fmt: skip
            with np.errstate(all="ignore"):  # infinity and NaN are counted
                one = Loss()
                one.take(name, values[0].astype(np.float64), values[1].astype(np.float64))
            found[place.kind, place.layer].add(one)
    finally:
        was.close()
        became.close()
    layers: dict[str, dict[int, float]] = defaultdict(dict)
    for (kind, layer), loss in sorted(found.items(), key=lambda one: one[0][1]):
        layers[kind][layer] = loss.relative
    count = sum(loss.weights for loss in found.values())
    total = sum(prod(after.specs[name].shape) for name in coded)
    seen = f"all {total:,} weights" if whole else f"a sample of {count:,} of {total:,} weights, {len(boxes):,} boxes"
    words = (
        f"Frobenius norm of (written - source) by that of the source, of {seen} in codes: decoded from the written "
        f"files and held against the source's."
    )
    return Losses(MEASURED, words, dict(layers), list(_lines(found)))


def _array(name: str, logical: Any) -> Array:
    spec = logical.specs[name]
    return Array(spec.shape, spec.dtype, logical.pieces[name])


def _lines(found: Mapping[tuple[str, int], Loss]) -> Iterable[tuple[str, int, float, float, str]]:
    by_kind: dict[str, dict[int, Loss]] = defaultdict(dict)
    for (kind, layer), loss in found.items():
        by_kind[kind][layer] = loss
    for kind, each in by_kind.items():
        total = Loss()
        for loss in each.values():
            total.add(loss)
        layer, worst = max(each.items(), key=lambda one: one[1].relative)
        yield kind, total.weights, total.relative, worst.relative, f"layer {layer}" if layer >= 0 else "outside layers"


def _drawn(weights: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> tuple[list[tuple[str, Region]], bool]:
    """Boxes of all layers and classes, and whether they are all there is; drawn by a fixed seed.

    Args:
        weights: name, shape as a file has it, shape.
    """
    if sum(prod(shape) for _, _, shape in weights) <= _WHOLE:
        return [(name, Region.whole(shape)) for name, _, shape in weights if prod(shape)], True
    rng = np.random.default_rng(SEED)
    cells: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for name, file_shape, shape in weights:
        place = place_of(name, file_shape)
        if prod(shape):
            cells[place.kind, place.layer].append((name, shape))
    order = list(cells.values())
    if len(order) > _BOXES:  # layers at even distances, of each class
        order = [order[i * (len(order) - 1) // (_BOXES - 1)] for i in range(_BOXES)]
    each = max(1, _BOXES // len(order))
    boxes: list[tuple[str, Region]] = []
    for members in order:
        for name, shape in (members[int(i)] for i in rng.integers(len(members), size=each)):
            boxes.append((name, _box(shape, rng)))
    return boxes, False


def _box(shape: tuple[int, ...], rng: np.random.Generator) -> Region:
    sides = [1] * max(len(shape) - 2, 0) + list(_BOX[-len(shape) :] if len(shape) < 2 else _BOX)
    sides = [min(side, n) for side, n in zip(sides, shape, strict=True)]
    # whole steps of a box, so that blocks that share a scale are decoded once
    start = [int(rng.integers(-(-n // side))) * side for n, side in zip(shape, sides, strict=True)]
    return Region(tuple(start), tuple(min(side, n - at) for side, n, at in zip(sides, shape, start, strict=True)))
