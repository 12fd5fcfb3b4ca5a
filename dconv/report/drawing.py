"""Pictures for the pages, as SVG within HTML: bytes on their way, lines over an axis, rows of cells.

Colours are classes of the style sheet, so that they suit light and dark; every text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Final

from dconv.report.flows import Flows, grouped, merged, totals
from dconv.report.parts import printable, said
from dconv.report.plan import size

#: Nodes of a column that are told apart; the rest are one.
MOST: Final = 24
#: Colours of the style sheet, c0 to c6: told apart by the colour-blind (after Okabe and Ito).
COLOURS: Final = 7
_WIDTH: Final = 960
#: Where the columns are, and how wide a node is.
_AT: Final = (300, 474, 648)
_NODE: Final = 12
#: Pixels of all bytes together, of a node at least (its label has to fit), and between two.
_TALL, _LEAST, _GAP = 360, 15, 4
_LABEL: Final = 34
_TOP: Final = 34


@dataclass(frozen=True)
class _Node:
    top: float
    tall: float


def flow(flows: Flows) -> str:
    """A plan: source files, ranks and target files, with bands as wide as the bytes between them."""
    left = grouped(totals(flows.read, 0), MOST, "files")
    ranks = grouped(dict.fromkeys(flows.ranks, 0), MOST, "ranks")
    right = grouped(totals(flows.written, 1), MOST, "files")
    reads, writes = merged(flows.read, left, ranks), merged(flows.written, ranks, right)
    sums = [
        totals(reads, 0),
        {name: max(totals(reads, 1).get(name, 0), totals(writes, 0).get(name, 0)) for name in ranks.values()},
        totals(writes, 1),
    ]
    scale = _TALL / max(1, *(sum(column.values()) for column in sums))
    heights = [sum(max(n * scale, _LEAST) + _GAP for n in column.values()) for column in sums]
    tall = max(heights)
    columns = [_column(column, scale, (tall - height) / 2) for column, height in zip(sums, heights, strict=True)]
    colours = {name: f"c{i % COLOURS}" for i, name in enumerate(dict.fromkeys(ranks.values()))}
    bands = _bands(reads, columns[0], columns[1], 0, scale, colours)
    bands += _bands(writes, columns[1], columns[2], 1, scale, colours)
    heads = zip(_AT, ("start", "middle", "end"), (10, _AT[1] + _NODE / 2, _WIDTH - 10), sums,
                ("source", "ranks", "target"), strict=True)  # fmt: skip
    texts = "".join(
        f'<text class="faint" x="{x}" y="16" text-anchor="{anchor}">{words}{_of(column, words)}</text>'
        for _, anchor, x, column, words in heads
    )
    nodes = "".join(_nodes(i, column, sums[i]) for i, column in enumerate(columns))
    said_in_words = f"from {len(totals(flows.read, 0))} source files through {len(flows.ranks)} ranks"
    return (
        f'<div class="scroll"><svg class="picture" viewBox="0 0 {_WIDTH} {tall + _TOP + 6:.0f}" role="img" '
        f'aria-label="bytes {said_in_words} to target files">{texts}{bands}{nodes}</svg></div>'
    )


def _of(column: Mapping[str, int], words: str) -> str:
    return "" if words == "ranks" else f", {size(sum(column.values()))}"


def _column(sums: Mapping[str, int], scale: float, top: float) -> dict[str, _Node]:
    """Where the nodes of a column are; one whose bytes are few has room for its label around it."""
    nodes: dict[str, _Node] = {}
    at = top + _TOP
    for name, nbytes in sums.items():
        tall, slot = max(nbytes * scale, 1.0), max(nbytes * scale, _LEAST)
        nodes[name] = _Node(at + (slot - tall) / 2, tall)
        at += slot + _GAP
    return nodes


def _bands(
    bands: Mapping[tuple[str, str], int], left: Mapping[str, _Node], right: Mapping[str, _Node], column: int,
    scale: float, colours: Mapping[str, str],
) -> str:  # fmt: skip
    """The bands between two columns, in the colour of their rank; those of a node lie one under the other."""
    tops = [{name: node.top for name, node in side.items()} for side in (left, right)]
    order_left, order_right = ({name: i for i, name in enumerate(side)} for side in (left, right))
    x0, x1 = _AT[column] + _NODE, _AT[column + 1]
    middle = (x0 + x1) / 2
    drawn: list[str] = []
    for (a, b), nbytes in sorted(bands.items(), key=lambda one: (order_left[one[0][0]], order_right[one[0][1]])):
        wide = nbytes * scale
        ya, yb = tops[0][a], tops[1][b]
        tops[0][a] += wide
        tops[1][b] += wide
        if not nbytes:
            continue
        words = said(f"{a} to {b}: {size(nbytes)}")
        drawn.append(
            f'<path class="band {colours[b if column == 0 else a]}" data-bytes="{nbytes}" d="M{x0} {ya:.1f}'
            f"C{middle} {ya:.1f} {middle} {yb:.1f} {x1} {yb:.1f}V{yb + max(wide, 0.4):.1f}"
            f'C{middle} {yb + wide:.1f} {middle} {ya + wide:.1f} {x0} {ya + max(wide, 0.4):.1f}Z">'
            f"<title>{words}</title></path>"
        )
    return "".join(drawn)


def _nodes(column: int, nodes: Mapping[str, _Node], sums: Mapping[str, int]) -> str:
    drawn: list[str] = []
    x = _AT[column]
    place = ((x - 8, "end", ""), (x + _NODE + 6, "start", " over"), (x + _NODE + 8, "start", ""))[column]
    for name, node in nodes.items():
        shown = (f"{_short(name)}  {size(sums[name])}", _short(name), f"{size(sums[name])}  {_short(name)}")
        words = shown[column]
        drawn.append(
            f'<rect class="node" x="{x}" y="{node.top:.1f}" width="{_NODE}" height="{node.tall:.1f}">'
            f'<title>{said(f"{name}: {size(sums[name])}")}</title></rect><text class="file{place[2]}" x="{place[0]}" '
            f'y="{node.top + node.tall / 2 + 4:.1f}" text-anchor="{place[1]}">{said(words)}</text>'
        )
    return "".join(drawn)


def _short(name: str) -> str:
    """The end of a name tells files of one folder apart, its beginning what they are."""
    shown = printable(name)
    if len(shown) <= _LABEL:
        return shown
    return f"{shown[: _LABEL // 2 - 4]}…{shown[-(_LABEL // 2 + 3) :]}"


@dataclass(frozen=True)
class Line:
    """One line of a chart: points (x, y) from left to right."""

    name: str
    points: Sequence[tuple[float, float]]


_CHART: Final = (960, 300)
_PLOT: Final = (78, 18, 940, 248)


def chart(lines: Sequence[Line], *, x: str, y: str, whole: bool = False, from_x: float = 0.0) -> str:
    """Lines over one axis, with a legend.

    Args:
        lines: each with its points.
        x: what the axis along the page is, with its unit.
        y: the same of the other one.
        whole: the x axis counts things, so that its ticks are whole numbers.
        from_x: where that axis begins.
    """
    right = max((point[0] for line in lines for point in line.points), default=0.0)
    top = max((point[1] for line in lines for point in line.points), default=0.0) or 1.0
    ticks_y, ticks_x = _ticks(0.0, top, 4), _ticks(from_x, max(right, from_x + (1.0 if whole else 1e-3)), 8, whole)
    high, wide = max(ticks_y[-1], top), max(ticks_x[-1] if whole else right, from_x + 1e-9)
    x0, y0, x1, y1 = _PLOT

    def px(value: float) -> float:
        return x0 + (x1 - x0) * (value - from_x) / (wide - from_x)

    def py(value: float) -> float:
        return y1 - (y1 - y0) * value / high

    parts = [
        f'<line class="grid" x1="{x0}" x2="{x1}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
        f'<text x="{x0 - 8}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        for tick in ticks_y
    ]
    parts += [
        f'<text x="{px(tick):.1f}" y="{y1 + 18}" text-anchor="middle">{tick:.4g}</text>'
        for tick in ticks_x
        if tick <= wide * (1 + 1e-9)
    ]
    parts.append(f'<text class="faint" x="{(x0 + x1) / 2}" y="{_CHART[1] - 8}" text-anchor="middle">{said(x)}</text>')
    parts.append(
        f'<text class="faint" x="14" y="{(y0 + y1) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(y0 + y1) / 2})">{said(y)}</text>'
    )
    legend: list[str] = []
    for i, line in enumerate(lines):
        look = f"c{i % COLOURS}"
        dash = " dash" if i >= COLOURS else ""
        points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in line.points)
        title = f"<title>{said(line.name)}</title>"
        parts.append(f'<polyline class="line {look}{dash}" points="{points}">{title}</polyline>')
        if len(line.points) == 1:
            a, b = line.points[0]
            parts.append(f'<circle class="cell {look}" cx="{px(a):.1f}" cy="{py(b):.1f}" r="3">{title}</circle>')
        legend.append(f'<li><span class="key colour {look}"></span><span class="name">{said(line.name)}</span></li>')
    return (
        f'<div class="scroll"><svg class="picture" viewBox="0 0 {_CHART[0]} {_CHART[1]}" role="img" '
        f'aria-label="{said(y)} by {said(x)}">{"".join(parts)}</svg></div><ul class="legend">{"".join(legend)}</ul>'
    )


def strips(lines: Sequence[Line], *, x: str, y: str) -> str:
    """The same for many lines: a row each, darker where more; their points have the same x."""
    top = max((point[1] for line in lines for point in line.points), default=0.0) or 1.0
    x0, _, x1, _ = _PLOT
    tall = 14
    bottom = 8 + tall * len(lines)
    right = max((point[0] for line in lines for point in line.points), default=0.0) or 1.0
    parts: list[str] = []
    for i, line in enumerate(lines):
        y0 = 8 + tall * i
        parts.append(f'<text x="{x0 - 8}" y="{y0 + 11}" text-anchor="end">{said(line.name)}</text>')
        before = 0.0
        for end, value in line.points:
            left, wide = x0 + (x1 - x0) * before / right, (x1 - x0) * (end - before) / right
            before = end
            if value:
                words = said(f"{line.name} up to {end:.3g} s: {value:.3g} {y}")
                parts.append(
                    f'<rect class="cell c0" x="{left:.1f}" y="{y0}" width="{max(wide, 0.5):.1f}" height="{tall - 2}" '
                    f'fill-opacity="{0.12 + 0.88 * value / top:.2f}"><title>{words}</title></rect>'
                )
    for tick in _ticks(0.0, right, 8):
        if tick <= right:
            at = x0 + (x1 - x0) * tick / right
            parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    words = f"{x}; the darkest is {top:.3g} {y}"
    parts.append(f'<text class="faint" x="{(x0 + x1) / 2}" y="{bottom + 36}" text-anchor="middle">{said(words)}</text>')
    return (
        f'<div class="scroll"><svg class="picture" viewBox="0 0 {_CHART[0]} {bottom + 44}" role="img" '
        f'aria-label="{said(words)}">{"".join(parts)}</svg></div>'
    )


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers from below ``low`` to above ``high``."""
    step = 10.0 ** floor(log10(max((high - low) / about, 1e-12)))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    if whole:
        step = max(round(step), 1)
    return [step * i for i in range(floor(low / step), ceil(high / step - 1e-9) + 1)]
