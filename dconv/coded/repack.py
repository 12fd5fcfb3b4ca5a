"""Whole numbers that a source has, packed for another reader: no weight changes, since nothing is rounded.

Choosing such numbers for a plain weight takes calibration, which is another matter; without numbers these formats are
refused. A packer takes them from wherever they come (`Packer`); here they are a source's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from dconv.codec import integer, packed
from dconv.codec.kernels import apply
from dconv.coded.encode import Coded
from dconv.coded.integers import Grid, Integers, integers_of
from dconv.errors import Refused
from dconv.sharding.derived import Array, Derived, Read, open_reader
from dconv.sharding.ops import MOVE, How
from dconv.sharding.plan import Copy
from dconv.sharding.reader import BoxReader
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: How numbers are made that no weight changes with.
EXACT: Final = "the source's whole numbers, packed anew"
#: Elements of zeros, and of columns' groups, that are read at once while planning.
_AT_ONCE: Final = 1 << 22


#: What of a weight's numbers only values tell: the smallest zero, whether all zeros are half the range, and whether
#: columns are in order.
Value = Literal["least", "even", "order"]


class Packer(Protocol):
    """How whole numbers are stored, and what config.json says of it."""

    @property
    def asks(self) -> frozenset[Value]:
        """What it depends on whether it can store the numbers, or how, beside shapes."""
        ...

    @property
    def words(self) -> str:
        """How reports call it, such as ``AWQ (gemm)``."""
        ...

    def pack(self, name: str, numbers: Integers, derived: Mapping[str, Derived]) -> Coded:
        """What a weight becomes.

        Args:
            name: of the weight, ``….weight``.
            numbers: codes, scales and zeros, and how they belong together.
            derived: what the arrays of the numbers are computed by, where that is known: codes that lie in words as
                they are wanted are copied.

        Raises:
            Refused: the numbers do not fit the format.
        """
        ...

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """As of `dconv.coded.encode.Scheme`; what no key can say is refused."""
        ...

    def note(self, config: Mapping[str, Any]) -> str:
        """What a person should know of an output with this config; "" where there is nothing."""
        ...


@dataclass(frozen=True)
class Repack:
    """A `dconv.coded.encode.Scheme` that takes a source's numbers.

    Attributes:
        numbers: by the weight's name.
    """

    packer: Packer
    numbers: Mapping[str, Integers] = field(default_factory=dict[str, Integers])
    columns: int = field(default=1, init=False)

    @property
    def words(self) -> str:
        """How reports call it."""
        return self.packer.words

    def of(self, logical: Logical) -> Repack:
        """The same with the numbers of a source.

        Raises:
            Refused: some are in a form that cannot be packed anew.
        """
        return replace(self, numbers=_met(_numbers(logical), logical, self.packer.asks))

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """The packer's tensors of the source's numbers; ``dense`` is not looked at."""
        del dense
        coded = self.packer.pack(spec.name, self.numbers[spec.name], logical.derived)
        coded.kept = True
        return coded

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """The packer's."""
        return self.packer.config(plain, coded)


def _numbers(logical: Logical) -> dict[str, Integers]:
    """The weights that a source has as whole numbers."""
    found: dict[str, Integers] = {}
    for name, spec in logical.specs.items():
        dense = Array(spec.shape, spec.dtype, logical.pieces[name], logical.replicas.get(name, ()))
        if numbers := integers_of(name, dense, logical):
            found[name] = numbers
    return found


def _met(numbers: Mapping[str, Integers], logical: Logical, asks: frozenset[Value]) -> dict[str, Integers]:
    """The same, with what only values tell.

    What does not fit a format is refused before anything is written, so these values are read, whatever the model's
    size: half a byte for a group of 128 4-bit codes, 4 bytes for a column of thousands; a hundredth of the model, of
    which little is held at once.

    Zeros that are half the range everywhere become that number, if so they are in all weights of one grid: readers fuse
    weights (q, k, v), and take them with zeros or without.
    """
    found = dict(numbers)
    uneven: set[Grid] = set()
    with closing(open_reader(logical, _AT_ONCE, apply)) as reader:
        for name, one in numbers.items():
            if any(piece.file in logical.held for piece in one.codes.pieces):  # chosen on the way, as the format asks
                if isinstance(one.zeros, Array):
                    uneven.add(one.grid)
                continue
            if "order" in asks and one.order and _in_order(reader, one.order, one):
                found[name] = one = replace(one, order=None)
            if "least" in asks and isinstance(one.zeros, Array):
                found[name] = replace(one, least=min(int(part.min()) for part in _parts(reader, one.zeros)))
            if "even" in asks and one.grid not in uneven and not _even(reader, one):
                uneven.add(one.grid)
    if "even" in asks:
        for name, one in found.items():
            if one.grid not in uneven:
                found[name] = replace(one, zeros=packed.middle(one.grid.bits))
    return found


def _even(reader: BoxReader, one: Integers) -> bool:
    half = packed.middle(one.grid.bits)
    if isinstance(one.zeros, int):
        return one.zeros == half
    return all(bool((part == half).all()) for part in _parts(reader, one.zeros))


def _in_order(reader: BoxReader, order: Array, one: Integers) -> bool:
    size, at = one.grid.size(one.shape[1]), 0
    for part in _parts(reader, order):
        groups = part.view("<i4")
        if not np.array_equal(groups, integer.groups_of(groups.size, size, at)):
            return False
        at += groups.size
    return True


def _parts(reader: BoxReader, array: Array) -> Iterator[NDArray[np.generic]]:
    """A derived array, read part by part."""
    (piece,) = array.pieces
    for box in piece.region.bands(_AT_ONCE):
        offset = sum(a * s for a, s in zip(box.start, piece.strides, strict=True))
        out = np.empty(box.shape, {"u8": "u1", "i32": "<u4"}[array.dtype])
        reader.read_box(Copy(box, piece.file, piece.offset + offset, piece.strides, array.dtype, MOVE), out)
        yield out


@dataclass(frozen=True, slots=True)
class Fill:
    """One byte everywhere; no inputs."""

    value: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The number for each element of the box; nothing is read."""
        del dtype, factor, read
        return np.full(box.shape, self.value, np.uint8)


def zeros_of(made: Coded, name: str, numbers: Integers) -> Array:
    """The zeros of a weight, [out, groups], one for all or not."""
    if isinstance(numbers.zeros, Array):
        return numbers.zeros
    rows, columns = numbers.shape
    shape = (rows, numbers.grid.groups(columns))
    return made.help(f"{name}//zeros", Derived(shape, (), Fill(numbers.zeros), How("half the range", True, 0)), "u8")


def stored_as(array: Array, derived: Mapping[str, Derived], recipe: object) -> Array | None:
    """What numbers are unpacked from, where that is what they would be packed to."""
    source = derived.get(array.pieces[0].file)
    return source.inputs[0] if source and source.recipe == recipe else None


def grids_of(coded: Mapping[str, Coded]) -> dict[str, Grid]:
    """The grids of weights that have one, by module."""
    return {name.removesuffix(".weight"): one.grid for name, one in coded.items() if one.grid}


def unfit(where: str, found: str, expected: str, do: str = "FORMAT hf decodes them") -> Refused:
    """The refusal of a weight whose whole numbers a format has no place for; ``where`` is the weight's name."""
    return Refused(
        "whole numbers of the source do not fit the format without a new rounding, nothing was written",
        where=where,
        expected=expected,
        found=found,
        do=do,
    )
