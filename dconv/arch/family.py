"""What a model family is: a table of names, a config translation, and nothing else.

The engine reads the same table in both directions; an inverse is derived, never written.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

from dconv.arch.layouts import Facts, Layout
from dconv.arch.translate import Config
from dconv.sharding.layout import Fused


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a family's table.

    Attributes:
        megatron: Megatron's global name; ``*`` is the layer number.
        hf: HuggingFace's name; ``{q,k,v}`` spells several, in the layout's order.
        layout: the structural kind.
        when: the fact that must hold for the row to exist ("" means always).
    """

    megatron: str
    hf: str
    layout: Layout
    when: str = ""

    @property
    def per_layer(self) -> bool:
        return "*" in self.megatron

    @property
    def logical(self) -> tuple[str, ...]:
        """HuggingFace's names with the braces spelled out."""
        fields = [piece.split(",") for piece in re.split(r"[{}]", self.hf)]
        return tuple("".join(parts) for parts in itertools.product(*fields))


@dataclass(frozen=True)
class Entry:
    """A row applied to a model: one Megatron tensor and the place it has in the pipeline.

    Attributes:
        layer: global layer number, or -1.
        row: the row it came from.
    """

    fused: Fused
    row: Row
    layer: int

    @property
    def first_stage(self) -> bool:
        return self.layer < 0 and self.row.megatron.startswith("embedding.")


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: what ``--model-type`` takes.
        config: how config.json and Megatron's args translate.
        rows: the table.
        recomputed: HuggingFace tensors that carry no weights, with the reason they may be left out.
    """

    name: str
    config: Config
    rows: tuple[Row, ...]
    recomputed: tuple[tuple[str, str], ...] = ()

    def derive(self, name: str, config: Config, add: tuple[Row, ...] = (), drop: tuple[str, ...] = ()) -> Family:
        """A variant: this family's rows less those whose Megatron name is in ``drop``, plus ``add``."""
        kept = tuple(row for row in self.rows if row.megatron not in drop)
        return replace(self, name=name, config=config, rows=kept + add)

    def entries(self, facts: Facts, dtypes: Mapping[str, str] | None = None) -> Iterator[Entry]:
        """Every Megatron tensor of a model with these facts, in the model's own order.

        Args:
            dtypes: dtype of each logical tensor where known (bf16 otherwise).
        """
        rows = [row for row in self.rows if not row.when or facts[row.when]]
        first = [row for row in rows if not row.per_layer and row.megatron.startswith("embedding.")]
        last = [row for row in rows if not row.per_layer and row not in first]
        layered = [row for row in rows if row.per_layer]
        for row in first:
            yield self._entry(row, -1, facts, dtypes)
        for layer in range(int(facts["layers"])):
            for row in layered:
                yield self._entry(row, layer, facts, dtypes)
        for row in last:
            yield self._entry(row, -1, facts, dtypes)

    def _entry(self, row: Row, layer: int, facts: Facts, dtypes: Mapping[str, str] | None) -> Entry:
        number = str(layer)
        logical = [name.replace("*", number) for name in row.logical]
        dtype = dtypes.get(logical[0], "bf16") if dtypes else "bf16"
        return Entry(row.layout.fuse(row.megatron.replace("*", number), logical, facts, dtype), row, layer)

    def reason_to_leave_out(self, name: str, facts: Facts) -> str:
        """Why a HuggingFace tensor that no row names may be left out; empty when it may not."""
        if facts["tied"] and name == TIED_HEAD:
            return "tied to the input embedding by the config"
        return next((reason for pattern, reason in self.recomputed if fnmatchcase(name, pattern)), "")


#: Where a tied model may still store a second copy of its embedding.
TIED_HEAD: Final = "lm_head.weight"
