"""A checkpoint with its linear layers in codes: the same logical tensors, some replaced by what a scheme makes of them.

Nothing is computed here: codes and scales are derived tensors, so that every container, layout, world and memory budget
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.coded.integers import Grid
from dconv.coded.listing import right_list
from dconv.coded.places import loaded_as, place_of
from dconv.errors import Refused
from dconv.sharding.derived import Array, Derived, Recipe, real_files
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece, TensorSpec

PREFIX = "encoded//"


@dataclass
class Coded:
    """What one weight becomes.

    Attributes:
        parts: the tensors to be written, in their order, each with where it comes from.
        derived: what computes those that are not copied.
        kept: whether codes and scales are the source's own.
        grid: its whole numbers, where it has such codes.
    """

    parts: list[tuple[TensorSpec, tuple[Piece, ...]]] = field(
        default_factory=list[tuple[TensorSpec, tuple[Piece, ...]]]
    )
    derived: dict[str, Derived] = field(default_factory=dict[str, Derived])
    kept: bool = False
    grid: Grid | None = None

    def make(self, spec: TensorSpec, derived: Derived) -> None:
        """Have a tensor written that is computed: ``derived`` under the name of ``spec``, in its dtype."""
        self.derived[PREFIX + spec.name] = derived
        self.parts.append((spec, (derived.piece(spec.name, PREFIX + spec.name, spec.dtype),)))

    def help(self, name: str, derived: Derived, dtype: str) -> Array:
        """A tensor that others are computed from and that is not written."""
        self.derived[PREFIX + name] = derived
        return Array(derived.shape, dtype, (derived.piece(name, PREFIX + name, dtype),))


class Scheme(Protocol):
    """How weights are stored as codes, and what config.json says of it."""

    @property
    def words(self) -> str:
        """How reports call it, such as ``NVFP4, for compressed-tensors``."""
        ...

    @property
    def columns(self) -> int:
        """What a weight's columns must be a multiple of."""
        ...

    def code(self, spec: TensorSpec, dense: Array, logical: Logical) -> Coded:
        """The tensors that a weight becomes, those of the source itself where it has the very codes.

        Args:
            spec: its name, ``….weight``, its shape [out, in], and the dtype that it would be written in.
            dense: where its elements lie, or what computes them.
            logical: the source.

        Raises:
            Refused: a shape that the scheme does not store.
        """
        ...

    def config(self, plain: list[str], coded: Mapping[str, Coded]) -> dict[str, object]:
        """``quantization_config``.

        Args:
            plain: entries that leave out every linear layer that is not coded.
            coded: the weights that are, by name.
        """
        ...


def kept(
    dense: Array, logical: Logical, recipe: Recipe, parts: Sequence[TensorSpec], scales: Sequence[str] = ()
) -> Coded | None:
    """The source's own tensors where a weight is decoded from the very parts that are wanted, else None.

    Args:
        dense: the weight as it is to be written.
        logical: the source.
        recipe: what decodes the parts.
        parts: in the order of its inputs.
        scales: dtypes that loaders take for the second part beside its own.
    """
    if len(dense.pieces) != 1 or dense.pieces[0].factor != 1.0 or dense.twins:
        return None
    (piece,) = dense.pieces
    source = logical.derived.get(piece.file)
    if source is None or source.recipe != recipe or len(source.inputs) != len(parts):
        return None
    if piece != source.piece(piece.tensor, piece.file, piece.dtype) or dense.shape != source.shape:
        return None
    found = Coded(kept=True)
    for number, (array, part) in enumerate(zip(source.inputs, parts, strict=True)):
        if array.dtype != part.dtype and not (number == 1 and array.dtype in scales):
            return None
        pieces = tuple(replace(at, tensor=part.name) for at in array.pieces)
        if array.shape != part.shape:  # one for all, whose axes are the format's choice
            pieces = (replace(pieces[0], region=Region.whole(part.shape), strides=(0,) * len(part.shape)),)
        found.parts.append((replace(part, dtype=array.dtype), pieces))
    return found


@dataclass(frozen=True)
class Encoded:
    """A checkpoint to be written in codes.

    Attributes:
        fixed: tensors that ``--dtype`` has no say in.
        kept, whole, made: how many weights' codes are the source's own, whole numbers that are there or will be, and
            computed.
    """

    logical: Logical
    config: dict[str, object]
    fixed: frozenset[str]
    kept: int
    whole: int
    made: int


