"""FP8 weights as AWS Neuron holds them: experts' codes recoded with their scales, other matrices encoded row by row.

A source in block FP8 keeps what it has where Neuron has a place for it; what is decoded and encoded again, or decoded,
is said by the family's table (`dconv.arch.neuron`). A dense source stays dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.arch.neuron import BLOCKS, ROWS, Held, Scales, count_scales, lay_out, left_plain, scale_of
from dconv.codec import neuron
from dconv.codec.minifloat import E4M3
from dconv.coded.fp8 import FP8, SUFFIX, Decode
from dconv.coded.fp8_encode import Amax
from dconv.errors import Refused, group_names
from dconv.sharding.derived import Array, Derived, Read, real_files
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import FLOATS, How
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PREFIX: Final = "neuron//"
#: The codes of e4m3 above zero.
_POSITIVE: Final = slice(1, E4M3.largest_code + 1)


@dataclass(frozen=True)
class Coding:
    """How codes and scales are written.

    Attributes:
        by: what codes are divided by and scales multiplied by.
        reciprocal: scales are written so that they divide, as some older notes ask for.
        every: matrices that have a scale a row are encoded where the source has them dense, too.
    """

    by: Fraction = neuron.HALVED
    reciprocal: bool = False
    every: bool = False


@dataclass(frozen=True)
class Coded:
    """A checkpoint's tensors as Neuron's are made of them: under HuggingFace's names, each weight's scales beside it.

    Attributes:
        scales: what became of the source's.
        block: rows and columns of HuggingFace's matrices that share a scale; None where no scale was kept.
        fixed: tensors that ``--dtype`` has no say in.
        encoded: how many matrices were dense in the source.
        plain: the modules that a reader must not make FP8 layers of (`dconv.arch.neuron.left_plain`).
    """

    logical: Logical
    scales: Scales
    block: tuple[int, int] | None
    fixed: frozenset[str]
    encoded: int
    plain: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A weight that is decoded from FP8."""

    derived: Derived
    recipe: Decode


@dataclass
class _Making:
    """What has been made so far; see `Coded`."""

    logical: Logical
    coding: Coding
    source: dict[str, _Source]
    derived: dict[str, Derived] = field(default_factory=dict[str, Derived])
    specs: dict[str, TensorSpec] = field(default_factory=dict[str, TensorSpec])
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict[str, tuple[Piece, ...]])

    def make(self, spec: TensorSpec, derived: Derived) -> None:
        """Have a tensor written that is computed."""
        file = _PREFIX + spec.name
        self.derived[file] = derived
        self.specs[spec.name], self.pieces[spec.name] = spec, (derived.piece(spec.name, file, spec.dtype),)


def _decoded(logical: Logical) -> dict[str, _Source]:
    """The weights that are decoded from FP8, whole, by name."""
    found: dict[str, _Source] = {}
    for name, pieces in logical.pieces.items():
        derived = logical.derived.get(pieces[0].file) if len(pieces) == 1 else None
        if derived is not None and isinstance(derived.recipe, Decode):
            found[name] = _Source(derived, derived.recipe)
    return found


def code(family: Family, facts: Facts, logical: Logical, coding: Coding) -> Coded:
    """What Neuron's tensors are made of, the source's FP8 codes kept where they can be.

    Raises:
        Refused: experts that are only partly in FP8, or with scales that Neuron cannot keep; dense ones, where every
            matrix is to be encoded.
    """
    making = _Making(logical, coding, _decoded(logical))
    held = lay_out(family, facts, dict.fromkeys(making.source, FP8))
    block: tuple[int, int] | None = None
    encoded = 0
    for one in held:
        coded = [spec.name for specs in one.sources for spec in specs if spec.name in making.source]
        if one.fp8 == ROWS and (coded or coding.every):
            _by_row(making, one.sources[0][0])
            encoded += not coded
        elif one.fp8 == BLOCKS and (coded or coding.every):
            block = _block_of(making, one, block)
            _by_block(making, one, block)
    pieces = {**logical.pieces, **making.pieces}
    replicas = {name: twins for name, twins in logical.replicas.items() if name not in making.pieces}
    derived = {**logical.derived, **making.derived}
    behind = real_files((p.file for where in (*pieces.values(), *replicas.values()) for p in where), derived)
    new = replace(
        logical,
        specs={**logical.specs, **making.specs},
        pieces=pieces,
        replicas=replicas,
        derived=derived,
        files={name: stamp for name, stamp in logical.files.items() if name in behind},
    )
    fixed = frozenset(making.specs)
    plain = left_plain({one.name: one.shape for one in held}, {o.name for o in held if o.sources[0][0].name in fixed})
    return Coded(new, count_scales(held), block, fixed, encoded, plain)


def with_scales(held: Iterable[Held], specs: Mapping[str, TensorSpec]) -> Iterator[Held]:
    """Neuron's tensors, those in FP8 with their scales behind them.

    Args:
        held: Neuron's tensors, in the order of their files.
        specs: HuggingFace's tensors and their scales.
    """
    for one in held:
        yield one
        scales = tuple(tuple(specs[s.name + SUFFIX] for s in each if s.name + SUFFIX in specs) for each in one.sources)
        if scales[0]:
            yield replace(one, name=scale_of(one.name), sources=scales)


