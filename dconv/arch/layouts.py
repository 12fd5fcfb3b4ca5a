"""The structural kinds that an architecture table names in its third column.

Each is a function of symbolic dimensions ("hidden", "ffn", …), resolved against a model's facts when the table is
applied. A kind says which axis tensor parallelism cuts and how several logical tensors share one Megatron tensor.
Source of the QKV and gate/up orders: ``megatron/core/transformer/attention.py`` and ``mlp.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dconv.errors import Damaged, Refused
from dconv.sharding.layout import Fused, Part, Run
from dconv.sharding.tensor import TensorSpec

#: What shapes follow from: a size (int), a switch (bool), or a switch for each layer (tuple of bools).
Facts = Mapping[str, Any]
#: (facts, logical names, expert) -> (logical shapes, parts along the fused axis)
_Shape = Callable[[Facts, Sequence[str], int], tuple[list[tuple[int, ...]], tuple[Part, ...]]]


def size(facts: Facts, dim: str) -> int:
    """A fact that is one number (0 where the model has no such thing), a number itself, or ``2 hidden``: a product."""
    return math.prod(int(word) if word.isdecimal() else int(facts.get(word, 0)) for word in dim.split())


@dataclass(frozen=True, slots=True)
class Layout:
    """A structural kind with its dimensions filled in by name.

    Attributes:
        shape: gives the logical shapes and the parts.
        axis, parallel, padded, either: as in `dconv.sharding.layout.Fused`.
        order: the logical axis behind each fused axis; None for all in order.
        joined: whether files join the last two logical axes into one.
        stored: whether the shape is that of the source's tensor.
    """

    shape: _Shape
    axis: int
    parallel: bool
    padded: bool = False
    either: bool = False
    order: tuple[int, ...] | None = None
    joined: bool = False
    stored: bool = False

    def fuse(self, megatron: str, logical: Sequence[str], facts: Facts, dtype: str, expert: int = -1) -> Fused:
        """The Megatron tensor ``megatron`` made of the logical tensors ``logical``."""
        shapes, parts = self.shape(facts, logical, expert)
        specs = tuple(
            TensorSpec(name, shape, dtype, (*shape[:-2], shape[-2] * shape[-1]) if self.joined else None)
            for name, shape in zip(logical, shapes, strict=True)
        )
        order = tuple(range(len(shapes[0]))) if self.order is None else self.order
        return Fused(megatron, self.axis, self.parallel, parts, specs, order, self.padded, self.either)


def _plain(axis: int, dims: Sequence[str]) -> _Shape:
    def shape(facts: Facts, logical: Sequence[str], _: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        sizes = tuple(size(facts, dim) for dim in dims)
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


def rows_or_copied(*dims: str) -> Layout:
    """Cut along the first axis by some layer specs and whole in others (the down-projections of latent attention)."""
    return replace(rows(*dims), either=True)


def as_stored() -> Layout:
    """Every rank holds it whole, in the shape that the source has: no config says it (see `Family.facts`)."""

    def shape(facts: Facts, logical: Sequence[str], _: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        stored = facts.get("stored", {})
        if logical[0] not in stored:
            raise Damaged("a tensor is missing", where=logical[0], expected="what other layers of its kind have")
        sizes = stored[logical[0]]
        return [sizes], (Part((Run(logical[0], 0, sizes[0] if sizes else 1),)),)

    return Layout(shape, axis=0, parallel=False, stored=True)


def transposed(layout: Layout) -> Layout:
    """The same where HuggingFace stores [in, out] (GPT-2's ``Conv1D``)."""

    def shape(facts: Facts, logical: Sequence[str], expert: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        shapes, parts = layout.shape(facts, logical, expert)
        return [tuple(reversed(sizes)) for sizes in shapes], parts

    return replace(layout, shape=shape, order=(1, 0))


def led(layout: Layout, by: int) -> Layout:
    """The same behind ``by`` axes of length 1 that HuggingFace does not have; it has one axis."""
    return replace(layout, axis=layout.axis + by, order=(-1,) * by + (0,))


#: Gate and up: two parts of ``ffn`` rows, each cut by itself.
gate_up = rows


def parts_in_one(parts: Sequence[str], *dims: str) -> Layout:
    """One logical tensor whose first axis is ``parts`` one behind the other, each cut by itself; ``dims`` follow it."""

    def shape(facts: Facts, logical: Sequence[str], _: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        lengths = [size(facts, part) for part in parts]
        starts = itertools.accumulate(lengths, initial=0)
        whole = (sum(lengths), *(size(facts, dim) for dim in dims))
        return [whole], tuple(Part((Run(logical[0], at, n),)) for at, n in zip(starts, lengths, strict=False))

    return Layout(shape, axis=0, parallel=True)


def gate_up_in_one(*dims: str) -> Layout:
    """One logical tensor whose first half of rows is gate and whose second is up; otherwise as `gate_up`."""
    return parts_in_one((dims[0], dims[0]), *dims[1:])


def _heads(facts: Facts, of: str) -> tuple[int, int, int]:
    """Query heads, query groups, and the width of a head; ``of`` stands before the names of these facts."""
    return size(facts, f"{of}heads"), size(facts, f"{of}groups"), size(facts, f"{of}head_dim")


def _heads_that_do_not_divide(facts: Facts, tp: int) -> str:
    for of, whose in (("", ""), ("vision_", " of the vision tower")):
        heads, groups, width = _heads(facts, of)
        if heads % tp or (groups % tp and tp % groups) or (heads + 2 * groups) * width % tp:
            return f"{heads} query heads in {groups} query groups{whose}"
    heads, groups = size(facts, "mamba_heads"), size(facts, "mamba_groups")
    return f"{heads} Mamba heads in {groups} groups" if heads % tp or groups % tp else ""


def heads_divide(facts: Facts, tp: int) -> bool:
    """Whether each tensor-parallel rank gets whole query heads, and whole query groups or an equal share of one.

    The same of a vision tower; of a Mamba mixer, whole heads and whole groups. Source:
    ``megatron/core/transformer/attention.py``, ``transformer_config.py`` and ``megatron/core/ssm/mamba_mixer.py``.
    """
    return not _heads_that_do_not_divide(facts, tp)


def check_heads(facts: Facts, tp: int) -> None:
    """Refuse a tensor-parallel size that Megatron's attention or its Mamba mixer does not run with.

    Raises:
        Refused: see `heads_divide`.
    """
    found = _heads_that_do_not_divide(facts, tp)
    if not found:
        return
    most = max(size(facts, "heads"), size(facts, "mamba_heads"))
    mamba = "a divisor of the heads and of the groups"
    raise Refused(
        f"the {'Mamba' if 'Mamba' in found else 'attention'} heads do not divide over tensor parallel {tp}, "
        "nothing was written",
        where="--tp",
        expected=mamba
        if "Mamba" in found
        else "a divisor of the query heads that divides the query groups or is a multiple of them",
        found=found,
        do="--tp " + ", ".join(str(n) for n in range(1, most + 1) if heads_divide(facts, n)),
    )


def query_groups(*dims: str, of: str = "") -> Layout:
    """Query, key and value interleaved by query group: [all q heads of group 0, k 0, v 0, q heads of group 1, …].

    ``dims`` are the axes after the rows: none for a bias. Tensor parallelism cuts the rows in this order, also through
    the middle of a group when there are fewer groups than ranks. ``of`` stands before the names of the facts.
    """

    def shape(facts: Facts, logical: Sequence[str], _: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        heads, groups, width = _heads(facts, of)
        rest = tuple(size(facts, dim) for dim in dims)
        per_group = (heads // groups * width, width, width)
        runs = tuple(
            Run(name, group * n, n) for group in range(groups) for name, n in zip(logical, per_group, strict=True)
        )
        return [(groups * n, *rest) for n in per_group], (Part(runs),)

    return Layout(shape, axis=0, parallel=True)


def key_value_groups(*dims: str) -> Layout:
    """Key and value alone, interleaved by query group as in `query_groups` (attention to another stack)."""

    def shape(facts: Facts, logical: Sequence[str], _: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        _, groups, width = _heads(facts, "")
        rest = tuple(size(facts, dim) for dim in dims)
        runs = tuple(Run(name, group * width, width) for group in range(groups) for name in logical)
        return [(groups * width, *rest)] * len(logical), (Part(runs),)

    return Layout(shape, axis=0, parallel=True)


def query_groups_in_one(*dims: str) -> Layout:
    """One logical tensor that holds [all q heads, all k heads, all v heads]; otherwise as `query_groups`."""

    def shape(facts: Facts, logical: Sequence[str], _: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        heads, groups, width = _heads(facts, "")
        rest = tuple(size(facts, dim) for dim in dims)
        starts, per_group = (0, heads * width, (heads + groups) * width), (heads // groups * width, width, width)
        runs = tuple(
            Run(logical[0], start + group * n, n)
            for group in range(groups)
            for start, n in zip(starts, per_group, strict=True)
        )
        return [((heads + 2 * groups) * width, *rest)], (Part(runs),)

    return Layout(shape, axis=0, parallel=True)


def expert_of(*dims: str, axis: int, parallel: bool = True) -> Layout:
    """One expert of a logical tensor [expert, …] that holds them all, transposed where it is a matrix.

    Args:
        dims: of the expert in Megatron.
        axis: the one that expert tensor parallelism cuts.
        parallel: whether it is cut at all.
    """

    def shape(facts: Facts, logical: Sequence[str], expert: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        sizes = tuple(size(facts, dim) for dim in dims)
        whole = (size(facts, "experts"), *reversed(sizes))
        return [whole], (Part((Run(logical[0], 0, sizes[axis], ((0, expert),)),)),)

    return Layout(shape, axis=axis, parallel=parallel, order=tuple(range(len(dims), 0, -1)))


def gate_up_pairs(*dims: str) -> Layout:
    """One expert of a logical tensor [expert, …, 2 x ffn] whose last axis alternates between gate and up.

    Cut as `gate_up`; ``dims`` are those of Megatron's gate: ffn and what follows it. Source: ``GptOssExperts`` in
    transformers' ``modeling_gpt_oss.py``.
    """

    def shape(facts: Facts, logical: Sequence[str], expert: int) -> tuple[list[tuple[int, ...]], tuple[Part, ...]]:
        sizes = tuple(size(facts, dim) for dim in dims)
        whole = (size(facts, "experts"), *reversed(sizes), 2)
        last = len(whole) - 1
        return [whole], tuple(Part((Run(logical[0], 0, sizes[0], ((0, expert), (last, half))),)) for half in (0, 1))

    return Layout(shape, axis=0, parallel=True, order=tuple(range(len(dims), 0, -1)), joined=True)