def encode(family: Family, facts: Facts, logical: Logical, scheme: Scheme, wanted: set[str]) -> Encoded:
    """Replace the weights ``wanted`` by a scheme's codes.

    Args:
        family: the model's.
        facts: what config and tensors tell of the model.
        logical: the source; its other tensors stay as they are.
        scheme: what makes codes of a weight.
        wanted: of `linears`, of `stacked`, or those whose codes the source has.

    Raises:
        Refused: one of them has a shape that the scheme does not store.
    """
    wanted = _whole_groups(wanted, logical, scheme.columns)
    specs: dict[str, TensorSpec] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    derived = dict(logical.derived)
    fixed: set[str] = set()
    made: dict[str, Coded] = {}
    for name, spec in logical.specs.items():
        if name not in wanted:
            specs[name], pieces[name] = spec, logical.pieces[name]
            continue
        dense = Array(spec.shape, spec.dtype, logical.pieces[name], logical.replicas.get(name, ()))
        made[name] = coded = scheme.code(spec, dense, logical)
        derived |= coded.derived
        for part, where in coded.parts:
            specs[part.name], pieces[part.name] = part, where
            fixed.add(part.name)
    again = sorted({name for name in family.twin_names(facts).values() if name in made} - specs.keys())
    if again:
        raise Refused(
            f"a {family.name} has a weight under two names, which codes are not written under, nothing was written",
            where=", ".join(again),
            do="FORMAT hf decodes them",
        )
    files = {piece.file for found in pieces.values() for piece in found}
    files |= {piece.file for found in logical.replicas.values() for piece in found}
    behind = real_files(files, derived)
    new = replace(
        logical,
        specs=specs,
        pieces=pieces,
        replicas={name: found for name, found in logical.replicas.items() if name not in wanted},
        files={name: stamp for name, stamp in logical.files.items() if name in behind},
        derived=derived,
    )
    config = scheme.config(_left_out(family, facts, logical, wanted), made)
    whole = sum(coded.grid is not None for coded in made.values())
    kept = sum(coded.kept for coded in made.values()) - whole
    return Encoded(new, config, frozenset(fixed), kept, whole, len(made) - kept - whole)


def _whole_groups(wanted: set[str], logical: Logical, columns: int) -> set[str]:
    """Those whose columns are whole groups; of the experts of a layer all or none, which is what loaders take.

    Raises:
        Refused: there are none.
    """
    odd = {name for name in wanted if logical.specs[name].shape[-1] % columns}
    layers = {loaded_as(place_of(name, (1, 1)).module) for name in odd}
    found = {name for name in wanted if name not in odd and loaded_as(place_of(name, (1, 1)).module) not in layers}
    if odd and not found:
        first = min(odd)
        raise Refused(
            f"no linear layer has whole groups of {columns} columns, nothing was written",
            where=first,
            expected=f"a multiple of {columns}",
            found=f"{logical.specs[first].shape[-1]} columns",
        )
    return found


def stacked(family: Family, facts: Facts, logical: Logical) -> set[str]:
    """Weights of experts that are one tensor for all, [experts, in, out]; none in most families."""
    entries = (entry for entry in family.entries(facts) if entry.row.is_linear and entry.expert >= 0)
    specs = (spec for entry in entries for spec in entry.fused.specs)
    return {spec.name for spec in specs if len(spec.shape) > 2 and spec.name in logical.specs}


def has_codes(family: Family, *, stacked: bool) -> bool:
    """Whether a scheme has a form for a family at all; see `linears`.

    Args:
        family: the model's.
        stacked: whether the scheme stores experts that are one tensor for all.
    """
    found = [row for row in family.rows if row.is_linear]
    turned = any(row.layout.order == (1, 0) for row in found)
    return bool(found) and not turned and (stacked or not any(row.shared for row in found))


def linears(family: Family, facts: Facts, logical: Logical) -> set[str]:
    """Weights that most schemes store in codes: of the linear layers inside the decoder, routers excepted.

    Raises:
        Refused: there are none, or experts are in one tensor for all.
    """
    found: set[str] = set()
    for entry in family.entries(facts):
        if not entry.row.is_linear:
            continue
        if entry.row.layout.order == (1, 0):
            raise Refused(
                f"a {family.name} has no linear layers that a loader takes in codes, nothing was written",
                where=entry.fused.specs[0].name,
                found="matrices stored [in, out] (Conv1D)",
            )
        for spec in entry.fused.specs:
            if len(spec.shape) != 2:
                raise Refused(
                    f"the experts of a {family.name} are one tensor for all, which this scheme does not store, "
                    "nothing was written",
                    where=spec.name,
                    expected="a matrix for each expert",
                )
            if spec.name in logical.specs:
                found.add(spec.name)
    if not found:
        raise Refused(
            f"a {family.name} has no linear layers that are stored in codes, nothing was written",
            expected="a decoder",
        )
    return found


def _left_out(family: Family, facts: Facts, logical: Logical, wanted: set[str]) -> list[str]:
    """Entries of a config that leave out every linear layer but those in codes."""
    heads = [family.head.removesuffix(".weight")] if facts["tied"] else []
    plain: dict[str, list[str]] = {head: [head] for head in heads}
    coded: list[str] = []
    for name, spec in logical.specs.items():
        place = place_of(name, spec.file_shape)
        if name in wanted:
            coded.append(place.module)
        elif place.role in ("head", "router", "linear"):
            plain.setdefault(place.kind, []).append(place.module)
    return right_list(plain, coded)