def _by_row(making: _Making, spec: TensorSpec) -> None:
    """Encode a matrix anew with a scale for each row."""
    logical, turned = making.logical, making.coding.reciprocal
    (rows, columns), name = spec.shape, spec.name
    dense = Array(spec.shape, logical.specs[name].dtype, logical.pieces[name], logical.replicas.get(name, ()))
    bits = 8 * ITEMSIZE[dense.dtype]
    how = How("absmax", exact=False, bits=0)
    largest = Derived((rows, 1), (dense,), Amax((1, columns), spec.shape), how, columns, remembered=True)
    file = f"{_PREFIX}{name}//amax"
    making.derived[file] = largest
    amax = Array(largest.shape, "f32", (largest.piece(name, file, "f32"),))
    how = How("decoded, and rounded to Neuron's e4m3 with absmax / 240 of the row for its scale", False, bits)
    making.make(TensorSpec(name, spec.shape, FP8), Derived(spec.shape, (dense, amax), RowCodes(), how))
    how = How("240 / absmax of the row in fp32" if turned else "absmax / 240 of the row in fp32", False, bits * columns)
    making.make(TensorSpec(name + SUFFIX, (rows, 1), "f32"), Derived((rows, 1), (amax,), RowScale(turned), how))


def _by_block(making: _Making, one: Held, block: tuple[int, int]) -> None:
    """Recode a stack of experts and rescale its scales."""
    by = making.coding.by
    shown = "(448/240)" if by == neuron.FITTED else str(by)
    lost = neuron.errors(by)
    kept = f"{np.count_nonzero(lost[_POSITIVE] == 0)} of {_POSITIVE.stop - _POSITIVE.start} codes kept exactly"
    coarse = f"e4m3 code / {shown}: {kept}, off by at most {lost.max():.4g} x the source's scale"
    scales = one.scales(block, lambda name: name + SUFFIX)
    for specs, factors in zip(one.sources, scales.sources, strict=True):
        for spec, scale in zip(specs, factors, strict=True):
            codes, given = making.source[spec.name].derived.inputs
            divides = making.source[spec.name].recipe.reciprocal
            turned = divides != making.coding.reciprocal
            how = How(coarse, exact=False, bits=8)
            making.make(TensorSpec(spec.name, spec.shape, FP8), Derived(spec.shape, (codes,), Recode(by), how))
            words = f"the source's scale {'/' if divides else 'x'} {shown}{', turned over' if turned else ''}, in fp32"
            how = How(words, exact=by == neuron.HALVED and not turned, bits=8 * ITEMSIZE[given.dtype])
            making.make(scale, Derived(scale.shape, (given,), Rescale(1 / by if divides else by, turned), how))


def _block_of(making: _Making, one: Held, block: tuple[int, int] | None) -> tuple[int, int]:
    """The block that all experts' scales share; ``block`` is that of others before.

    Raises:
        Refused: they share none, or are no codes that Neuron has.
    """
    whole = [spec.name for specs in one.sources for spec in specs]
    if plain := [name for name in whole if name not in making.source]:
        raise Refused(
            f"{len(plain)} of {len(whole)} matrices of one tensor of Neuron's are not in FP8, nothing was written",
            where=f"{group_names(plain)}\nin {one.name}",
            expected="all or none",
            do="dconv convert MODEL fp8  chooses their scales, by block;  convert what it writes"
            if making.coding.every
            else "dconv convert MODEL hf  decodes all;  convert what it writes",
        )
    block = block or making.source[whole[0]].recipe.block
    for name in whole:
        recipe, scale = making.source[name].recipe, making.source[name].derived.inputs[1]
        if recipe.dtype != FP8 or scale.dtype not in FLOATS or recipe.block != block:
            raise Refused(
                "the experts' scales are none that Neuron could keep, nothing was written",
                where=name,
                expected=f"{FP8} with a floating scale for each {block[0]} x {block[1]} block",
                found=f"{recipe.dtype} with {scale.dtype} scales of {recipe.block[0]} x {recipe.block[1]} blocks",
                do="dconv convert MODEL hf  decodes all;  convert what it writes",
            )
    return block


@dataclass(frozen=True, slots=True)
class Recode:
    """Neuron's codes of e4m3 codes; input: the codes."""

    by: Fraction

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Read the codes of the box, and give each the code of its number divided by ``by``."""
        del dtype, factor
        return neuron.recode(read(0, box, "").view("u1"), self.by)


@dataclass(frozen=True, slots=True)
class Rescale:
    """Scales × ``by``, turned over where ``reciprocal``; input: the scales."""

    by: Fraction
    reciprocal: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Read the scales of the box; each result is rounded once, to fp32."""
        del dtype, factor
        return neuron.rescale(read(0, box, "f32"), self.by, reciprocal=self.reciprocal)


@dataclass(frozen=True, slots=True)
class RowCodes:
    """Neuron's codes; inputs: the weight, its rows' `Amax`."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Encode the weights of the box by their rows' `Amax`."""
        del dtype, factor
        rows = Region((box.start[0], 0), (box.shape[0], 1))
        return neuron.encode_rows(read(0, box, "f32"), largest=read(1, rows, ""))


@dataclass(frozen=True, slots=True)
class RowScale:
    """A scale for each row; input: its `Amax`."""

    reciprocal: bool

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The scales of the rows in the box, or what they are divided by."""
        del dtype, factor
        return neuron.row_scales(read(0, box, ""), reciprocal=self.reciprocal)
