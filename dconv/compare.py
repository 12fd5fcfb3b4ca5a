"""Two checkpoints, of any formats and layouts, compared as logical tensors in bounded memory.

Equal means the same names, shapes, dtypes and bytes (NaN payloads and signs of zero too). Where bytes differ the
largest absolute difference is computed in fp64, so that checkpoints of different dtypes can be compared as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.checkpoint.drop import check_used
from dconv.codec.cast import cast
from dconv.codec.kernels import apply
from dconv.errors import Refused, group_names
from dconv.pipeline import Described, describe_model
from dconv.sharding.derived import open_reader
from dconv.sharding.dtypes import ITEMSIZE, carrier
from dconv.sharding.ops import MOVE
from dconv.sharding.plan import Copy
from dconv.sharding.region import Region
from dconv.sharding.tensor import Piece, TensorSpec
from dconv.sharding.torn import torn

#: Bytes of one buffer; there are four (a tile and a scratch a side) and the temporaries of a difference.
_TILE_BYTES: Final = 1 << 20
#: Tensors named one by one in the text, the largest differences first.
_ROWS: Final = 20

_FLOATS: Final = ("f64", "f32", "f16", "bf16")
_NUMPY: Final = {"i64": "<i8", "i32": "<i4", "i16": "<i2", "i8": "i1", "u64": "<u8", "u32": "<u4", "u16": "<u2",
                 "u8": "u1", "bool": "u1"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is in both checkpoints and not the same.

    Attributes:
        a, b: its dtype and shape in each, such as ``bf16[320, 128]``.
        elements: how many elements differ (None when the shapes do).
        largest: largest absolute difference in fp64 (infinite where one side is NaN; None when it has no meaning).
        at: index of that element.
    """

    name: str
    a: str
    b: str
    elements: int | None = None
    largest: float | None = None
    at: tuple[int, ...] | None = None

    def line(self) -> str:
        """One line for a person."""
        if self.elements is None:
            return f"{self.name}  {self.a} against {self.b}"
        forms = f"{self.a} against {self.b}, " if self.a != self.b else ""
        if not self.elements:
            return f"{self.name}  {forms}the same values"
        largest = (
            f", largest difference {self.largest:.6g} at {list(self.at or ())}" if self.largest is not None else ""
        )
        return f"{self.name}  {forms}{self.elements} element{'s' * (self.elements > 1)} differ{largest}"


@dataclass(frozen=True)
class Comparison:
    """What `diff` found. Names are HuggingFace's."""

    a: Path
    b: Path
    tensors: int
    equal_tensors: int
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    bytes_compared: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def equal(self) -> bool:
        """Same names, shapes, dtypes and bytes."""
        return not (self.only_a or self.only_b or self.differences)

    def text(self) -> str:
        """For a person; differences are sorted, the largest first."""
        lines = list(self.notes)
        if self.equal:
            lines.append(f"equal: {self.tensors} tensors, {self.bytes_compared / 1e9:.2f} GB, bit for bit")
            return "\n".join(lines)
        lines.append(f"different: {self.equal_tensors} of {self.tensors} tensors are equal bit for bit")
        for path, names in ((self.a, self.only_a), (self.b, self.only_b)):
            if names:
                grouped = group_names(names).replace("\n", "\n    ")
                lines.append(f"  only in {path} ({len(names)}):\n    {grouped}")
        lines += [f"  {difference.line()}" for difference in self.differences[:_ROWS]]
        if len(self.differences) > _ROWS:
            lines.append(f"  … and {len(self.differences) - _ROWS} more, --json shows all")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``; infinite differences are the string ``inf``."""
        shown = [asdict(difference) for difference in self.differences]
        for entry in shown:
            if entry["largest"] is not None and not math.isfinite(entry["largest"]):
                entry["largest"] = "inf"
        return {
            "equal": self.equal,
            "a": str(self.a),
            "b": str(self.b),
            "tensors": self.tensors,
            "equal_tensors": self.equal_tensors,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "differences": shown,
            "bytes_compared": self.bytes_compared,
            "notes": list(self.notes),
        }


def diff(
    a: str | Path,
    b: str | Path,
    *,
    model_type: str | None = None,
    hf_config: str | Path | None = None,
    drop: str | Sequence[str] = (),
    rename: str | Path | None = None,
    submodel: str | None = None,
) -> Comparison:
    """Compare two checkpoints as logical tensors.

    Args:
        a: a checkpoint, of any format and layout.
        b: another one.
        model_type: family of both (normally detected).
        hf_config: a directory whose config.json counts for both.
        drop: patterns of tensors that are left out on both sides.
        rename: a file of house spellings, for the side that they fit, or both.
        submodel: which model of a distillation checkpoint is meant, of the side that is one.

    Raises:
        Refused: the renaming or the submodel fits neither side.
        DconvError: one of them cannot be described or read.
    """
    both = {"model_type": model_type, "hf_config": hf_config, "drop": drop}
    told = {"rename": rename, "submodel": submodel}
    told = {name: value for name, value in told.items() if value is not None}
    found = [_as_told(Path(path), told, both) for path in (a, b)]
    for name in told:
        if not any(name in used for _, used in found):
            raise Refused(
                f"--{name} fits neither side",
                where=f"{a}\n{b}",
                expected="a side whose tensors have such names",
                do="dconv inspect shows the names; leave it out if these are plain checkpoints",
            )
    models = [model for model, _ in found]
    check_used(drop, *((model.source, model.logical) for model in models))
    specs_a, specs_b = (model.logical.specs for model in models)
    sides = [_Side(model) for model in models]
    differences: list[Difference] = []
    compared = 0
    try:
        for name, spec in specs_a.items():
            other = specs_b.get(name)
            if other is None:
                continue
            if spec.shape != other.shape:
                differences.append(Difference(name, _form(spec), _form(other)))
                continue
            compared += spec.nbytes
            found = _compare(spec, other, *sides)
            if found is not None:
                differences.append(found)
    finally:
        for side in sides:
            side.reader.close()
    differences.sort(key=lambda d: -(math.inf if d.elements is None else d.largest or 0.0))
    common = sum(1 for name in specs_a if name in specs_b)
    return Comparison(
        Path(a),
        Path(b),
        tensors=len({*specs_a, *specs_b}),
        equal_tensors=common - len(differences),
        only_a=tuple(name for name in specs_a if name not in specs_b),
        only_b=tuple(name for name in specs_b if name not in specs_a),
        differences=tuple(differences),
        bytes_compared=compared,
        notes=_notes(models),
    )


def _as_told(path: Path, told: dict[str, Any], both: dict[str, Any]) -> tuple[Described, set[str]]:
    """A side with as many of the options as fit it, and their names: house spellings are one side's, as a rule."""
    first: Refused | None = None
    for count in range(len(told), -1, -1):
        for names in itertools.combinations(told, count):
            try:
                return describe_model(path, **both, **{name: told[name] for name in names}), set(names)
            except Refused as refused:
                first = first or refused
    raise first or Refused("nothing describes this side", where=str(path))


