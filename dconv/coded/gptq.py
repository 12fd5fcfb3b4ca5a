"""GPTQ checkpoints as a source: ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of a module, and what they make.

Written by AutoGPTQ, GPTQModel, AutoRound and others; both formats of zeros and the planar one. Sources: auto-gptq 0.7.1
``nn_modules/qlinear``, GPTQModel 7.7.0 ``nn_modules/qlinear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.codec import bitpack, gptq, integer
from dconv.coded.decoded import Decoded, array_of
from dconv.coded.gptq_config import Config, config_of
from dconv.coded.integers import Grid, Integers, Listed, Parts, add, modules_of, span
from dconv.errors import Damaged, DconvError
from dconv.sharding.derived import Derived, Read
from dconv.sharding.ops import How
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.region import Region

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PARTS: Final = ("qweight", "qzeros", "scales")
_ORDER: Final = "g_idx"


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every weight in codes, each proved to have its parts in the shapes that the config makes them.

    Raises:
        Damaged: a part is missing or of another shape; the config makes no sense or speaks of other files.
        Refused: a format that is not known.
    """
    said = config["quantization_config"]
    known = config_of(mapping_or_empty(said))
    for module, parts in modules_of(found.tensors, _PARTS, (_ORDER,)).items():
        made = _integers(found, parts, known.grid_of(module), known)
        add(found, module, dtype, parts.named(), made, "GPTQ")


def _integers(found: Decoded, parts: Parts, grid: Grid, known: Config) -> Integers:
    words, rows = parts.matrix("qweight")
    columns = _columns(parts, words, grid.bits)
    groups = grid.groups(columns)
    why = f"{grid.bits} bits and groups of {grid.group}"
    shape = (bitpack.words_for(columns, grid.bits, known.layout), rows)
    qweight = parts.check("qweight", ("i32",), shape, f"{why} for {columns} columns")
    shape = (groups, bitpack.words_for(rows, grid.bits, known.layout))
    qzeros = parts.check("qzeros", ("i32",), shape, why)
    scales = parts.check("scales", integer.SCALES, (groups, rows), why)
    name = parts.module
    unpack = Codes(grid.bits, known.layout, columns)
    codes = Derived((rows, columns), (array_of(qweight),), unpack, How("codes", True, grid.bits))
    recipe = Zeros(f"{name}.qzeros", grid.bits, known.layout, rows, known.version, known.carry)
    zeros = Derived((rows, groups), (array_of(qzeros),), recipe, How("zeros", True, grid.bits), across=1)
    order = None
    if _ORDER not in parts.stored and grid.ordered and groups > 1:
        raise Damaged(
            "columns are in the order of activations, which is not there",
            where=f"{name}.{_ORDER}",
            expected="it beside qweight, as desc_act says",
            do="fetch the files again",
        )
    if _ORDER in parts.stored:
        g_idx = parts.check(_ORDER, ("i32",), (columns,), why)
        listed = Derived((columns,), (array_of(g_idx),), Listed(f"{name}.{_ORDER}", groups), How("groups", True, 32))
        order = found.help(g_idx, f"{name}//groups", listed, "i32")
    return Integers(
        (rows, columns),
        grid,
        found.help(qweight, f"{name}//codes", codes, "u8"),
        array_of(scales).in_order((1, 0)),
        found.help(qzeros, f"{name}//zeros", zeros, "u8"),
        order,
    )


def _columns(parts: Parts, words: int, bits: int) -> int:
    """How many columns so many words hold: the length of ``g_idx``, or what fills them.

    Raises:
        Damaged: columns in an order that is not there, or words that no whole number of codes fills.
    """
    order = parts.stored.get(_ORDER)
    if order is not None and len(order.spec.shape) == 1 and order.spec.shape[0]:
        return order.spec.shape[0]
    if order is not None or words * 32 % bits:
        part = "qweight" if order is None else _ORDER
        raise Damaged(
            "a part of a weight in codes has a length that none has",
            where=f"{parts.module}.{part} in {parts.stored[part].extents[0].file}",
            found=str(list(parts.stored[part].spec.shape)),
            expected=f"{words} words of whole {bits}-bit codes" if order is None else "a group for each column",
        )
    return words * 32 // bits


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes u8 [out, in]; input: ``qweight``."""

    bits: int
    layout: bitpack.Layout
    columns: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Unpack the words that hold the columns of the box."""
        del dtype, factor
        (top, left), (rows, columns) = box.start, box.shape
        first, words, held, at = span(left, columns, self.columns, self.bits, self.layout)
        stored = read(0, Region((first, top), (words, rows)), "")
        return gptq.unpack_weight(stored, self.bits, held, self.layout)[:, at : at + columns]


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros u8 [out, groups]; input: ``qzeros``, under ``name``."""

    name: str
    bits: int
    layout: bitpack.Layout
    rows: int
    version: gptq.Version
    carry: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Unpack the words that hold the rows of the box.

        Raises:
            Damaged: another number of words than the rows take.
            Refused: a zero that GPTQ's first format leaves open (`dconv.codec.gptq.unpack_zeros`).
        """
        del dtype, factor
        (top, left), (rows, groups) = box.start, box.shape
        first, words, held, at = span(top, rows, self.rows, self.bits, self.layout)
        stored = read(0, Region((left, first), (groups, words)), "")
        try:
            found = gptq.unpack_zeros(stored, self.bits, held, self.version, self.layout, carry=self.carry)
        except DconvError as error:
            error.where = self.name
            raise
        return found[at : at + rows]
