"""Weights that no training leaves behind: all zero, constant, not finite, or with a part of them zero.

A shard or a page of a file that was lost is usually read as zeros, and nothing complains: shapes fit, sizes fit, the
model even answers. So all weights are read once, in bounded memory, as values (codes are decoded), and what looks lost
is named. It is a lint: a model may well have such a tensor, and a flipped bit is not found by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.checkpoint.source import Source
from dconv.codec.cast import cast
from dconv.codec.kernels import apply
from dconv.coded.places import place_of
from dconv.errors import group_names
from dconv.pipeline import Described
from dconv.sharding.derived import open_reader
from dconv.sharding.dtypes import ITEMSIZE, carrier
from dconv.sharding.ops import MOVE
from dconv.sharding.plan import Copy
from dconv.sharding.reader import ReadLog
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes that are read at a time; small enough that the allocator keeps what was computed with the last ones.
_TILE_BYTES: Final = 1 << 19
#: What is lost of a file at once: a page of memory, a block of a file system.
PAGE: Final = 4096
#: So many zeros in a row, of values that were decoded: a page of codes has more of them, but lies elsewhere.
_RUN: Final = 1024
#: Bits of surprise: zeros that would fall together by chance once in 2^64 matrices are not pointed out.
_SURPRISE: Final = 64
#: As if each value were zero this often at least: random weights are hardly ever, and two of them prove nothing.
_OFTEN: Final = 2.0**-8
#: Reasons printed before the rest is counted.
_MANY: Final = 12

#: dtype -> all bits but the sign; those that are all set where a value is not finite; the least magnitude of NaN.
_FORMS: Final[Mapping[str, tuple[int, int, int]]] = {
    "f64": (2**63 - 1, 0x7FF << 52, (0x7FF << 52) + 1),
    "f32": (0x7FFFFFFF, 0x7F800000, 0x7F800001),
    "f16": (0x7FFF, 0x7C00, 0x7C01),
    "bf16": (0x7FFF, 0x7F80, 0x7F81),
    "f8_e5m2": (0x7F, 0x7C, 0x7D),
    "f8_e4m3": (0x7F, 0x7F, 0x7F),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A tensor that looks lost, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Implausible:
    """What `of_model` or `of_graph` found.

    Attributes:
        tensors: how many were looked at.
    """

    tensors: int
    found: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"tensors": self.tensors, "found": [{"name": one.name, "why": one.why} for one in self.found]}

    def text(self) -> str:
        """For a person: how many, and their names by reason."""
        count = f"{len(self.found) or 'none'} of {self.tensors:,} tensors"
        return "\n".join([count, *self.lines()])

    def lines(self) -> list[str]:
        """Names by reason, the common reasons first."""
        by_reason: dict[str, list[str]] = {}
        for one in self.found:
            by_reason.setdefault(one.why, []).append(one.name)
        ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
        lines = [f"{why}: {', '.join(group_names(names).splitlines())}" for why, names in ordered[:_MANY]]
        return lines + ([f"… and {len(ordered) - _MANY} more reasons, --json shows all"] * (len(ordered) > _MANY))


def of_model(model: Described, log: ReadLog | None = None) -> Implausible:
    """Look at all weights of a described checkpoint, each read once.

    Args:
        model: the checkpoint, described.
        log: is told of every read.

    Raises:
        Damaged, StorageFault: a file cannot be read, or changed meanwhile.
    """
    constants: Mapping[str, object] = getattr(model.family.config, "constants", {})
    return _look(model.logical, bool(constants.get("apply_layernorm_1p")), log)


def of_graph(source: Source) -> Implausible | None:
    """The same for a graph whose weights have names and dtypes; None for others."""
    if not source.tensors:
        return None
    pieces = {
        name: tuple(Piece(name, e.region, e.file, e.offset, e.strides, one.spec.dtype) for e in one.extents)
        for name, one in source.tensors.items()
    }
    # single numbers are the graph's own constants, an infinity of a mask among them
    specs = {name: one.spec for name, one in source.tensors.items() if prod(one.spec.shape) > 1}
    return _look(Logical(source.root, specs, pieces, source.files), True, None)


def _look(logical: Logical, zero_centred: bool, log: ReadLog | None) -> Implausible:
    reader = open_reader(logical, _TILE_BYTES, apply, log)
    found: list[Finding] = []
    seen = 0
    try:
        for name, spec in logical.specs.items():
            if spec.dtype not in _FORMS or not prod(spec.shape):
                continue
            seen += 1
            copies = [Copy(p.region, p.file, p.offset, p.strides, p.dtype, MOVE) for p in logical.pieces[name]]
            look = _Look(spec, frozenset(copy.file for copy in copies if copy.file in logical.derived))
            for tile in Region.whole(spec.shape).bands(_TILE_BYTES // ITEMSIZE[spec.dtype]):
                clips = [clip for copy in copies if (clip := copy.clip(tile)) is not None]
                bits = np.empty(tile.shape, f"<u{ITEMSIZE[spec.dtype]}")
                for clip in clips:
                    reader.read_box(clip, bits[_place(tile, clip.region)])
                look.take(tile, bits, clips)
            if why := look.why(zero_centred):
                found.append(Finding(name, why))
    finally:
        reader.close()
    return Implausible(seen, tuple(found))


def _place(tile: Region, box: Region) -> tuple[slice[int, int, None], ...]:
    return tuple(slice(b - a, b - a + n) for a, b, n in zip(tile.start, box.start, box.shape, strict=True))


class _Look:
    """What is seen of one tensor, tile by tile. Rows are those of a matrix of all leading axes by the last one.

    Args:
        decoded: files that are computed: their offsets count elements.
    """

    def __init__(self, spec: TensorSpec, decoded: frozenset[str]) -> None:
        self._spec, self._decoded = spec, decoded
        self._magnitude, self._exponent, self._nan = _FORMS[spec.dtype]
        self._columns = spec.shape[-1] if spec.shape else 1
        self._count = prod(spec.shape)
        self._empty_rows = np.ones(self._count // self._columns, bool)
        self._empty_columns = np.ones(self._columns, bool)
        self._first: np.unsignedinteger[Any] | None = None
        self._constant = True
        self._zeros = self._broken = self._nans = 0
        self._runs: dict[tuple[str, int], int] = {}
        self._page: tuple[int, str] | None = None

    def take(self, tile: Region, bits: NDArray[Any], clips: Sequence[Copy]) -> None:
        kind = bits.dtype.type
        if self._first is None:
            self._first = bits.reshape(-1)[0]
        self._constant = self._constant and bool((bits == self._first).all())
        size = bits & kind(self._magnitude)
        broken = int(np.count_nonzero((size & kind(self._exponent)) == kind(self._exponent)))
        if broken:
            self._broken += broken
            self._nans += int(np.count_nonzero(size >= kind(self._nan)))
        some = size != 0
        zeros = some.size - int(np.count_nonzero(some))
        self._zeros += zeros
        row, column = divmod(_flat(tile.start, self._spec.shape), self._columns)
        matrix = some.reshape(-1, tile.shape[-1] if tile.shape else 1)
        rows, columns = slice(row, row + len(matrix)), slice(column, column + matrix.shape[1])
        if not zeros:
            self._empty_rows[rows] = False
            self._empty_columns[columns] = False
            self._runs = {}
            return
        self._empty_rows[rows] &= ~matrix.any(1)
        self._empty_columns[columns] &= ~matrix.any(0)
        if self._page is None:
            self._find_page(tile, ~some, clips)

    def _find_page(self, tile: Region, zero: NDArray[np.bool_], clips: Sequence[Copy]) -> None:
        """Look for a page of zeros in what lies in one piece in a file; runs go on in the next tile."""
        before, self._runs = self._runs, {}
        for clip in clips:
            decoded = clip.file in self._decoded
            itemsize, page = (1, _RUN) if decoded else (ITEMSIZE[clip.dtype], PAGE)
            outer = _outer(clip, itemsize)
            part = zero[_place(tile, clip.region)].reshape(prod(clip.region.shape[:outer]), -1)
            if outer and part.shape[1] * itemsize < page:
                continue
            for at, index in enumerate(np.ndindex(*clip.region.shape[:outer])):
                stretch = part[at]
                offset = clip.offset + sum(i * step for i, step in zip(index, clip.strides, strict=False))
                began = before.pop((clip.file, offset), self._runs.pop((clip.file, offset), offset))
                found, tail = _page_in(stretch, offset, began, itemsize, page)
                self._runs[clip.file, offset + stretch.size * itemsize] = tail
                if found is not None and self._page is None:
                    start = tuple(a + i for a, i in zip(clip.region.start, index, strict=False))
                    first = (*start, *clip.region.start[outer:])
                    row = (_flat(first, self._spec.shape) + max(found - offset, 0) // itemsize) // self._columns
                    where = f"at byte {found:,} of {clip.file}"
                    self._page = (row, f"{_RUN:,} zeros in a row" if decoded else f"a page of zeros {where}")

    def why(self, zero_centred: bool) -> str:
        """What is implausible; empty where nothing is."""
        spec = self._spec
        role = place_of(spec.name, spec.shape).role
        if self._broken:
            parts = [f"{n:,} {what}" for n, what in ((self._nans, "NaN"), (self._broken - self._nans, "infinite")) if n]
            return "all NaN" if self._nans == self._count else f"{' and '.join(parts)} of {self._count:,} values"
        vector = len(spec.shape) < 2
        if self._zeros == self._count:
            plausible = role == "bias" or self._count == 1 or (vector and (role != "norm" or zero_centred))
            return "" if plausible else "all zero"
        if self._constant and self._count > 1:
            value = _said(self._first, spec.dtype)
            return "" if vector and value == "1" else f"constant, all {value}"
        return "" if role == "bias" else self._part(role, vector)

    def _part(self, role: str, vector: bool) -> str:
        """A part of it that is zero where the rest is not: what a shard or a page that was lost leaves."""
        rows, columns = len(self._empty_rows), self._columns
        padded = rows - _tail(self._empty_rows) if role in ("embedding", "head") else rows  # padding of a vocabulary
        for axis, empty, across in (("rows", self._empty_rows[:padded], columns),
                                    ("columns", self._empty_columns, rows)):  # fmt: skip
            first, stop = _longest(empty)
            inside = (stop - first) * across
            if not vector and stop - first > 1 and inside * self._surprise(inside) >= _SURPRISE:
                return f"{axis} {first:,} to {stop - 1:,} of {empty.size if axis == 'columns' else rows:,} are zero"
        return self._page[1] if self._page and self._page[0] < padded else ""

    def _surprise(self, inside: int) -> float:
        """Bits of surprise of one more zero, given how many there are outside of a part that is all zeros."""
        outside = self._count - inside
        often = (self._zeros - inside) / outside if outside else 0.0
        return -float(np.log2(max(often, _OFTEN)))


def _flat(index: Sequence[int], shape: Sequence[int]) -> int:
    at = 0
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def _outer(copy: Copy, itemsize: int) -> int:
    """How many leading axes step over bytes of others: what is below them lies in one piece, in order."""
    step = itemsize
    for axis in reversed(range(len(copy.region.shape))):
        n = copy.region.shape[axis]
        if n > 1 and copy.strides[axis] != step:
            return axis + 1
        step *= n
    return 0


def _page_in(zero: NDArray[np.bool_], offset: int, began: int, itemsize: int, page: int) -> tuple[int | None, int]:
    """Where the first whole page of zeros of a stretch begins, and where the zeros at its end do.

    Args:
        zero: which bytes of the stretch are zero.
        offset: of the stretch in its file.
        began: where the zeros that end there begin in it.
        itemsize: bytes of a weight.
        page: bytes of a page.
    """
    end = offset + zero.size * itemsize
    lead = int(zero.argmin()) if not zero.all() else zero.size
    tail = end - itemsize * (int(zero[::-1].argmin()) if lead < zero.size else zero.size)
    if lead == zero.size:
        tail = began
    first = -(-began // page) * page
    if first + page <= offset + lead * itemsize:
        return first, tail
    first = -(-offset // page) * page
    skip, shifted = -(-(first - offset) // itemsize), (first - offset) % itemsize != 0
    each = page // itemsize
    pages = (zero.size - skip) // each
    if pages > 0:
        whole = zero[skip : skip + pages * each].reshape(pages, each)[:, : each - shifted].all(1)
        if whole.any():
            return first + int(whole.argmax()) * page, tail
    return None, tail


def _tail(empty: NDArray[np.bool_]) -> int:
    """How many of the last ones are empty."""
    return empty.size if empty.all() else int((~empty[::-1]).argmax())


def _longest(empty: NDArray[np.bool_]) -> tuple[int, int]:
    """The longest run of empty ones, as first and one past the last."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], empty, [False])).astype(np.int8)))
    if not edges.size:
        return 0, 0
    best = int((edges[1::2] - edges[::2]).argmax())
    return int(edges[2 * best]), int(edges[2 * best + 1])


def _said(bits: Any, dtype: str) -> str:
    """A bit pattern as the number that it is."""
    if dtype.startswith("f8"):
        return f"0x{int(bits):02x}"
    return f"{float(cast(np.array([bits]).view(carrier(dtype)), dtype, 'f64')[0]):.6g}"
