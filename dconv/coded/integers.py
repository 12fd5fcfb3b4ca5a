"""A weight in whole numbers, whichever container packs them: (code - zero) x the scale of its column's group.

GPTQ, AWQ and compressed-tensors differ in how codes and zeros lie in words. Here they are derived tensors of one form
(`Integers`), so that one recipe makes the weight, and the numbers can be packed for another reader without a new
rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dconv.codec import bitpack, integer
from dconv.coded.decoded import Decoded
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.parsed import is_list, mapping_or_empty
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Logical, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Grid:
    """The whole numbers of a weight.

    Attributes:
        bits: of a code, and of a zero.
        group: columns that share a scale; -1 for all of them.
        symmetric: the config says that every zero is half the range (readers then do not look at them).
        ordered: columns belong to groups in the order of activations, as the config (``desc_act``) or a part says.
        chosen_by: programs that chose them, as ``meta.quantizer`` names them.
    """

    bits: int
    group: int
    symmetric: bool = False
    ordered: bool = False
    chosen_by: tuple[str, ...] = ()

    def size(self, columns: int) -> int:
        """Columns that share a scale in a weight of so many."""
        return columns if self.group < 0 else self.group

    def groups(self, columns: int) -> int:
        """Scales of each row in a weight of so many columns; the last group may be short."""
        return -(-columns // self.size(columns)) if columns else 0


@dataclass(frozen=True)
class Integers:
    """What a weight is made of.

    Attributes:
        shape: of the weight, [out, in].
        codes: u8 [out, in].
        scales: floating [out, groups].
        zeros: u8 [out, groups], or one number for all.
        order: i32 [in], the group of each column; None where they are in order.
        least: what no zero is below, as far as that is known.
    """

    shape: tuple[int, int]
    grid: Grid
    codes: Array
    scales: Array
    zeros: Array | int
    order: Array | None
    least: int = 0


@dataclass(frozen=True, slots=True)
class Product:
    """(code - zero) × scale (`dconv.codec.integer`).

    Inputs: codes, scales; zeros where ``zero``, which is all of them, is None; groups if ``listed``. No zero is below
    ``least``.
    """

    grid: Grid
    columns: int
    scale: str
    listed: bool
    zero: int | None = None
    least: int = 0

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the codes of the box, with the scales from its first to its last group."""
        (top, left), (rows, columns) = box.start, box.shape
        if self.listed:
            groups = read(2 + (self.zero is None), Region((left,), (columns,)), "").view("<i4")
        else:
            groups = integer.groups_of(columns, self.grid.size(self.columns), left)
        begin = int(groups.min())
        part = Region((top, begin), (rows, int(groups.max()) + 1 - begin))
        return integer.decode(
            read(0, box, ""),
            read(1, part, ""),
            read(2, part, "") if self.zero is None else self.zero,
            groups - begin,
            source=self.scale,
            target=dtype,
            bits=self.grid.bits,
            factor=factor,
        )


