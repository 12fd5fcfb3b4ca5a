"""A few boxes of a model's weights, drawn so that a 671B model is looked at in seconds: how many does not grow with it.

Classes of modules take turns, so that each has its share; within a class tensors and boxes are drawn by a fixed seed.
A model that is smaller than the sample is looked at as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec.kernels import apply
from dconv.sharding.boxes import HOW, Boxes
from dconv.sharding.derived import Array, Derived, Recipe
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Logical

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED: Final = 0
#: Weights of a sample and boxes that they are read in: a few seconds of computing, and some 10 000 reads.
WEIGHTS: Final = 1 << 22
BOXES: Final = 1024
#: Rows and columns of a box: whole blocks of every format, in runs that are worth a read of their own.
BOX: Final = (128, 512)


@dataclass(frozen=True)
class Weight:
    """A weight that may be looked at.

    Attributes:
        kind: its class of modules.
        inputs: what it is made of; ``shape`` is that of what they make.
        recipe: computes it.
        block: rows and columns that share a scale: boxes are of whole blocks where these are smaller.
    """

    name: str
    kind: str
    shape: Index
    inputs: tuple[Array, ...]
    recipe: Recipe
    block: tuple[int, int] = (1, 1)


@dataclass
class Read:
    """What was read of the files."""

    bytes: int = 0
    requests: int = 0

    def log(self, file: str, offset: int, count: int) -> None:
        """See `dconv.sharding.reader.ReadLog`."""
        del file, offset
        self.bytes += count
        self.requests += 1


@dataclass(frozen=True)
class Sample:
    """The boxes drawn.

    Attributes:
        whole: whether they are all there is.
    """

    boxes: tuple[tuple[Weight, Region], ...]
    whole: bool


@dataclass
class Looking:
    """Computes boxes of what weights are made of; to be closed."""

    logical: Logical
    read: Read = field(default_factory=Read)

    def __post_init__(self) -> None:
        self._boxes = Boxes(self.logical, apply, self.read.log)

    def close(self) -> None:
        """Close the files."""
        self._boxes.close()

    def values(self, weight: Weight, region: Region, dtype: str, recipe: Recipe | None = None) -> NDArray[Any]:
        """A box of a weight, or of what another recipe makes of its inputs."""
        return self.made(Derived(weight.shape, weight.inputs, recipe or weight.recipe, HOW), region, dtype)

    def made(self, derived: Derived, region: Region, dtype: str) -> NDArray[Any]:
        """A box of a derived tensor."""
        return self._boxes.made(derived, region, dtype)

    def number(self, array: Array, at: Index, dtype: str) -> Any:
        """One element, in ``carrier(dtype)``."""
        return self._boxes.array(array, Region(at, (1,) * len(at)), dtype).reshape(-1)[0]


def draw(weights: Sequence[Weight], most: int | None = None) -> Sample:
    """Boxes of all weights where they are at most ``most`` elements, else of some of each class in turn."""
    most = WEIGHTS if most is None else most
    weights = [weight for weight in weights if prod(weight.shape)]
    whole = sum(prod(weight.shape) for weight in weights) <= most
    if whole and sum(prod(_counts(weight)) for weight in weights) <= BOXES:
        boxes = ((weight, _box(weight, at)) for weight in weights for at in np.ndindex(*_counts(weight)))
        return Sample(tuple(boxes), whole=True)
    by_class: dict[str, list[Weight]] = {}
    for weight in weights:
        by_class.setdefault(weight.kind, []).append(weight)
    rng = np.random.default_rng(SEED)
    turns = [_turns(members, rng) for members in by_class.values()]
    drawn: list[tuple[Weight, Region]] = []
    left = most
    while turns:
        for turn in list(turns):
            found = next(turn, None)
            if found is None:
                turns.remove(turn)
                continue
            left -= found[1].volume
            if drawn and (left < 0 or len(drawn) == BOXES):
                return Sample(tuple(drawn), whole=False)
            drawn.append(found)
    return Sample(tuple(drawn), whole=False)


def _turns(members: list[Weight], rng: np.random.Generator) -> Iterator[tuple[Weight, Region]]:
    """A box of each tensor in a drawn order, then another of each, no box twice."""
    taken: set[tuple[str, Region]] = set()
    while True:
        fresh = False
        for at in rng.permutation(np.arange(len(members))):
            weight = members[int(at)]
            region = _box(weight, [int(rng.integers(n)) for n in _counts(weight)])
            if (weight.name, region) not in taken:
                taken.add((weight.name, region))
                fresh = True
                yield weight, region
        if not fresh:
            return


def _sides(weight: Weight) -> Mapping[int, int]:
    """Rows and columns of a box, by axis from the end: whole blocks where these are smaller than a box."""
    return {
        axis: side // block * block if block <= side else side
        for axis, side, block in zip((-2, -1), BOX, weight.block, strict=True)
    }


def _counts(weight: Weight) -> list[int]:
    sides, axes = _sides(weight), len(weight.shape)
    return [-(-n // sides[axis - axes]) if axis - axes in sides else n for axis, n in enumerate(weight.shape)]


def _box(weight: Weight, at: Sequence[int]) -> Region:
    sides, axes = _sides(weight), len(weight.shape)
    start: list[int] = []
    shape: list[int] = []
    for axis, (i, n) in enumerate(zip(at, weight.shape, strict=True)):
        side = sides.get(axis - axes, 1)
        start.append(i * side)
        shape.append(min(side, n - i * side))
    return Region(tuple(start), tuple(shape))
