"""A model's tensors as a GGUF has them: renamed, stacked and permuted, norms raised, weights in blocks.

Two steps. `tensors` says of every box of a HuggingFace tensor where it lies in one of GGUF's: what a source's files
hold is then described under GGUF's names, and no byte has been looked at. `stored` puts rows into blocks, which is
arithmetic and so a derived tensor; a row keeps to itself, so that the order of rows does not matter to it. Blocks that
the source has already are copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.arch.family import Family
from dconv.arch.gguf import ARCHS
from dconv.arch.gguf_names import Box, boxes_to_write
from dconv.arch.layouts import Facts, size
from dconv.codec import ggml, gguf_encode
from dconv.codec.gguf import BLOCKS, PLAIN
from dconv.coded.gguf import Blocks, Less
from dconv.errors import Refused, group_names
from dconv.sharding.derived import Array, Derived, Read, steps
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Index, Region, row_major
from dconv.sharding.tensor import Logical, Piece, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PREFIX: Final = "gguf//"
_NUMBER: Final = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the model under GGUF's name.

    Attributes:
        spec: its shape, with rows that alternate between two runs as an axis of 2; ``file_shape`` is GGUF's.
        array: where its elements lie.
    """

    spec: TensorSpec
    array: Array

    @property
    def name(self) -> str:
        """GGUF's name for it."""
        return self.spec.name

    @property
    def shape(self) -> Index:
        """GGUF's shape, slowest axis first."""
        return self.spec.file_shape


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows in blocks; input: the weight. A box of bytes is cut out of the blocks that have it."""

    kind: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the whole blocks whose bytes the box touches, and cut it out."""
        del dtype, factor
        weights, nbytes = BLOCKS[self.kind]
        first, last = box.start[-1] // nbytes, -(-box.stop[-1] // nbytes)
        place = Region((*box.start[:-1], first * weights), (*box.shape[:-1], (last - first) * weights))
        encode = ggml.encode if self.kind in ggml.KINDS else gguf_encode.encode
        codes = encode(read(0, place, "f32").view("<f4"), self.kind)
        at = box.start[-1] - first * nbytes
        return codes[..., at : at + box.shape[-1]]


def tensors(family: Family, facts: Facts, logical: Logical, arch: str) -> tuple[list[Tensor], dict[str, str]]:
    """Every tensor under GGUF's name, in the order of HuggingFace's names, as llama.cpp's converter has them.

    Returns:
        The tensors; those of the model that GGUF has no place for, with the reason.

    Raises:
        Refused: one that it has no name for.
        ToolMissing: see `dconv.arch.gguf_names.names_of`.
    """
    held: dict[str, list[tuple[TensorSpec, Box]]] = {}
    nameless: list[str] = []
    in_order = sorted(logical.specs.values(), key=lambda spec: _natural(spec.name))
    for spec, boxes in boxes_to_write(arch, in_order, facts):
        for box in boxes:
            held.setdefault(box.tensor, []).append((spec, box))
        if not boxes:
            nameless.append(spec.name)
    ahead = {
        spec.name for entry in family.entries(facts) if entry.row.stack == "mtp" for spec in entry.fused.specs
    } if size(facts, "mtp") else set[str]()  # fmt: skip
    if unknown := [name for name in nameless if name not in ahead]:
        raise Refused(
            f"{len(unknown)} of {len(logical.specs)} tensors have no name in a GGUF of {arch}, nothing was written",
            where=group_names(unknown),
            expected=f"tensors of {arch}, as the package gguf names them",
            do=f"--drop '{group_names(unknown[:1])}'  leaves it out",
        )
    left_out = dict.fromkeys(nameless, f"llama.cpp computes no token predictors of {arch}")
    return [_tensor(name, parts, logical) for name, parts in held.items()], left_out


def _natural(name: str) -> list[str | int]:
    """By name, layer 2 before layer 10; what lies at one place is of one kind in both."""
    return [int(part) if part.isdecimal() else part for part in _NUMBER.split(name)]