@dataclass(frozen=True, slots=True)
class Listed:
    """``g_idx``, each number proved to be of a group that there is; input: itself, under ``name``."""

    name: str
    count: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The groups of the columns in the box, each seen to be one.

        Raises:
            Damaged: a group that has no scale.
        """
        del dtype, factor
        found = read(0, box, "").view("<i4")
        wrong = np.flatnonzero((found < 0) | (found >= self.count))
        if wrong.size:
            raise Damaged(
                "a column belongs to a group that has no scale",
                where=f"{self.name}, column {box.start[0] + int(wrong[0])}",
                expected=f"groups 0 to {self.count - 1}",
                found=str(found[wrong[0]]),
                do="fetch the file again",
            )
        return found


def add(found: Decoded, module: str, dtype: str, parts: Mapping[str, Stored], made: Integers, scheme: str = "") -> None:
    """Put a module's weight in the place of the parts that it is made of.

    Args:
        found: gets the weight, and loses the parts.
        module: the module's name, without ``.weight``.
        dtype: what it is decoded to where nothing else is asked for.
        parts: the stored tensors, by name.
        made: what they mean.
        scheme: in words, where codes of so many bits are not all that there is to say.
    """
    (rows, columns), grid = made.shape, made.grid
    zero = made.zeros if isinstance(made.zeros, int) else None
    inputs = [made.codes, made.scales]
    inputs += [array for array in (made.zeros, made.order) if isinstance(array, Array)]
    each = (8 * ITEMSIZE[made.scales.dtype] + grid.bits * (zero is None)) / max(grid.size(columns), 1)
    bits = grid.bits + each + (32 / max(rows, 1) if made.order else 0)
    of = "its row" if grid.group < 0 else f"its {grid.group} columns"
    less = " less its zero" if zero is None else ""
    words = f"{scheme} int{grid.bits} code{less} x the scale of {of}".lstrip()
    recipe = Product(grid, columns, made.scales.dtype, made.order is not None, zero)
    how = How(words, exact=False, bits=bits, floats=True)
    found.put(f"{module}.weight", dtype, parts, Derived(made.shape, tuple(inputs), recipe, how), words)


def integers_of(name: str, dense: Array, logical: Logical) -> Integers | None:
    """The whole numbers that a weight is computed from; None where it is not.

    Raises:
        Refused: it is, but multiplied by a number, or in parts.
    """
    sources = [logical.derived.get(piece.file) for piece in dense.pieces]
    recipes = [source.recipe for source in sources if source]
    if not any(isinstance(recipe, Product) for recipe in recipes):
        return None
    piece, source, recipe = dense.pieces[0], sources[0], recipes[0]
    rows, columns = dense.shape
    whole = source is not None and len(sources) == 1 and source.shape == dense.shape and not dense.twins
    if source is None or not whole or not isinstance(recipe, Product):
        raise Refused("a weight's codes are in parts, which are not repacked, nothing was written", where=name)
    if piece.factor != 1.0:
        raise Refused(
            "a weight in codes is to be multiplied, which its codes cannot be without a new rounding, "
            "nothing was written",
            where=name,
            found=f"x {piece.factor:.6g}",
            do="convert it to hf, and quantise that",
        )
    codes, scales, *more = source.inputs
    zeros = more.pop(0) if recipe.zero is None else recipe.zero
    least = zeros if isinstance(zeros, int) else recipe.least
    return Integers((rows, columns), recipe.grid, codes, scales, zeros, more[0] if more else None, least)


def modules_of(tensors: Mapping[str, Stored], needed: Iterable[str], also: Iterable[str] = ()) -> dict[str, Parts]:
    """Modules whose weights are in codes, each with its parts.

    Args:
        tensors: as they are stored, by name.
        needed: ends of the parts' names, the codes first.
        also: those that need not be there.

    Raises:
        Damaged: a part is missing, or belongs to no codes, or a weight is there in codes and plain.
    """
    needed, also = tuple(needed), tuple(also)
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        if part in needed or part in also:
            found.setdefault(module, {})[part] = stored
    lacking = [f"{module}.{part}" for module, parts in found.items() for part in needed if part not in parts]
    if lacking:
        raise Damaged(
            f"{len(lacking)} parts of weights in codes are missing, without which their codes mean nothing",
            where=group_names(lacking),
            expected=f"{', '.join(needed)} of each",
            do="fetch the files again",
        )
    twice = [f"{module}.weight" for module in found if f"{module}.weight" in tensors]
    if twice:
        raise Damaged(
            f"{len(twice)} weights are there twice, in codes and plain",
            where=group_names(twice),
            expected=f"{needed[0]} with its parts, or weight",
        )
    return {module: Parts(module, parts) for module, parts in found.items()}


@dataclass(frozen=True)
class Parts:
    """The stored tensors of a module by the end of their names."""

    module: str
    stored: Mapping[str, Stored]

    def named(self) -> dict[str, Stored]:
        """The parts by the whole names that they are stored under."""
        return {f"{self.module}.{part}": stored for part, stored in self.stored.items()}

    def matrix(self, part: str) -> tuple[int, int]:
        """The shape of a part.

        Raises:
            Damaged: it is no matrix, or an empty one.
        """
        shape = self.stored[part].spec.shape
        if len(shape) != 2 or not all(shape):
            raise self._damaged(part, "a matrix")
        return shape[0], shape[1]

    def check(self, part: str, dtypes: tuple[str, ...], shape: Index, why: str) -> Stored:
        """A part of one of these dtypes and of this shape.

        Raises:
            Damaged: it is of another.
        """
        stored = self.stored[part]
        if stored.spec.dtype not in dtypes or stored.spec.shape != shape:
            raise self._damaged(part, f"{' or '.join(dtypes)}{list(shape)} by {why}")
        return stored

    def _damaged(self, part: str, expected: str) -> Damaged:
        stored = self.stored[part]
        return Damaged(
            "a part of a weight in codes is not what the config makes it",
            where=f"{self.module}.{part} in {stored.extents[0].file}",
            expected=expected,
            found=f"{stored.spec.dtype}{list(stored.spec.shape)}",
            do="the config belongs to other files",
        )


def chosen_by(said: Mapping[str, object]) -> tuple[str, ...]:
    """``meta.quantizer`` of a config: programs with their versions, ``gptqmodel:7.7.0``."""
    named = mapping_or_empty(said.get("meta")).get("quantizer")
    programs = named if is_list(named) else [named]
    return tuple(text for text in programs if isinstance(text, str) and re.fullmatch(r"[\w.+-]+:[\w.+-]+", text))[:8]


def span(start: int, count: int, whole: int, bits: int, layout: bitpack.Layout = "stream") -> tuple[int, int, int, int]:
    """Words that hold ``count`` of ``whole`` codes from ``start`` on.

    Returns:
        The first word, and how many; how many codes they hold, and where in them ``start`` is.
    """
    codes, words = bitpack.period(bits, layout)
    first = start // codes
    held = min(-(-(start + count) // codes) * codes, whole) - first * codes
    return first * words, bitpack.words_for(held, bits, layout), held, start - first * codes


def around(first: int, count: int, bits: int) -> tuple[int, int, int]:
    """Codes that fill whole words around ``count`` words from the one at ``first`` on.

    Returns:
        The first code, and how many; where among their words the one at ``first`` is.
    """
    codes, words = bitpack.period(bits)
    low = first // words
    high = -(-(first + count) // words)
    return low * codes, (high - low) * codes, first - low * words
