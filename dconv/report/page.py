"""The report as one page for a browser: no network, no framework; every name is escaped, whatever it is.

`page.html` is the template; what fills it is made here, so that the page reads without a script, too. The script only
shows a cell's words beside the map, and moves by arrow keys.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dconv import __version__
from dconv.errors import StorageFault, UsageError
from dconv.report.precision import SCALED, UNSCALED, Cell, Class, Precision
from dconv.report.statistics import PER_OCTAVE, Statistics
from dconv.report.words import scale_words
from dconv.sharding.dtypes import ITEMSIZE

_TEMPLATE: Final = "page.html"
_MARK: Final = b'<meta name="generator" content="dconv inspect">'
#: What a browser still lays out at once; a hostile header has as many names as fit into 100 MB.
_CELLS, _ROWS, _COLUMNS, _NAME, _DEPTH = 20_000, 1000, 128, 300, 12
_BARS: Final = 160
#: Of a state: its class of the style sheet, and what the legend says.
_LEGEND: Final = {
    "fp8": "FP8 with scales", "bare": "FP8 without scales", "bf16": "bf16", "f16": "f16", "f32": "f32 or f64",
    "whole": "whole numbers, packed codes among them", "mixed": "several in one cell",
}  # fmt: skip


def page(title: str, facts: Iterable[tuple[str, str]], report: Mapping[str, Any], precision: Precision | None) -> str:
    """The page.

    Args:
        facts: labels and values, as the text has them.
        report: as ``--json`` has it; lists of all names are left out.
    """
    cells = precision.cells[:_CELLS] if precision else ()
    layered = [cell for cell in cells if cell.layer >= 0]
    columns = list(dict.fromkeys(cell.kind for cell in layered))
    rows = list(dict.fromkeys((cell.stack, cell.layer) for cell in layered))
    shown, beside = (columns[:_COLUMNS], rows[:_ROWS]), [cell for cell in cells if cell.layer < 0][:_ROWS]
    hidden = (len(precision.cells) if precision else 0) - len(cells)
    cut = hidden or len(columns) > _COLUMNS or len(rows) > _ROWS
    parts = {
        "title": _said(title),
        "version": _said(__version__),
        "faults": "".join(_faults(report, precision)),
        "facts": "".join(f"<dt>{_said(label)}</dt><dd>{_said(value)}</dd>" for label, value in _merged(facts)),
        "grouped": "The map is cut: --json has all." if cut else "A layer's experts are one cell.",
        "legend": "".join(
            f'<li><span class="key {kind}">&nbsp;</span>{_said(words)}</li>'
            for kind, words in _LEGEND.items()
            if any(_look(cell)[0] == kind for cell in cells)
        ),
        "outside": "".join(f"<li {_attributes(cell)}>{_said(cell.kind)} {_look(cell)[1]}</li>" for cell in beside),
        "heads": "".join(f'<th scope="col"><span class="name">{_said(kind)}</span></th>' for kind in shown[0]),
        "rows": "".join(_rows(layered, *shown)),
        "histogram": _histogram(precision.scales) if precision and precision.scales else "",
        "classes": "".join(map(_class, precision.classes[:_ROWS] if precision else ())),
        "tree": _tree(cells),
        "json": _json(report),
    }
    template = Path(__file__).with_name(_TEMPLATE).read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def write(path: Path, text: str) -> None:
    """Write a page; only another page is replaced.

    Raises:
        UsageError: there is something else of that name.
        StorageFault: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if os.path.lexists(path) and not _is_page(path):
            raise UsageError(
                "--html names a file that is no page of dconv inspect, nothing was written",
                where=str(path),
                do="name another file",
            )
        aside.write_text(text, "utf-8", errors="backslashreplace")
        os.replace(aside, path)
    except OSError as fault:
        aside.unlink(missing_ok=True)
        raise StorageFault(f"cannot write the page: {fault.strerror}", where=str(path)) from fault


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK in file.read(500)


def _said(text: object) -> str:
    words = str(text)
    return html.escape(words if len(words) <= 20 * _NAME else words[: 20 * _NAME] + "…")


def _name(text: str) -> str:
    return text if len(text) <= _NAME else text[:_NAME] + "…"