def _tensor(name: str, parts: list[tuple[TensorSpec, Box]], logical: Logical) -> Tensor:
    first, box = parts[0]
    step = max(box.step for _, box in parts)
    whole = box.whole
    shape = (whole[0] // step, step, *whole[1:]) if step > 1 else whole

    def placed(pieces: Mapping[str, Iterable[Piece]]) -> tuple[Piece, ...]:
        return tuple(
            made
            for spec, box in parts
            for piece in pieces.get(spec.name, ())
            if (made := _placed(name, piece, box, step, len(shape))) is not None
        )

    spec = TensorSpec(name, shape, first.dtype, whole if step > 1 else None)
    return Tensor(spec, Array(shape, first.dtype, placed(logical.pieces), placed(logical.replicas)))


def _placed(name: str, piece: Piece, box: Box, step: int, axes: int) -> Piece | None:
    """The part of a piece that lies in a box, in the coordinates of GGUF's tensor."""
    part = piece.region.intersect(box.region)
    if part is None:
        return None
    offset = piece.offset + sum(
        (b - a) * s for a, b, s in zip(piece.region.start, part.start, piece.strides, strict=True)
    )
    start, shape, strides = list(box.start), [1] * len(box.start), [0] * len(box.start)
    if step > 1:
        start[:1] = [start[0] // step, start[0] % step]
        shape, strides = [1] * axes, [0] * axes
    for axis, theirs in enumerate(box.axes):
        if theirs < 0:
            continue
        at = theirs + (step > 1 and theirs > 0)
        start[at] += part.start[axis] - box.region.start[axis]
        shape[at], strides[at] = part.shape[axis], piece.strides[axis]
    return replace(piece, tensor=name, region=Region(tuple(start), tuple(shape)), offset=offset, strides=tuple(strides))


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it.

    Attributes:
        kind: of its blocks.
        shape: GGUF's, in weights.
        spec: what is written: numbers, or bytes of rows.
        pieces, replicas: where that comes from.
        derived: what computes it, where it is computed.
        kept: whether they are the source's own blocks.
    """

    kind: str
    shape: Index
    spec: TensorSpec
    pieces: tuple[Piece, ...]
    replicas: tuple[Piece, ...] = ()
    derived: Derived | None = None
    kept: bool = False


def source_blocks(tensor: Tensor, logical: Logical) -> str:
    """The type of the blocks that a tensor is decoded from, where it is all of what they hold; else ""."""
    files = {piece.file for piece in tensor.array.pieces}
    made = logical.derived.get(next(iter(files))) if len(files) == 1 else None
    if made is None or not isinstance(made.recipe, Blocks) or tensor.array.twins:
        return ""
    if prod(made.shape) != prod(tensor.spec.shape) or made.shape[-1] != tensor.spec.shape[-1]:
        return ""
    wanted = steps(tensor.spec.shape)
    for piece in tensor.array.pieces:
        runs = zip(piece.region.shape, piece.strides, wanted, strict=True)
        at = sum(a * b for a, b in zip(piece.region.start, wanted, strict=True))
        if piece.factor != 1.0 or piece.offset != at or any(n > 1 and have != want for n, have, want in runs):
            return ""
    return made.recipe.kind if len(made.inputs[0].pieces) == 1 else ""


def stored(tensor: Tensor, kind: str, logical: Logical, arch: str) -> Stored:
    """A tensor in blocks of a type.

    Raises:
        ToolMissing: a type that ggml encodes to, and there is none.
    """
    spec, array = tensor.spec, tensor.array
    if kind in PLAIN:
        new = replace(spec, dtype=PLAIN[kind])
        if not (ARCHS[arch].raised and spec.name.endswith("norm.weight")):
            return Stored(kind, tensor.shape, new, array.pieces, array.twins)
        bits = 8 * ITEMSIZE[array.dtype]
        more = Derived(spec.shape, (array,), Less(-1), How("the weight plus 1", exact=False, bits=bits, floats=True))
        return _made(kind, tensor, new, more)
    weights, nbytes = BLOCKS[kind]
    shape = (*spec.shape[:-1], spec.shape[-1] // weights * nbytes)
    published = None if spec.published is None else (*spec.published[:-1], shape[-1])
    new = TensorSpec(spec.name, shape, "u8", published)
    if source_blocks(tensor, logical) == kind:
        (raw,) = logical.derived[array.pieces[0].file].inputs[0].pieces
        whole = replace(raw, tensor=spec.name, region=Region.whole(shape), strides=row_major(shape, 1))
        return Stored(kind, tensor.shape, new, (whole,), kept=True)
    bits = 8 * ITEMSIZE[array.dtype] * weights / nbytes
    by = f", by {ggml.library().said}" if kind in ggml.KINDS else ""  # so that a plan is one build's
    how = How(f"rounded to {kind}, blocks of {weights}{by}", exact=False, bits=bits)
    return _made(kind, tensor, new, Derived(shape, (array,), Rows(kind), how, ceil(weights / nbytes)))


def _made(kind: str, tensor: Tensor, spec: TensorSpec, derived: Derived) -> Stored:
    piece = derived.piece(spec.name, _PREFIX + spec.name, spec.dtype)
    return Stored(kind, tensor.shape, spec, (piece,), derived=derived)


def file_of(name: str) -> str:
    """What stands for a file of a computed tensor."""
    return _PREFIX + name
