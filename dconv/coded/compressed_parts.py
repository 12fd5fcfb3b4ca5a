"""A module of compressed-tensors whose weight is in codes: its parts, each proved to be what the config makes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from dconv.coded import fp8
from dconv.coded.compressed_config import Args, Group
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.derived import Recipe
from dconv.sharding.region import Index
from dconv.sharding.tensor import Stored

#: Dtypes of scales that are plain numbers.
SCALES: Final = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Module:
    """A module whose weight is in codes.

    Attributes:
        parts: its stored tensors by the end of their names.
    """

    name: str
    group: Group
    parts: Mapping[str, Stored]

    @property
    def args(self) -> Args:
        """How the codes are made, as the module's group says."""
        return self.group.args

    def need(self, part: str, dtypes: tuple[str, ...], *shapes: Index) -> Stored:
        """A part, proved to be of one of these dtypes, and of one of the shapes where there are any.

        Raises:
            Damaged: it is not there, or is another.
        """
        found = self.parts.get(part)
        if found is None:
            raise Damaged(
                "a weight in codes lacks a part, without which its codes mean nothing",
                where=f"{self.name}.{part}",
                expected=f"it beside {', '.join(self.parts)}, as {self._said()} has it",
                do="fetch the files again",
            )
        spec = found.spec
        if spec.dtype not in dtypes or (shapes and spec.shape not in shapes):
            raise Damaged(
                "a part of a weight in codes is not what the config makes it",
                where=f"{spec.name} in {found.extents[0].file}",
                expected=f"{' or '.join(dtypes)} of {' or '.join(map(str, map(list, shapes))) or 'any shape'}"
                f" by {self._said()}",
                found=f"{spec.dtype}{list(spec.shape)}",
                do="the config belongs to other files",
            )
        return found

    def check_no_more(self, *parts: str) -> None:
        """See that a module has these parts and no others.

        Raises:
            Damaged: there are others than these.
        """
        more = sorted(self.parts.keys() - set(parts))
        if more:
            raise Damaged(
                "beside a weight in codes is a part that its format has no use for",
                where=f"{self.name}.{more[0]}",
                expected=f"{', '.join(parts)}, as {self._said()} has it",
            )

    def refuse(self, what: str) -> Refused:
        """An error that says that a group asks for something that is not known."""
        return Refused(f"{what}, nothing was written", where=f"config_groups.{self.group.name:.60}", found=self._said())

    def _said(self) -> str:
        args = self.args
        of = f" of {args.group}" if args.group else f" of {args.block[0]} x {args.block[1]}" if args.block else ""
        symmetric = "" if args.symmetric else ", with zero points"
        return f"{self.group.format}, {args.kind}{args.bits} by {args.strategy}{of}{symmetric}"


@dataclass(frozen=True)
class Made:
    """A weight and what computes it from ``inputs``; ``words`` for a person, ``bits`` read for an element."""

    shape: Index
    inputs: tuple[Stored, ...]
    recipe: Recipe
    words: str
    bits: float


def parts_of(
    tensors: Mapping[str, Stored], codes: Mapping[str, tuple[str, ...]], beside: Collection[str]
) -> dict[str, dict[str, Stored]]:
    """Modules whose weights are in codes, each with its parts by the ends of their names.

    Args:
        tensors: as they are stored, by name.
        codes: parts that have codes, with the dtypes in which they do; none where all do.
        beside: parts that say what codes mean.

    Raises:
        Damaged: a part without codes.
    """
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        dtypes = codes.get(part)
        if part in beside or (dtypes is not None and (not dtypes or stored.spec.dtype in dtypes)):
            found.setdefault(module, {})[part] = stored
    bare = {module: parts for module, parts in found.items() if not parts.keys() & codes.keys()}
    alone = sorted(f"{module}.{part}" for module, parts in bare.items() for part in parts)
    if alone:
        raise Damaged(
            f"{len(alone)} tensors say what codes mean, and there are none beside them",
            where=group_names(alone),
            expected=f"{alone[0].rpartition('.')[0]}.{' or .'.join(codes)} in codes",
            do="weights that were only rounded are plain without these tensors",
        )
    return found


def matrix(codes: Stored) -> tuple[int, int]:
    """The two sizes of codes as they are stored, [out, bytes or words of a row] for most formats.

    Raises:
        Damaged: they have not two axes.
    """
    if len(codes.spec.shape) != 2:
        raise Damaged(
            "codes are no matrix",
            where=f"{codes.spec.name} in {codes.extents[0].file}",
            expected="[out, in]",
            found=f"{list(codes.spec.shape)}",
        )
    return codes.spec.shape[0], codes.spec.shape[1]


def blocks_of(module: Module, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[Index, ...]]:
    """Rows and columns that share a scale, and what the scales' shape may be.

    Raises:
        Damaged: groups that the columns are no multiple of.
    """
    (rows, columns), args = shape, module.args
    if args.strategy == "tensor":
        return shape, ((1,), (), (1, 1))
    if args.strategy == "channel":
        return (1, columns), ((rows, 1), (rows,))
    if args.block:
        return args.block, (fp8.scales_shape(shape, args.block),)
    if columns % args.group:
        raise Damaged(
            "a weight's columns are no multiple of its groups",
            where=module.name,
            expected=f"a multiple of {args.group}",
            found=str(columns),
        )
    return (1, args.group), ((rows, columns // args.group),)


def of_words(block: tuple[int, int], shape: tuple[int, int]) -> str:
    """What has a scale in a matrix of this shape, for a person: its tensor, its row, so many columns, a block."""
    if block == shape:
        return "its tensor"
    if block[0] == 1:
        return "its row" if block[1] == shape[1] else f"its {block[1]} columns"
    return f"its {block[0]} x {block[1]} block"