def _merged(facts: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """Labels with something to say; a line without a label goes on with what is before it."""
    said: list[tuple[str, str]] = []
    for label, value in facts:
        if not label and said:
            said[-1] = (said[-1][0], f"{said[-1][1]}\n{value}")
        elif value:
            said.append((label, value))
    return said


def _json(report: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in report.items() if key not in ("names", "left_out")}
    if isinstance(precision := kept.get("precision"), dict):
        lists = {key: len(precision[key]) for key in ("with_scales", "without_scales")}
        kept["precision"] = {**precision, **lists, "cells": precision["cells"][:_CELLS]}
    return json.dumps(kept).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _faults(report: Mapping[str, Any], precision: Precision | None) -> Iterable[str]:
    if report.get("refused"):
        words = f"<dl><dd>{_said(report['refused'])}</dd></dl>"
        yield f'<div class="wrong"><strong>A conversion would be refused</strong>{words}</div>'
    for fault in precision.faults if precision else ():
        names = "".join(f'<li class="name">{_said(line)}</li>' for line in fault.where.split("\n") if line)
        leads = f"<p>Leads to: {_said(fault.leads_to)}</p>" if fault.leads_to else ""
        do = f"<p>Do: <code>{_said(fault.do)}</code></p>" if fault.do else ""
        yield f'<div class="wrong"><strong>{_said(fault.what)}</strong><ul>{names}</ul>{leads}{do}</div>'


def _look(cell: Cell) -> tuple[str, str]:
    """Class of the style sheet and bits a value."""
    if len(cell.states) > 1:
        return "mixed", "mix"
    state = next(iter(cell.states))
    if state.endswith(UNSCALED):
        return "bare", "8!"
    if state.endswith(SCALED):
        return "fp8", "8"
    bits = str(8 * ITEMSIZE[state])
    if state in ("bf16", "f16"):
        return state, bits
    return ("f32" if state in ("f32", "f64") else "bare" if state.startswith("f8") else "whole"), bits


def _attributes(cell: Cell, stop: bool = True) -> str:
    words = _said("\n".join(_words(cell)))
    return f'class="{_look(cell)[0]}" tabindex="{0 if stop else -1}" data-c="{words}" title="{words}"'


def _words(cell: Cell) -> Iterable[str]:
    """What there is to say of a cell."""
    many = f"{cell.count:,} tensors: " if cell.count > 1 else ""
    yield _name(cell.name)
    yield many + ", ".join(f"{n:,} {state}" if len(cell.states) > 1 else state for state, n in cell.states.items())
    yield f"shape {_shapes(cell)}   {cell.nbytes:,} bytes"
    if cell.scales:
        yield f"scales {scale_words(cell.scales)}"


def _shapes(cell: Cell) -> str:
    shapes = [" x ".join(map(str, shape)) or "one value" for shape, _ in cell.shapes.most_common(3)]
    return " or ".join(shapes) + (" or others" if len(cell.shapes) > 3 else "")


def _rows(cells: Sequence[Cell], columns: Sequence[str], rows: Sequence[tuple[str, int]]) -> Iterable[str]:
    at = {(cell.stack, cell.layer, cell.kind): cell for cell in cells}
    several = len({stack for stack, _ in rows}) > 1
    first = True
    for stack, layer in rows:
        yield f'<tr><th scope="row">{_said(f"{stack}.{layer}" if several else layer)}</th>'
        for kind in columns:
            cell = at.get((stack, layer, kind))
            yield f"<td {_attributes(cell, first)}>{_look(cell)[1]}</td>" if cell else "<td></td>"
            first = first and cell is None
        yield "</tr>"


def _histogram(scales: Statistics) -> str:
    """Bars over log2 of the value; several bins in one where they would be too many."""
    if not scales.bins:
        return f"<h2>Scales</h2><p>{_said(scale_words(scales))}</p>"
    low, high = min(scales.bins), max(scales.bins)
    wide = -(-(high - low + 1) // _BARS)
    counts = [sum(scales.bins[low + at + i] for i in range(wide)) for at in range(0, high - low + 1, wide)]
    edges = [2 ** ((low + at * wide) / PER_OCTAVE) for at in range(len(counts) + 1)]
    bars = "".join(
        f'<i style="height:{max(100 * n / max(counts), 1.5 if n else 0):.1f}%" '
        f'title="{n:,} of {scales.count:,} from {edges[i]:.3g} to {edges[i + 1]:.3g}"></i>'
        for i, n in enumerate(counts)
    )
    ticks = [edges[round(len(counts) * i / 4)] for i in range(5)] if len(counts) >= 4 else [edges[0], edges[-1]]
    return (
        f"<h2>Scales</h2><p>{_said(scale_words(scales))}. How many lie where, the highest bar {max(counts):,}; "
        f'the axis is logarithmic.</p><div class="bars" role="img" aria-label="histogram of scales">{bars}</div>'
        f'<div class="ticks">{"".join(f"<span>{tick:.2g}</span>" for tick in ticks)}</div>'
    )


def _class(each: Class) -> str:
    states = ", ".join(f"{n:,} {state}" for state, n in each.states.items())
    return (
        f'<tr><td class="name">{_said(_name(each.kind))}</td><td>{_said(each.role)}</td>'
        f'<td class="number">{each.count:,}</td><td>{_said(states)}</td>'
        f'<td class="number">{_size(each.nbytes)}</td></tr>'
    )


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


_Branch = dict[str, Any]


def _tree(cells: Iterable[Cell]) -> str:
    """Modules by the parts of their names, folded; a leaf is a cell."""
    root: _Branch = {}
    for cell in cells:
        above = [*cell.stack.split("."), str(cell.layer)] if cell.layer >= 0 else []
        *path, last = [*above, *cell.kind.split(".", _DEPTH)][: 2 * _DEPTH]
        branch = root
        for part in path:
            below = branch.setdefault(part, {})
            branch = below if isinstance(below, dict) else branch.setdefault(f"{part} (module)", {})
        branch[f"{last}\0" if isinstance(branch.get(last), dict) else last] = cell
    return "".join(_branch(name, below, depth=0) for name, below in root.items())


def _branch(name: str, below: _Branch | Cell, depth: int) -> str:
    label = _said(_name(name.rstrip("\0")))
    if isinstance(below, Cell):
        kind, bits = _look(below)
        state = ", ".join(f"{n:,} {state}" for state, n in below.states.items())
        return (
            f'<div class="leaf"><span class="name">{label}</span> <span class="key {kind}">&nbsp;{bits}&nbsp;</span> '
            f'<span class="faint">{_said(state)}, {_said(_shapes(below))}, {_size(below.nbytes)}</span></div>'
        )
    count, nbytes = _sum(below)
    inner = "".join(_branch(each, what, depth + 1) for each, what in below.items())
    return (
        f'<details{" open" * (depth == 0)}><summary><span class="name">{label}</span> '
        f'<span class="faint">{count:,} tensor{"s" * (count != 1)}, {_size(nbytes)}</span></summary>{inner}</details>'
    )


def _sum(branch: _Branch) -> tuple[int, int]:
    below = [(each.count, each.nbytes) if isinstance(each, Cell) else _sum(each) for each in branch.values()]
    return sum(count for count, _ in below), sum(nbytes for _, nbytes in below)
