"""Whole numbers that a source has, packed as GPTQ or AWQ: no weight changes, since nothing is rounded.

Choosing such numbers for a plain weight takes calibration, which is another matter; without numbers these formats are
refused. Sources of the configs: GPTQModel 7.7.0, ``QuantizeConfig.to_dict``; AutoAWQ 0.2.9,
``AwqConfig.to_transformers_dict``; vLLM's ``gptq.py`` and ``awq.py`` for what a loader needs of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv import __version__
from dconv.codec import awq, bitpack, gptq, integer
from dconv.coded import awq as awq_source
from dconv.coded.encode import Coded
from dconv.coded.gptq import Codes
from dconv.coded.integers import Grid, Integers, integers_of, turned
from dconv.coded.places import place_of
from dconv.errors import DconvError, Refused, group_names
from dconv.sharding.derived import Array, Derived, Read
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Widths that all readers of GPTQ's first two formats have.
_GPTQ_BITS: Final = (2, 3, 4, 8)
_EXACT: Final = "the source's whole numbers, packed anew"


def weights_of(logical: Logical, words: str) -> set[str]:
    """The weights that a source has as whole numbers.

    Raises:
        Refused: it has none, or has some in a form that cannot be packed anew.
    """
    dense = {name: Array(spec.shape, spec.dtype, logical.pieces[name], logical.replicas.get(name, ()))
             for name, spec in logical.specs.items()}  # fmt: skip
    found = {name for name, array in dense.items() if integers_of(name, array, logical)}
    if not found:
        raise Refused(
            f"{words} from weights that are not whole numbers needs calibration, which this version does not have, "
            "nothing was written",
            where=group_names(list(logical.specs)[:1]),
            expected="a source in GPTQ or AWQ, whose whole numbers are kept",
            found="plain weights, or codes of another kind",
            do="quantise it with GPTQModel or llm-compressor, and convert what they write; FORMAT fp8 needs none",
        )
    return found


@dataclass(frozen=True)
class GPTQ:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``.

    Attributes:
        version: v1 stores zeros less one.
    """

    version: gptq.Version = "v1"
    columns: int = field(default=1, init=False)

    @property
    def words(self) -> str:
        """For a person."""
        return f"GPTQ ({self._form})"

    @property
    def _form(self) -> str:
        return "gptq" if self.version == "v1" else "gptq_v2"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """See `dconv.coded.encode.Scheme`."""
        made, module, found = Coded(kept=True), spec.name.removesuffix(".weight"), _numbers(spec, dense, logical)
        (rows, columns), grid = found.shape, found.grid
        bits, size = grid.bits, grid.size(columns)
        if bits not in _GPTQ_BITS:
            raise _unfit(spec.name, f"codes of {bits} bits", f"{', '.join(map(str, _GPTQ_BITS))} in {self._form}")
        if columns * bits % 32 or rows * bits % 32:
            raise _unfit(
                spec.name, f"[{rows}, {columns}] of {bits} bits", "rows and columns that fill words of 32 bits"
            )
        groups = found.zeros.shape[1]
        words = TensorSpec(f"{module}.qweight", (columns * bits // 32, rows), "i32")
        if (stored := _source(found.codes, logical, Codes(bits, "stream", columns))) is not None:
            made.parts.append((words, stored.pieces))
        else:
            made.make(words, Derived(words.shape, (found.codes,), PackCodes(bits), How(_EXACT, True, 32)))
        zeros = TensorSpec(f"{module}.qzeros", (groups, rows * bits // 32), "i32")
        recipe = PackZeros(zeros.name, bits, self.version)
        made.make(zeros, Derived(zeros.shape, (found.zeros,), recipe, How(_EXACT, True, 32)))
        scales = turned(found.scales)
        made.parts.append((TensorSpec(f"{module}.scales", scales.shape, scales.dtype), scales.pieces))
        order = TensorSpec(f"{module}.g_idx", (columns,), "i32")
        if found.order is not None:
            made.parts.append((order, found.order.pieces))
        else:
            made.make(order, Derived(order.shape, (), InOrder(size), How("groups of columns in order", True, 0)))
        made.grid = grid
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`; most weights' grid is the model's, others are in ``dynamic``."""
        grids = _grids(coded)
        base = Counter(grids.values()).most_common(1)[0][0]
        dynamic = {f"+:^{re.escape(name)}$": _said(grid) for name, grid in grids.items() if grid != base}
        dynamic |= {rf"-:(.*\.)?{re.escape(entry)}($|\.)": {} for entry in plain}
        return {
            **_said(base),
            "lm_head": any(place_of(name, (1, 1)).role == "head" for name in coded),
            "method": "gptq",
            "quant_method": "gptq",
            "format": self._form,
            "checkpoint_format": self._form,
            "pack_dtype": "int32",
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {"quantizer": [*base.chosen_by, f"dconv:{__version__}"]},
        }

    def note(self, config: Mapping[str, Any]) -> str:
        """What a person should know of an output with this config; "" where there is nothing.

        Source: GPTQModel 7.7.0, ``models/loader.py``; zeros that we write have one meaning for all readers.
        """
        programs = config["meta"]["quantizer"]
        if self.version == "v2" or config["sym"] or any(it.startswith("gptqmodel:") for it in programs):
            return ""
        return (
            "GPTQModel, and transformers through it, load zero points in GPTQ's first format from its own writer only: "
            "--quant gptq_v2 is for them"
        )


@dataclass(frozen=True)
class AWQ:
    """``qweight``, ``qzeros`` and ``scales``, version gemm."""

    columns: int = field(default=1, init=False)

    @property
    def words(self) -> str:
        """For a person."""
        return "AWQ (gemm)"

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """See `dconv.coded.encode.Scheme`."""
        made, module, found = Coded(kept=True), spec.name.removesuffix(".weight"), _numbers(spec, dense, logical)
        (rows, columns), grid = found.shape, found.grid
        if grid.bits != awq_source.BITS:
            raise _unfit(spec.name, f"codes of {grid.bits} bits", f"codes of {awq_source.BITS} bits in AWQ")
        if grid.ordered:
            raise _disorder(spec.name)
        if rows % awq_source.PER_WORD or columns % grid.size(columns):
            raise _unfit(
                spec.name,
                f"[{rows}, {columns}] in groups of {grid.group}",
                "rows of whole words, columns of whole groups",
            )
        if place_of(spec.name, spec.shape).role == "head":
            raise _unfit(spec.name, "an output layer in codes", "a plain one, as AWQ's loaders take it")
        unpack, listed = awq_source.Numbers(rows), (found.order,) if found.order is not None else ()
        pack = Pack(spec.name, grid.size(columns) if listed else 0)
        for part, numbers, others, recipe in (
            ("qweight", found.codes, listed, pack), ("qzeros", found.zeros, (), Pack(spec.name)),
        ):  # fmt: skip
            words = TensorSpec(f"{module}.{part}", (numbers.shape[1], rows // awq_source.PER_WORD), "i32")
            if (stored := _source(numbers, logical, unpack)) is not None:
                made.parts.append((words, stored.pieces))
            else:
                made.make(words, Derived(words.shape, (numbers, *others), recipe, How(_EXACT, True, 32)))
        scales = turned(found.scales)
        made.parts.append((TensorSpec(f"{module}.scales", scales.shape, scales.dtype), scales.pieces))
        made.grid = grid
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`.

        Raises:
            Refused: weights in groups of different sizes, for which AWQ's config has no words.
        """
        sizes = {name: grid.group for name, grid in _grids(coded).items()}
        if len(set(sizes.values())) > 1:
            base = Counter(sizes.values()).most_common(1)[0][0]
            others = [name for name, size in sizes.items() if size != base]
            raise _unfit(group_names(others), f"groups of {sizes[others[0]]}", f"groups of {base}, as the others have")
        return {
            "quant_method": "awq",
            "bits": awq_source.BITS,
            "group_size": next(iter(sizes.values())),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain or None,
        }


@dataclass(frozen=True, slots=True)
class PackCodes:
    """GPTQ's ``qweight`` [words, out]; input: codes [out, in]."""

    bits: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        del dtype, factor
        (first, top), (count, rows) = box.start, box.shape
        begin, number, at = _codes(first, count, self.bits)
        codes = read(0, Region((top, begin), (rows, number)), "").view("u1")
        return gptq.pack_weight(codes, self.bits)[at : at + count]


@dataclass(frozen=True, slots=True)
class PackZeros:
    """GPTQ's ``qzeros`` [groups, words], called ``name``; input: zeros [out, groups]."""

    name: str
    bits: int
    version: gptq.Version

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        del dtype, factor
        (top, first), (groups, count) = box.start, box.shape
        begin, number, at = _codes(first, count, self.bits)
        zeros = read(0, Region((begin, top), (number, groups)), "").view("u1")
        try:
            return gptq.pack_zeros(zeros, self.bits, self.version)[:, at : at + count]
        except DconvError as error:
            error.where = self.name
            raise


@dataclass(frozen=True, slots=True)
class Pack:
    """AWQ's ``qweight`` [in, words] of ``name``, or ``qzeros`` [groups, words]; input: codes [out, in], or zeros.

    Attributes:
        size: of the groups that columns must be in; then the second input has the groups that they are in.
    """

    name: str
    size: int = 0

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        del dtype, factor
        (left, first), (columns, count) = box.start, box.shape
        if self.size:
            groups = read(1, Region((left,), (columns,)), "").view("<i4")
            if not np.array_equal(groups, integer.groups_of(columns, self.size, left)):
                raise _disorder(self.name)
        region = Region((first * awq_source.PER_WORD, left), (count * awq_source.PER_WORD, columns))
        return awq.pack(read(0, region, "").view("u1"))


@dataclass(frozen=True, slots=True)
class InOrder:
    """``g_idx`` of columns that nothing moved."""

    size: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        del dtype, factor, read
        return integer.groups_of(box.shape[0], self.size, box.start[0])


def _codes(first: int, count: int, bits: int) -> tuple[int, int, int]:
    """Codes that fill whole words around ``count`` of them from ``first`` on: start, count, the word's place."""
    codes, words = bitpack.period(bits)
    low = first // words
    high = -(-(first + count) // words)
    return low * codes, (high - low) * codes, first - low * words


def _numbers(spec: TensorSpec, dense: Array, logical: Logical) -> Integers:
    found = integers_of(spec.name, dense, logical)
    if found is None:
        raise ValueError(f"{spec.name} is not made of whole numbers")
    return found


def _source(array: Array, logical: Logical, recipe: object) -> Array | None:
    """What numbers are unpacked from, where that is what they would be packed to."""
    derived = logical.derived.get(array.pieces[0].file)
    return derived.inputs[0] if derived and derived.recipe == recipe else None


def _grids(coded: Mapping[str, Coded]) -> dict[str, Grid]:
    """By module."""
    return {name.removesuffix(".weight"): one.grid for name, one in coded.items() if one.grid}


def _said(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group, "desc_act": grid.ordered, "sym": grid.symmetric}


def _unfit(where: str, found: str, expected: str) -> Refused:
    return Refused(
        "whole numbers of the source do not fit the format without a new rounding, nothing was written",
        where=where,
        expected=expected,
        found=found,
        do="FORMAT hf decodes them",
    )


def _disorder(where: str) -> Refused:
    return _unfit(where, "columns in the order of activations (desc_act, g_idx)", "columns in order: AWQ has no other")
