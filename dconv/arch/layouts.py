"""The structural kinds that an architecture table names in its third column.

Each is a function of symbolic dimensions ("hidden", "ffn", …), resolved against a model's facts when the table is
applied. A kind says which axis tensor parallelism cuts and how several logical tensors share one Megatron tensor.
Source of the QKV and gate/up orders: ``megatron/core/transformer/attention.py`` and ``mlp.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dconv.errors import Refused
from dconv.sharding.layout import Fused, Part, Run
from dconv.sharding.tensor import TensorSpec

#: What shapes follow from: a size (int), a switch (bool), or a switch for each layer (tuple of bools).
Facts = Mapping[str, Any]
#: (facts, logical names) -> (logical shapes, parts along the fused axis)
_Shape = Callable[[Facts, Sequence[str]], tuple[list[tuple[int, ...]], tuple[Part, ...]]]


@dataclass(frozen=True, slots=True)
class Layout:
    """A structural kind with its dimensions filled in by name."""

    shape: _Shape
    axis: int
    parallel: bool
    padded: bool = False

    def fuse(self, megatron: str, logical: Sequence[str], facts: Facts, dtype: str) -> Fused:
        """The Megatron tensor ``megatron`` made of the logical tensors ``logical``."""
        shapes, parts = self.shape(facts, logical)
        specs = tuple(TensorSpec(name, shape, dtype) for name, shape in zip(logical, shapes, strict=True))
        order = tuple(range(len(shapes[0])))
        return Fused(megatron, self.axis, self.parallel, parts, specs, order, self.padded)


def _plain(axis: int, dims: Sequence[str]) -> _Shape:
    def shape(facts: Facts, logical: Sequence[str]) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        sizes = tuple(int(facts[dim]) for dim in dims)
        return [sizes] * len(logical), tuple(Part((Run(name, 0, sizes[axis]),)) for name in logical)

    return shape


def rows(*dims: str) -> Layout:
    """Cut along the first axis (column parallel); several logical tensors are cut each by itself."""
    return Layout(_plain(0, dims), axis=0, parallel=True)


def columns(*dims: str) -> Layout:
    """Cut along the second axis (row parallel)."""
    return Layout(_plain(1, dims), axis=1, parallel=True)


def copied(*dims: str) -> Layout:
    """Every rank holds it whole."""
    return Layout(_plain(0, dims), axis=0, parallel=False)


def vocab_rows(*dims: str) -> Layout:
    """Cut along the vocabulary, which is padded so that it divides."""
    return Layout(_plain(0, dims), axis=0, parallel=True, padded=True)


#: Gate and up: two parts of ``ffn`` rows, each cut by itself.
gate_up = rows


def gate_up_in_one(*dims: str) -> Layout:
    """One logical tensor whose first half of rows is gate and whose second is up; otherwise as `gate_up`."""

    def shape(facts: Facts, logical: Sequence[str]) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        ffn, *rest = (int(facts[dim]) for dim in dims)
        return [(2 * ffn, *rest)], tuple(Part((Run(logical[0], half, ffn),)) for half in (0, ffn))

    return Layout(shape, axis=0, parallel=True)


def heads_divide(facts: Facts, tp: int) -> bool:
    """Whether each tensor-parallel rank gets whole query heads, and whole query groups or an equal share of one.

    Source: ``megatron/core/transformer/attention.py`` and ``transformer_config.py``.
    """
    heads, groups = int(facts["heads"]), int(facts["groups"])
    rows = (heads + 2 * groups) * int(facts["head_dim"])
    return heads % tp == 0 and (groups % tp == 0 or tp % groups == 0) and rows % tp == 0


def check_heads(facts: Facts, tp: int) -> None:
    """Refuse a tensor-parallel size that Megatron's attention does not run with.

    Raises:
        Refused: see `heads_divide`.
    """
    if not heads_divide(facts, tp):
        heads = int(facts["heads"])
        raise Refused(
            f"the attention heads do not divide over tensor parallel {tp}, nothing was written",
            where="--tp",
            expected="a divisor of the query heads that divides the query groups or is a multiple of them",
            found=f"{heads} query heads in {facts['groups']} query groups",
            do="--tp " + ", ".join(str(n) for n in range(1, heads + 1) if heads_divide(facts, n)),
        )


def query_groups(*dims: str) -> Layout:
    """Query, key and value interleaved by query group: [all q heads of group 0, k 0, v 0, q heads of group 1, …].

    ``dims`` are the axes after the rows: none for a bias. Tensor parallelism cuts the rows in this order, also through
    the middle of a group when there are fewer groups than ranks.
    """

    def shape(facts: Facts, logical: Sequence[str]) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        heads, groups, size = int(facts["heads"]), int(facts["groups"]), int(facts["head_dim"])
        rest = tuple(int(facts[dim]) for dim in dims)
        per_group = (heads // groups * size, size, size)
        runs = tuple(
            Run(name, group * n, n) for group in range(groups) for name, n in zip(logical, per_group, strict=True)
        )
        return [(groups * n, *rest) for n in per_group], (Part(runs),)

    return Layout(shape, axis=0, parallel=True)


def query_groups_in_one(*dims: str) -> Layout:
    """One logical tensor that holds [all q heads, all k heads, all v heads]; otherwise as `query_groups`."""

    def shape(facts: Facts, logical: Sequence[str]) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        heads, groups, size = int(facts["heads"]), int(facts["groups"]), int(facts["head_dim"])
        rest = tuple(int(facts[dim]) for dim in dims)
        starts, per_group = (0, heads * size, (heads + groups) * size), (heads // groups * size, size, size)
        runs = tuple(
            Run(logical[0], start + group * n, n)
            for group in range(groups)
            for start, n in zip(starts, per_group, strict=True)
        )
        return [((heads + 2 * groups) * size, *rest)], (Part(runs),)

    return Layout(shape, axis=0, parallel=True)
