"""AWQ checkpoints (``version`` gemm) as a source: ``qweight``, ``qzeros`` and ``scales`` of a module, and their weight.

Written by AutoAWQ, GPTQModel and others. Source: AutoAWQ 0.2.9 ``awq/modules/linear/gemm.py`` and its
``AwqConfig.to_transformers_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.codec import awq, integer
from dconv.coded.decoded import Decoded, array_of
from dconv.coded.integers import Grid, Integers, Parts, add, chosen_by, modules_of, span
from dconv.errors import Damaged, Refused
from dconv.sharding.derived import Derived, Read
from dconv.sharding.ops import How
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.region import Region
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METHOD: Final = "awq"
BITS: Final = 4
#: Codes in a word.
PER_WORD: Final = 32 // BITS
_PARTS: Final = ("qweight", "qzeros", "scales")
_WHERE: Final = "quantization_config"


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every weight in codes, each proved to have its parts in the shapes that the config makes them.

    Raises:
        Damaged: a part is missing or of another shape; the config makes no sense.
        Refused: a layout that is not known.
    """
    said = config["quantization_config"]
    grid = grid_of(mapping_or_empty(said))
    for module, parts in modules_of(found.tensors, _PARTS).items():
        add(found, module, dtype, parts.named(), _integers(found, parts, grid), "AWQ")


def grid_of(said: Mapping[str, object]) -> Grid:
    """What the config says, in transformers' spelling or in AutoAWQ's own.

    Zeros are stored whatever ``zero_point`` says, and used.

    Raises:
        Damaged: a value that makes no sense, or one that is missing.
        Refused: another layout, or another width.
    """
    versions = {str(said[key]).lower() for key in ("version", "format") if said.get(key) is not None}
    if str(said.get("backend")).lower() == "llm-awq":
        versions.add("llm-awq")
    if versions - {"gemm"}:
        raise Refused(
            "the source's AWQ layout is not one that this version decodes, nothing was written",
            where=f"{_WHERE}.version",
            found=f"{', '.join(sorted(versions)):.80}",
            expected="gemm",
        )
    bits, group = (said.get(key, said.get(other)) for key, other in (("bits", "w_bit"), ("group_size", "q_group_size")))
    if bits != BITS or type(bits) is not int:
        raise Refused(
            "AWQ is decoded from codes of 4 bits, nothing was written", where=f"{_WHERE}.bits", found=f"{bits!r:.80}"
        )
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 31):
        raise Damaged(
            "group_size makes no sense",
            where=f"{_WHERE}.group_size",
            expected="-1, or how many columns share a scale",
            found=f"{group!r:.80}",
        )
    return Grid(bits, group, chosen_by=chosen_by(said))


def _integers(found: Decoded, parts: Parts, grid: Grid) -> Integers:
    columns, words = parts.matrix("qweight")
    rows, groups = words * PER_WORD, grid.groups(columns)
    why = f"{grid.bits} bits and groups of {grid.group}"
    qweight = parts.check("qweight", ("i32",), (groups * grid.size(columns), words), f"{why}, which columns fill")
    qzeros = parts.check("qzeros", ("i32",), (groups, words), why)
    scales = parts.check("scales", integer.SCALES, (groups, rows), why)

    def numbers(stored: Stored, what: str, count: int) -> Derived:
        return Derived((rows, count), (array_of(stored),), Numbers(rows), How(what, True, grid.bits), across=1)

    return Integers(
        (rows, columns),
        grid,
        found.help(qweight, f"{parts.module}//codes", numbers(qweight, "codes", columns), "u8"),
        array_of(scales).in_order((1, 0)),
        found.help(qzeros, f"{parts.module}//zeros", numbers(qzeros, "zeros", groups), "u8"),
        None,
    )


@dataclass(frozen=True, slots=True)
class Numbers:
    """Codes u8 [out, in] or zeros u8 [out, groups]; input: ``qweight`` or ``qzeros``."""

    rows: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Unpack the words that hold the rows of the box."""
        del dtype, factor
        (top, left), (rows, columns) = box.start, box.shape
        first, words, held, at = span(top, rows, self.rows, BITS)
        return awq.unpack(read(0, Region((left, first), (columns, words)), ""), held)[at : at + rows]
