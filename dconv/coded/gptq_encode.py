"""Whole numbers packed as GPTQ: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``, in either format of zeros.

Sources: GPTQModel 7.7.0, ``QuantizeConfig.to_dict``; vLLM's ``gptq.py`` for what a loader needs of the config.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dconv import __version__
from dconv.codec import gptq, integer
from dconv.coded.encode import Coded
from dconv.coded.gptq import Codes
from dconv.coded.gptq_config import METHOD
from dconv.coded.integers import Grid, Integers, around
from dconv.coded.places import FUSED, experts_of, place_of
from dconv.coded.repack import EXACT, Value, grids_of, stored_as, unfit, zeros_of
from dconv.errors import Refused
from dconv.sharding.derived import Derived, Read
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Widths that all readers of GPTQ's first two formats have.
_BITS: Final = (2, 3, 4, 8)


@dataclass(frozen=True)
class GPTQ:
    """GPTQ's layout of whole numbers, a `dconv.coded.repack.Packer`.

    Attributes:
        version: v1 stores zeros less one.
    """

    version: gptq.Version = "v1"

    @property
    def asks(self) -> frozenset[Value]:
        """For v1 the least zero point: one of 0 has no form there."""
        return frozenset({"least"} if self.version == "v1" else ())

    @property
    def words(self) -> str:
        """How reports call it."""
        return f"GPTQ ({self._form})"

    @property
    def _form(self) -> str:
        return "gptq" if self.version == "v1" else "gptq_v2"

    def pack(self, name: str, numbers: Integers, derived: Mapping[str, Derived]) -> Coded:
        """``qweight`` [words, out], ``qzeros`` [groups, words], ``scales`` [groups, out] and ``g_idx`` [in]."""
        made, module = Coded(), name.removesuffix(".weight")
        (rows, columns), grid = numbers.shape, numbers.grid
        bits, groups = grid.bits, grid.groups(columns)
        if bits not in _BITS:
            raise unfit(name, f"codes of {bits} bits", f"{', '.join(map(str, _BITS))} in {self._form}")
        if columns * bits % 32 or rows * bits % 32:
            raise unfit(name, f"[{rows}, {columns}] of {bits} bits", "rows and columns that fill words of 32 bits")
        if self.version == "v1" and not numbers.least:
            raise Refused(
                "a zero point of 0 cannot be written in GPTQ's first format, whose readers would not agree on it, "
                "nothing was written",
                where=f"{module}.qzeros",
                expected="zero points of at least 1, each stored less one",
                do="--quant gptq_v2 stores them as they are",
            )
        words = TensorSpec(f"{module}.qweight", (columns * bits // 32, rows), "i32")
        if (stored := stored_as(numbers.codes, derived, Codes(bits, "stream", columns))) is not None:
            made.parts.append((words, stored.pieces))
        else:
            made.make(words, Derived(words.shape, (numbers.codes,), PackCodes(bits), How(EXACT, True, 32)))
        zeros = TensorSpec(f"{module}.qzeros", (groups, rows * bits // 32), "i32")
        recipe = PackZeros(bits, self.version)
        made.make(zeros, Derived(zeros.shape, (zeros_of(made, name, numbers),), recipe, How(EXACT, True, 32)))
        scales = numbers.scales.in_order((1, 0))
        made.parts.append((TensorSpec(f"{module}.scales", scales.shape, scales.dtype), scales.pieces))
        order = TensorSpec(f"{module}.g_idx", (columns,), "i32")
        if numbers.order is not None:
            made.parts.append((order, numbers.order.pieces))
        else:
            how = How("groups of columns in order", True, 0)
            made.make(order, Derived(order.shape, (), InOrder(grid.size(columns)), how))
        made.grid = grid
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`; most weights' grid is the model's, others are in ``dynamic``."""
        grids = grids_of(coded)
        base = Counter(grids.values()).most_common(1)[0][0]
        dynamic: dict[str, Any] = {rf"-:(.*\.)?{re.escape(entry)}($|\.)": {} for entry in plain}  # the first counts
        dynamic |= {rule: _said(grid) for rule, grid in _rules(grids).items() if grid != base}
        return {
            **_said(base),
            "lm_head": any(place_of(name, (1, 1)).role == "head" for name in coded),
            "method": "gptq",
            "quant_method": METHOD,
            "format": self._form,
            "checkpoint_format": self._form,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [*base.chosen_by, f"dconv:{__version__}"]},
        }

    def note(self, config: Mapping[str, Any]) -> str:
        """See `dconv.coded.repack.Packer`.

        Source: GPTQModel 7.7.0, ``models/loader.py``; zeros that we write have one meaning for all readers.
        """
        programs = config["meta"]["quantizer"]
        if self.version == "v2" or config["sym"] or any(it.startswith("gptqmodel:") for it in programs):
            return ""
        return (
            "GPTQModel, and transformers through it, load zero points in GPTQ's first format from its own writer only: "
            "--quant gptq_v2 is for them"
        )


def _rules(grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """Expressions for modules, each with its grid.

    vLLM asks for its own names (``override_config`` in ``gptq_utils.py``): of a layer's experts for their module, of
    what it fuses for the whole. Where the parts are of one grid these names have a rule, too; GPTQModel has no module
    that they fit.
    """
    experts: dict[str, set[Grid]] = {}
    for name, grid in grids.items():
        experts.setdefault(experts_of(name), set()).add(grid)
    found: dict[str, Grid] = {}
    for name, grid in grids.items():
        layer, (before, _, last) = experts_of(name), name.rpartition(".")
        if layer and len(experts[layer]) == 1:
            found[f"+:^{re.escape(layer)}(\\.|$)"] = grid
            continue
        found[f"+:^{re.escape(name)}$"] = grid
        for fused, parts in FUSED.items():
            if last == parts[0] and {grids.get(f"{before}.{part}") for part in parts} == {grid}:
                found[f"+:^{re.escape(f'{before}.{fused}')}$"] = grid
    return found


def _said(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group, "desc_act": grid.ordered, "sym": grid.symmetric}


@dataclass(frozen=True, slots=True)
class PackCodes:
    """``qweight`` [words, out]; input: codes [out, in]."""

    bits: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Pack the columns whose codes lie, in whole or in part, in the words of the box."""
        del dtype, factor
        (first, top), (count, rows) = box.start, box.shape
        begin, number, at = around(first, count, self.bits)
        codes = read(0, Region((top, begin), (rows, number)), "").view("u1")
        return gptq.pack_weight(codes, self.bits)[at : at + count]


@dataclass(frozen=True, slots=True)
class PackZeros:
    """``qzeros`` [groups, words]; input: zeros [out, groups]."""

    bits: int
    version: gptq.Version

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Pack the rows whose zeros lie, in whole or in part, in the words of the box."""
        del dtype, factor
        (top, first), (groups, count) = box.start, box.shape
        begin, number, at = around(first, count, self.bits)
        zeros = read(0, Region((begin, top), (number, groups)), "").view("u1")
        return gptq.pack_zeros(zeros, self.bits, self.version)[:, at : at + count]


@dataclass(frozen=True, slots=True)
class InOrder:
    """``g_idx`` of columns that nothing moved."""

    size: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Each column's group, by its place; nothing is read."""
        del dtype, factor, read
        return integer.groups_of(box.shape[0], self.size, box.start[0])
