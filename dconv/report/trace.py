"""A tensor's way through a plan for a terminal of 80 columns; ranks that follow one pattern are one entry."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Final

from dconv.errors import group_names
from dconv.own_names import Place
from dconv.sharding.region import Index, Region
from dconv.trace import Trace, merged

_WIDTH: Final = 80
_LABEL: Final = 9
#: Tensors, and entries a tensor, that a person reads; ``--json`` has all.
_TENSORS: Final = 8
_ENTRIES: Final = 12
_NUMBER: Final = re.compile(r"\d+")
#: A space at which no line ends.
_GLUE: Final = "\0"


def text(traces: Sequence[Trace]) -> str:
    """For a person; a name that is longer than a line stands in a line of its own."""
    blocks = ["\n".join(_block(one)) for one in traces[:_TENSORS]]
    if len(traces) > _TENSORS:
        names = group_names(one.name for one in traces[_TENSORS:])
        blocks.append(f"… and {len(traces) - _TENSORS} more tensors match, --json has all\n{names}")
    return "\n\n".join(blocks)


def _block(one: Trace) -> list[str]:
    if one.left_out:
        return [*_lines("trace", one.name), *_lines("left out", one.left_out)]
    lines = _lines("trace", f"{one.name}  {form(one.shape, one.dtype)}")
    if one.published:
        lines += _lines("", f"in HuggingFace's files {form(one.published, one.dtype)}")
    computed = any(place.inputs for place in one.source)
    lines += _entries("made of" if computed else "from", one, [leaf for place in one.source for leaf in place.stored])
    lines += _entries("compared", one, [leaf for place in one.replicas for leaf in place.stored])
    own = {name for place in one.source for name in (place.name, *place.also)} or {one.name}
    if own != {one.name} and not computed:
        lines += _lines("named", f"{_folded(own)}  ->  {one.name}")
    lines += _lines("relayout", "; ".join(one.relayout) or "none")
    lines += _lines("values", "; ".join(dict.fromkeys(op for place in one.target for op in place.ops)))
    return lines + _entries("to", one, one.target)


def _entries(label: str, one: Trace, places: Sequence[Place]) -> list[str]:
    groups: dict[object, list[Place]] = {}
    for place in places:
        boxes = merged(place.boxes)
        like = (_NUMBER.sub("#", place.name), place.also, place.shape, place.dtype, place.ops, len(place.boxes))
        groups.setdefault((*like, place.padding, tuple(box.shape for box in boxes)), []).append(place)
    lines: list[str] = []
    for group in list(groups.values())[:_ENTRIES]:
        lines += _entry(label, one, group)
        label = ""
    if len(groups) > _ENTRIES:
        lines += _lines("", f"… and {len(groups) - _ENTRIES} more kinds of parts, --json has all")
    return lines


def _entry(label: str, one: Trace, group: Sequence[Place]) -> list[str]:
    """Places that differ in their rank, in numbers inside their name, and in where their boxes begin."""
    place = group[0]
    ranks = _folded(dict.fromkeys(p.rank for p in group)) if place.rank else ""
    files = _folded(dict.fromkeys(p.file for p in group)) or "no file"
    lines = _lines(label, f"{files}  {ranks}".rstrip())
    each = f"{len(group)} x " if len(group) > 1 else ""
    each = each if place.whole else f"{len(group)} files' parts of " if len(group) > 1 else "part of "
    names = _folded(dict.fromkeys(p.name for p in group))
    lines += _lines("", "".join([f"  {names}", *(f", the same bytes as {name}" for name in place.also)]))
    boxes = f":  {_boxes(one, group)}" if place.boxes else ""
    return lines + _lines("", f"  {each}{form(place.shape, place.dtype)}{boxes}")


def _boxes(one: Trace, group: Sequence[Place]) -> str:
    """The boxes that a group has: of one place alone, or the first's and the last's."""
    distinct = list(dict.fromkeys(merged(place.boxes) for place in group))
    count, stretches = len(distinct[0]), len(group[0].boxes)
    if distinct == [(Region.whole(one.shape),)]:
        said = "all of it" if len(group) == 1 else "all of it in each"
    elif len(distinct) == 1:
        said = _some(distinct[0], one.shape) + (" in each" if len(group) > 1 else "")
    else:
        said = f"{_some(distinct[0], one.shape)} … {_some(distinct[-1], one.shape)}"
        said += f", each {len(group) // len(distinct)} times" if len(distinct) < len(group) else ""
    said += f", in {stretches} stretches" if stretches > count else ""
    padding = group[0].padding
    return said + (f", {padding} elements of padding behind" if padding else "")


def _some(boxes: Sequence[Region], shape: Index) -> str:
    more = f" and {len(boxes) - 1} more boxes" if len(boxes) > 1 else ""
    return _box(boxes[0], shape) + more


def _box(box: Region, shape: Index) -> str:
    """As Python slices it: ``[0:512, :]``."""
    axes = zip(box.start, box.shape, shape, strict=True)
    said = (":" if n == of else str(a) if n == 1 else f"{a}:{a + n}" for a, n, of in axes)
    return f"[{f',{_GLUE}'.join(said)}]"


def form(shape: Index, dtype: str) -> str:
    """``[4096, 1024] bf16``."""
    return f"{list(shape)} {dtype}".replace(" ", _GLUE)


def _folded(names: Iterable[str]) -> str:
    """Names in one line: folded by their numbers where that says just these, else the first and the last."""
    names = list(names)
    grouped = group_names(names).splitlines()
    if len(grouped) == 1 and _count(grouped[0]) == len(names):
        return grouped[0]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})" if names else ""


def _count(folded: str) -> int:
    """How many names a folded one stands for."""
    ranges = re.findall(r"\{([\d.,]+)\}", folded)
    return math.prod(sum(_length(run) for run in part.split(",")) for part in ranges)


def _length(run: str) -> int:
    low, _, high = run.partition("..")
    return int(high) - int(low) + 1 if high else 1


def _lines(label: str, value: str) -> list[str]:
    indent = " " * (len(value) - len(value.lstrip()))
    wide = _WIDTH - _LABEL
    broken = textwrap.wrap(value, wide, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [f"{label if i == 0 else '':<{_LABEL}}{line}".replace(_GLUE, " ") for i, line in enumerate(broken)]
