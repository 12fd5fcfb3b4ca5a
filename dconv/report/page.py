"""The report as one page for a browser: no network, no framework; every name is escaped, whatever it is.

`page.html` is the template, in the frame of `frame.html`; what fills it is made here, so that the page reads without a
script, too. The script only shows a cell's words beside the map, and moves by arrow keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from dconv import __version__
from dconv.report import parts as shared
from dconv.report.layer_map import CELLS, ROWS, layer_map, look, shapes_of
from dconv.report.parts import framed, listed, named, said
from dconv.report.plan import size
from dconv.report.precision import Cell, Class, Precision
from dconv.report.statistics import PER_OCTAVE, Statistics
from dconv.report.words import scale_words
from dconv.sharding.parsed import is_dict

_COMMAND: Final = "dconv inspect"
_DEPTH: Final = 12
_BARS: Final = 160


def page(title: str, facts: Iterable[tuple[str, str]], report: Mapping[str, Any], precision: Precision | None) -> str:
    """The page.

    Args:
        title: the checkpoint's name.
        facts: labels and values, as the text has them.
        report: as ``--json`` has it; lists of all names are left out.
        precision: of the checkpoint; None where only its container's names are known.
    """
    parts = {
        "title": said(title),
        "version": said(__version__),
        "faults": "".join(_faults(report, precision)),
        "facts": listed(facts),
        "map": layer_map(precision),
        "histogram": _histogram(precision.scales) if precision and precision.scales else "",
        "classes": "".join(map(_class, precision.classes[:ROWS] if precision else ())),
        "tree": _tree(precision.cells[:CELLS] if precision else ()),
    }
    return framed("page.html", parts, title=title, command=_COMMAND, report=_kept(report))


def write(path: Path, text: str) -> None:
    """Write a page; only another page is replaced.

    Raises:
        UsageError: there is something else of that name.
        StorageFault: it cannot be written.
    """
    shared.write(path, text, option="--html", command=_COMMAND)


def _kept(report: Mapping[str, Any]) -> Mapping[str, Any]:
    kept = {key: value for key, value in report.items() if key not in ("names", "left_out")}
    if is_dict(precision := kept.get("precision")):
        lists = {key: len(precision[key]) for key in ("with_scales", "without_scales")}
        kept["precision"] = {**precision, **lists, "cells": precision["cells"][:CELLS]}
    return kept


def _faults(report: Mapping[str, Any], precision: Precision | None) -> Iterable[str]:
    if report.get("refused"):
        words = f"<dl><dd>{said(report['refused'])}</dd></dl>"
        yield f'<div class="wrong"><strong>A conversion would be refused</strong>{words}</div>'
    for fault in precision.faults if precision else ():
        names = "".join(f'<li class="name">{said(line)}</li>' for line in fault.where.split("\n") if line)
        leads = f"<p>Leads to: {said(fault.leads_to)}</p>" if fault.leads_to else ""
        do = f"<p>Do: <code>{said(fault.do)}</code></p>" if fault.do else ""
        yield f'<div class="wrong"><strong>{said(fault.what)}</strong><ul>{names}</ul>{leads}{do}</div>'


def _histogram(scales: Statistics) -> str:
    """Bars over log2 of the value; several bins in one where they would be too many."""
    if not scales.bins:
        return f"<h2>Scales</h2><p>{said(scale_words(scales))}</p>"
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
        f"<h2>Scales</h2><p>{said(scale_words(scales))}. How many lie where, the highest bar {max(counts):,}; "
        f'the axis is logarithmic.</p><div class="bars" role="img" aria-label="histogram of scales">{bars}</div>'
        f'<div class="ticks">{"".join(f"<span>{tick:.2g}</span>" for tick in ticks)}</div>'
    )


def _class(each: Class) -> str:
    states = ", ".join(f"{n:,} {state}" for state, n in each.states.items())
    return (
        f'<tr><td class="name">{said(named(each.kind))}</td><td>{said(each.role)}</td>'
        f'<td class="number">{each.count:,}</td><td>{said(states)}</td>'
        f'<td class="number">{size(each.nbytes)}</td></tr>'
    )


_Branch = dict[str, Any]


def _tree(cells: Iterable[Cell]) -> str:
    """Modules by the parts of their names, folded; a leaf is a cell."""
    root: _Branch = {}
    for cell in cells:
        above = [*cell.stack.split("."), str(cell.layer)] if cell.layer >= 0 else []
        *path, last = [*above, *cell.kind.split(".", _DEPTH)][: 2 * _DEPTH]
        branch = root
        for part in path:
            below: Any = branch.setdefault(part, {})
            branch = below if is_dict(below) else branch.setdefault(f"{part} (module)", {})
        branch[f"{last}\0" if isinstance(branch.get(last), dict) else last] = cell
    return "".join(_branch(name, below, depth=0) for name, below in root.items())


def _branch(name: str, below: _Branch | Cell, depth: int) -> str:
    label = said(named(name.rstrip("\0")))
    if isinstance(below, Cell):
        kind, bits = look(below)
        state = ", ".join(f"{n:,} {state}" for state, n in below.states.items())
        return (
            f'<div class="leaf"><span class="name">{label}</span> <span class="key {kind}">&nbsp;{bits}&nbsp;</span> '
            f'<span class="faint">{said(state)}, {said(shapes_of(below))}, {size(below.nbytes)}</span></div>'
        )
    count, nbytes = _sum(below)
    inner = "".join(_branch(each, what, depth + 1) for each, what in below.items())
    return (
        f'<details{" open" * (depth == 0)}><summary><span class="name">{label}</span> '
        f'<span class="faint">{count:,} tensor{"s" * (count != 1)}, {size(nbytes)}</span></summary>{inner}</details>'
    )


def _sum(branch: _Branch) -> tuple[int, int]:
    below = [(each.count, each.nbytes) if isinstance(each, Cell) else _sum(each) for each in branch.values()]
    return sum(count for count, _ in below), sum(nbytes for _, nbytes in below)
