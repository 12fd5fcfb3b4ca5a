"""Whole numbers packed as AWQ: ``qweight``, ``qzeros`` and ``scales``, version gemm.

Sources: AutoAWQ 0.2.9, ``AwqConfig.to_transformers_dict``; vLLM's ``awq.py`` for what a loader needs of the config.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dconv.codec import awq
from dconv.coded.awq import BITS, METHOD, PER_WORD, Numbers
from dconv.coded.encode import Coded
from dconv.coded.integers import Integers
from dconv.coded.places import place_of
from dconv.coded.repack import EXACT, Value, grids_of, stored_as, unfit, zeros_of
from dconv.errors import group_names
from dconv.sharding.derived import Derived, Read
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: How the language model of one that sees begins where transformers 5 has all of it inside of ``model``, and takes an
#: entry for the beginning of a module's name there.
_INSIDE: Final = "language_model."


@dataclass(frozen=True)
class AWQ:
    """AutoAWQ's ``gemm`` layout of whole numbers of 4 bits, a `dconv.coded.repack.Packer`."""

    @property
    def asks(self) -> frozenset[Value]:
        """Whether columns are in order: there is no place for another one."""
        return frozenset({"order"})

    @property
    def words(self) -> str:
        """How reports call it."""
        return "AWQ (gemm)"

    def pack(self, name: str, numbers: Integers, derived: Mapping[str, Derived]) -> Coded:
        """``qweight`` [in, words], ``qzeros`` [groups, words] and ``scales`` [groups, out] of numbers of 4 bits."""
        made, module = Coded(), name.removesuffix(".weight")
        (rows, columns), grid = numbers.shape, numbers.grid
        if grid.bits != BITS:
            raise unfit(name, f"codes of {grid.bits} bits", f"codes of {BITS} bits in AWQ")
        if numbers.order is not None:
            raise unfit(name, "columns in the order of activations (g_idx)", "columns in order: AWQ has no other")
        if rows % PER_WORD or columns % grid.size(columns):
            what = f"[{rows}, {columns}] in groups of {grid.group}"
            raise unfit(name, what, "rows of whole words, columns of whole groups")
        if place_of(name, numbers.shape).role == "head":
            raise unfit(name, "an output layer in codes", "a plain one, as AWQ's loaders take it")
        for part, found in (("qweight", numbers.codes), ("qzeros", zeros_of(made, name, numbers))):
            words = TensorSpec(f"{module}.{part}", (found.shape[1], rows // PER_WORD), "i32")
            if (stored := stored_as(found, derived, Numbers(rows))) is not None:
                made.parts.append((words, stored.pieces))
            else:
                made.make(words, Derived(words.shape, (found,), Pack(), How(EXACT, True, 32)))
        scales = numbers.scales.in_order((1, 0))
        made.parts.append((TensorSpec(f"{module}.scales", scales.shape, scales.dtype), scales.pieces))
        made.grid = grid
        return made

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """See `dconv.coded.encode.Scheme`.

        Raises:
            Refused: weights in groups of different sizes, for which AWQ's config has no words.
        """
        sizes = {name: grid.group for name, grid in grids_of(coded).items()}
        if len(set(sizes.values())) > 1:
            base = Counter(sizes.values()).most_common(1)[0][0]
            others = [name for name, size in sizes.items() if size != base]
            raise unfit(group_names(others), f"groups of {sizes[others[0]]}", f"groups of {base}, as the others have")
        if any(name.startswith(_INSIDE) for name in coded):
            plain = [*plain, *(f"model.{entry}" for entry in plain)]
        return {
            "quant_method": METHOD,
            "bits": BITS,
            "group_size": next(iter(sizes.values())),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": plain or None,
        }

    def note(self, config: Mapping[str, Any]) -> str:
        """Always "": there is nothing to know."""
        del config
        return ""


@dataclass(frozen=True, slots=True)
class Pack:
    """``qweight`` [in, words] or ``qzeros`` [groups, words]; input: codes [out, in], or zeros [out, groups]."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Pack all rows of the words in the box; a word has `PER_WORD` of them."""
        del dtype, factor
        (left, first), (columns, count) = box.start, box.shape
        region = Region((first * PER_WORD, left), (count * PER_WORD, columns))
        return awq.pack(read(0, region, "").view("u1"))
