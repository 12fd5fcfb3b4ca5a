"""Whole numbers packed as ``pack-quantized``: ``weight_packed``, ``weight_scale`` and ``weight_shape``.

Zero points are written beside them (``weight_zero_point``) unless all are half the range. Columns in the order of
activations are refused: compressed-tensors 0.20 took ``weight_g_idx`` and ``actorder`` group out, and rejects such a
config. Sources: that version's ``compressors/pack_quantized/base.py`` and ``quantization/quant_args.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import bitpack, packed
from dconv.coded.compressed_encode import BY_TOKEN, config, group_of, targets_of
from dconv.coded.compressed_packed import Codes, Zeros
from dconv.coded.encode import Coded
from dconv.coded.integers import Grid, Integers, around
from dconv.coded.repack import EXACT, Value, grids_of, stored_as, unfit, zeros_of
from dconv.errors import DconvError
from dconv.sharding.derived import Derived, Read
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT: Final = "pack-quantized"


@dataclass(frozen=True)
class Packed:
    """See `dconv.coded.repack.Packer`.

    Attributes:
        activations: whether they are rounded to FP8 as they come.
    """

    activations: bool = False

    @property
    def asks(self) -> frozenset[Value]:
        """The order of columns, and whether every zero is half the range, which then needs no part of its own."""
        return frozenset({"order", "even"})

    @property
    def words(self) -> str:
        """How reports call it."""
        return f"{FORMAT}, for compressed-tensors"

    def pack(self, name: str, numbers: Integers, derived: Mapping[str, Derived]) -> Coded:
        """``weight_packed`` [out, words], scales and ``weight_shape``; zero points [words, groups] unless symmetric."""
        made, (rows, columns), bits = Coded(), numbers.shape, numbers.grid.bits
        grid = _grid(name, numbers)
        words = TensorSpec(f"{name}_packed", (rows, bitpack.words_for(columns, bits)), "i32")
        if (stored := stored_as(numbers.codes, derived, Codes(bits, "stream", columns))) is not None:
            made.parts.append((words, stored.pieces))
        else:
            recipe = PackCodes(bits, columns)
            made.make(words, Derived(words.shape, (numbers.codes,), recipe, How(EXACT, True, 32)))
        scales = numbers.scales
        made.parts.append((TensorSpec(f"{name}_scale", scales.shape, scales.dtype), scales.pieces))
        shape = TensorSpec(f"{name}_shape", (2,), "i64")
        made.make(shape, Derived((2,), (), Shape(numbers.shape), How("rows and columns", True, 0)))
        if not grid.symmetric:
            zeros = zeros_of(made, name, numbers)
            words = TensorSpec(f"{name}_zero_point", (bitpack.words_for(rows, bits), zeros.shape[1]), "i32")
            if (stored := stored_as(zeros, derived, Zeros(bits, "stream", rows))) is not None:
                made.parts.append((words, stored.pieces))
            else:
                made.make(words, Derived(words.shape, (zeros,), PackZeros(bits, rows), How(EXACT, True, 32)))
        made.grid = grid
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`; where weights have several grids every group names its modules."""
        grids = grids_of(coded)
        counted = [grid for grid, _ in Counter(grids.values()).most_common()]
        named = [[module for module, its in grids.items() if its == grid] for grid in counted]
        others = ((module for module, its in grids.items() if its != grid) for grid in counted)
        targets = list(map(targets_of, named, others)) if len(counted) > 1 else [["Linear"]]
        rounded = BY_TOKEN if self.activations else None
        groups = [group_of(FORMAT, _said(grid), rounded, names) for grid, names in zip(counted, targets, strict=True)]
        return config(groups, plain)

    def note(self, config: Mapping[str, Any]) -> str:
        """See `dconv.coded.repack.Packer`. Source: transformers 5.23 with compressed-tensors 0.20, run."""
        if all(group["weights"]["symmetric"] for group in config["config_groups"].values()):
            return ""
        return (
            f"transformers 5.23 loads {FORMAT} weights with zero points of linear layers only, and with "
            "CompressedTensorsConfig(dequantize=True) only"
        )


def _grid(name: str, numbers: Integers) -> Grid:
    """What the config says of a weight.

    Raises:
        Refused: the numbers do not fit the format.
    """
    (rows, columns), grid = numbers.shape, numbers.grid
    if numbers.order is not None:
        raise unfit(
            name,
            "columns in the order of activations (g_idx)",
            "columns in order: compressed-tensors 0.20 has no other",
            "FORMAT gptq keeps the order, FORMAT hf decodes them",
        )
    group = -1 if grid.groups(columns) == 1 and columns != grid.group else grid.group
    if group > 0 and columns % group:
        raise unfit(name, f"{columns} columns in groups of {group}", "columns of whole groups")
    try:
        bitpack.layout_of(columns, bitpack.words_for(columns, grid.bits), grid.bits)
    except DconvError:
        what = f"[{rows}, {columns}] of {grid.bits} bits"
        raise unfit(name, what, "columns whose words tell how they are packed") from None
    return replace(grid, group=group, symmetric=numbers.zeros == packed.middle(grid.bits))


def _said(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group > 0 else "channel",
        "group_size": grid.group if grid.group > 0 else None,
    }


@dataclass(frozen=True, slots=True)
class PackCodes:
    """``weight_packed`` [out, words]; input: codes [out, in]."""

    bits: int
    columns: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Pack the columns whose codes lie, in whole or in part, in the words of the box."""
        del dtype, factor
        (top, first), (rows, count) = box.start, box.shape
        begin, number, at = around(first, count, self.bits)
        codes = read(0, Region((top, begin), (rows, min(number, self.columns - begin))), "").view("u1")
        return packed.pack_weight(codes, self.bits)[:, at : at + count]


@dataclass(frozen=True, slots=True)
class PackZeros:
    """``weight_zero_point`` [words, groups]; input: zeros [out, groups]."""

    bits: int
    rows: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Pack the rows whose zeros lie, in whole or in part, in the words of the box."""
        del dtype, factor
        (first, left), (count, groups) = box.start, box.shape
        begin, number, at = around(first, count, self.bits)
        zeros = read(0, Region((begin, left), (min(number, self.rows - begin), groups)), "").view("u1")
        return packed.pack_zeros(zeros, self.bits)[at : at + count]


@dataclass(frozen=True, slots=True)
class Shape:
    """``weight_shape``, i64 [2]; no inputs."""

    shape: tuple[int, int]

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Rows and columns as i64; nothing is read."""
        del dtype, factor, read
        return np.array(self.shape, "<i8")[box.start[0] : box.start[0] + box.shape[0]]