def _notes(models: Sequence[Described]) -> tuple[str, ...]:
    names = [model.family.name for model in models]
    notes = [f"different families: {names[0]} and {names[1]}"] if names[0] != names[1] else []
    for model in models:
        if disagree := torn(model.logical, apply):
            named = group_names(disagree).replace("\n", "\n  ")
            notes.append(f"{model.logical.root}: shards disagree, the first was compared, on\n  {named}")
    return tuple(notes)


def _form(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


class _Side:
    """One checkpoint, read by boxes of its logical tensors."""

    def __init__(self, model: Described) -> None:
        self.reader = open_reader(model.logical, _TILE_BYTES, apply)
        self._pieces: Mapping[str, Sequence[Piece]] = model.logical.pieces

    def copies(self, name: str) -> list[Copy]:
        """The tensor's pieces as copies into its own coordinates."""
        return [Copy(p.region, p.file, p.offset, p.strides, p.dtype, MOVE) for p in self._pieces[name]]

    def read(self, spec: TensorSpec, tile: Region, copies: Iterable[Copy]) -> NDArray[np.generic]:
        """A box of a tensor, as bit patterns."""
        out = np.empty(tile.shape, f"<u{ITEMSIZE[spec.dtype]}")
        for copy in copies:
            place = zip(tile.start, copy.region.start, copy.region.shape, strict=True)
            self.reader.read_box(copy, out[(..., *(slice(b - a, b - a + n) for a, b, n in place))])
        return out


def _compare(a: TensorSpec, b: TensorSpec, side_a: _Side, side_b: _Side) -> Difference | None:
    copies_a, copies_b = side_a.copies(a.name), side_b.copies(b.name)
    elements, largest, at = 0, 0.0, None
    measured = True
    for tile in Region.whole(a.shape).bands(_TILE_BYTES // max(ITEMSIZE[a.dtype], ITEMSIZE[b.dtype])):
        mine = [c for copy in copies_a if (c := copy.clip(tile)) is not None]
        theirs = [c for copy in copies_b if (c := copy.clip(tile)) is not None]
        if all(map(side_a.reader.is_hole, mine)) and all(map(side_b.reader.is_hole, theirs)):
            continue
        bits_a, bits_b = side_a.read(a, tile, mine), side_b.read(b, tile, theirs)
        if a.dtype == b.dtype and np.array_equal(bits_a, bits_b):
            continue
        values_a, values_b = _values(bits_a, a.dtype), _values(bits_b, b.dtype)
        if values_a is None or values_b is None:
            measured = False
            elements += int(np.count_nonzero(bits_a != bits_b)) if a.dtype == b.dtype else tile.volume
            continue
        apart = distance(values_a, values_b)
        unequal = bits_a != bits_b if a.dtype == b.dtype else apart != 0
        elements += int(np.count_nonzero(unequal))
        here = float(apart.max())
        if here > largest or (at is None and unequal.any()):
            peak = apart if here > 0 else unequal
            index = np.unravel_index(int(peak.argmax()), tile.shape)
            largest, at = here, tuple(int(i) + start for i, start in zip(index, tile.start, strict=True))
    if not elements and a.dtype == b.dtype:
        return None
    return Difference(a.name, _form(a), _form(b), elements, largest if measured else None, at)


def _values(bits: NDArray[np.generic], dtype: str) -> NDArray[np.float64] | None:
    """The numbers behind bit patterns, in fp64; None for dtypes that are codes of another form."""
    if dtype in _FLOATS:
        with np.errstate(invalid="ignore"):  # signalling NaN
            return cast(bits.view(carrier(dtype)), dtype, "f64").astype(np.float64)
    if dtype in _NUMPY:
        return bits.view(_NUMPY[dtype]).astype(np.float64)
    return None


def distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """|a - b|; 0 for the same infinity or two NaN, infinite where only one side is NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a - b)
    apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    apart[np.isnan(apart)] = np.inf
    return apart
