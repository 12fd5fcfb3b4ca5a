"""The map of layers on a page: a row is a layer, a column a class of modules, a colour a precision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from dconv.report.parts import named, said
from dconv.report.precision import SCALED, UNSCALED, Cell, Precision
from dconv.report.words import scale_words
from dconv.sharding.dtypes import ITEMSIZE

#: What a browser still lays out at once; a hostile header has as many names as fit into 100 MB.
CELLS: Final = 20_000
ROWS: Final = 1000
_COLUMNS: Final = 128
#: Bits of a code, in the name of its kind: Q4_K, IQ4_NL, int4, MXFP4.
_BITS: Final = re.compile(r"(?:Q|int|FP|fp)([1-9])")
#: Of a state: its class of the style sheet, and what the legend says.
_LEGEND: Final = {
    "fp8": "FP8 with scales", "bare": "FP8 without scales", "bf16": "bf16", "f16": "f16", "f32": "f32 or f64",
    "whole": "whole numbers, packed codes among them", "mixed": "several in one cell",
}  # fmt: skip


def layer_map(precision: Precision | None, most: int = CELLS) -> str:
    """The map with its legend, and what is outside of layers before it.

    Args:
        precision: of the checkpoint; None draws nothing.
        most: cells that are shown.
    """
    cells = precision.cells[:most] if precision else ()
    layered = [cell for cell in cells if cell.layer >= 0]
    columns = list(dict.fromkeys(cell.kind for cell in layered))
    rows = list(dict.fromkeys((cell.stack, cell.layer) for cell in layered))
    beside = [cell for cell in cells if cell.layer < 0][:ROWS]
    hidden = (len(precision.cells) if precision else 0) - len(cells)
    cut = hidden or len(columns) > _COLUMNS or len(rows) > ROWS
    grouped = "The map is cut: --json has all." if cut else "A layer's experts are one cell."
    legend = "".join(
        f'<li><span class="key {kind}">&nbsp;</span>{said(words)}</li>'
        for kind, words in _LEGEND.items()
        if any(look(cell)[0] == kind for cell in cells)
    )
    outside = "".join(f"<li {_attributes(cell)}>{said(named(cell.kind))} {look(cell)[1]}</li>" for cell in beside)
    heads = "".join(f'<th scope="col"><span class="name">{said(kind)}</span></th>' for kind in columns[:_COLUMNS])
    body = "".join(_rows(layered, columns[:_COLUMNS], rows[:ROWS]))
    return (
        '<p class="faint">A row is a layer, a column a class of modules; a cell\'s number is bits a value, its colour '
        f'the precision. {grouped}</p><ul class="legend">{legend}</ul>'
        f'<div class="mapped"><ul class="outside" aria-label="outside of the layers">{outside}</ul>'
        f'<div class="scroll cells"><table class="map"><thead><tr><th>layer</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        '<div class="detail" aria-live="polite">Point at a cell, tap it, or go there with the arrow keys.</div></div>'
    )


def look(cell: Cell) -> tuple[str, str]:
    """Class of the style sheet, and bits a value."""
    if len(cell.states) > 1:
        return "mixed", "mix"
    state = next(iter(cell.states))
    if state.endswith(UNSCALED):
        return "bare", "8!"
    if state.endswith(SCALED):
        return "fp8", "8"
    if state not in ITEMSIZE:  # codes under names of their own: GGUF's blocks, packed words
        bits = _BITS.search(state)
        return "whole", bits[1] if bits else "code"
    bits = str(8 * ITEMSIZE[state])
    if state in ("bf16", "f16"):
        return state, bits
    return ("f32" if state in ("f32", "f64") else "bare" if state.startswith("f8") else "whole"), bits


def _attributes(cell: Cell, stop: bool = True) -> str:
    words = said("\n".join(_words(cell)))
    return f'class="{look(cell)[0]}" tabindex="{0 if stop else -1}" data-c="{words}" title="{words}"'


def _words(cell: Cell) -> Iterable[str]:
    """What there is to say of a cell."""
    many = f"{cell.count:,} tensors: " if cell.count > 1 else ""
    yield named(cell.name)
    yield many + ", ".join(f"{n:,} {state}" if len(cell.states) > 1 else state for state, n in cell.states.items())
    yield f"shape {shapes_of(cell)}   {cell.nbytes:,} bytes"
    if cell.scales:
        yield f"scales {scale_words(cell.scales)}"


def shapes_of(cell: Cell) -> str:
    """The shapes in a cell, in words."""
    shapes = [" x ".join(map(str, shape)) or "one value" for shape, _ in cell.shapes.most_common(3)]
    return " or ".join(shapes) + (" or others" if len(cell.shapes) > 3 else "")


def _rows(cells: Sequence[Cell], columns: Sequence[str], rows: Sequence[tuple[str, int]]) -> Iterable[str]:
    at = {(cell.stack, cell.layer, cell.kind): cell for cell in cells}
    several = len({stack for stack, _ in rows}) > 1
    first = True
    for stack, layer in rows:
        yield f'<tr><th scope="row">{said(f"{stack}.{layer}" if several else layer)}</th>'
        for kind in columns:
            cell = at.get((stack, layer, kind))
            yield f"<td {_attributes(cell, first)}>{look(cell)[1]}</td>" if cell else "<td></td>"
            first = first and cell is None
        yield "</tr>"
