"""What a calibration did, weight by weight: as JSON, and as a page with the error of each layer."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from dconv.coded.places import place_of
from dconv.errors import group_names

NAME: Final = "calibration"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 300, 64, 36
#: Readable on light and on dark, and told apart by the colour-blind (Okabe and Ito).
_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999")

_PAGE: Final = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Calibration</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;
padding:0 1rem}}svg{{width:100%;height:auto}}table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
td,th{{padding:.15rem .8rem .15rem 0;text-align:right}}td:first-child,th:first-child{{text-align:left}}
text{{fill:currentColor;font-size:12px}}.wide{{overflow-x:auto}}</style>
<h1>Calibration</h1><p>{summary}</p>
<h2>Error of outputs by layer</h2><p>Squared error of what a weight answers on the samples, as a part of the answer.</p>
{plot}{lacking}<h2>Every kind of weight</h2><div class="wide"><table><tr><th>weight<th>number<th>bits<th>mean error
<th>largest<th>damping up to<th>seconds</tr>{rows}</table></div></html>
"""


def files_of(lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Iterable[tuple[str, bytes]]:
    """The report's files, by name.

    Args:
        lines: one for each weight (`dconv.quant.loop`).
        record: of settings and samples.
    """
    said = {"summary": summary(lines), **record, "coverage": coverage(lines), "weights": list(lines)}
    yield f"{NAME}.json", (json.dumps(said, indent=1) + "\n").encode()
    yield f"{NAME}.html", _page(lines).encode()


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """The report in a sentence: how many weights, their mean relative error, how many no token reached."""
    if not lines:
        return "no weight was quantised"
    seen = [line for line in lines if line["tokens"]]
    mean = sum(line["relative_error"] for line in seen) / max(len(seen), 1)
    text = f"{len(lines):,} weights quantised, mean relative error {mean:.3g}"
    rest = len(lines) - len(seen)
    return text + (f", {rest:,} rounded to nearest because no token reached them" if rest else "")


def coverage(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How the tokens of each layer were spread over its experts."""
    by_layer: dict[int, dict[str, int]] = defaultdict(dict)
    for line in lines:
        expert = place_of(line["weight"], (1, 1))
        if ".experts.*" in expert.kind:
            by_layer[line["layer"]][line["weight"].partition(".experts.")[2].partition(".")[0]] = line["tokens"]
    return [
        {
            "layer": layer,
            "experts": len(tokens),
            "without_tokens": sorted((int(e) for e, count in tokens.items() if not count)),
            "fewest": min(tokens.values()),
            "most": max(tokens.values()),
        }
        for layer, tokens in sorted(by_layer.items())
    ]


def _page(lines: Sequence[Mapping[str, Any]]) -> str:
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        kinds[place_of(line["weight"], (1, 1)).kind].append(line)
    rows = "".join(
        f"<tr><td>{html.escape(kind)}<td>{len(found):,}<td>{_bits(found)}"
        f"<td>{sum(line['relative_error'] for line in found) / len(found):.3g}"
        f"<td>{max(line['relative_error'] for line in found):.3g}"
        f"<td>{max(line['damp'] for line in found):.3g}<td>{sum(line['seconds'] for line in found):.1f}</tr>"
        for kind, found in kinds.items()
    )
    missed = [line["weight"] for line in lines if not line["tokens"]]
    lacking = f"<h2>Reached by no token</h2><p>{html.escape(group_names(missed))}</p>" if missed else ""
    return _PAGE.format(summary=html.escape(summary(lines)), plot=_plot(kinds), lacking=lacking, rows=rows)


def _bits(lines: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(map(str, sorted({line["bits"] for line in lines})))


def _plot(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Lines over layers, one for each kind of weight; experts of a layer by their mean."""
    series: dict[str, dict[int, float]] = {}
    for kind, lines in kinds.items():
        each: dict[int, list[float]] = defaultdict(list)
        for line in lines:
            each[line["layer"]].append(line["relative_error"])
        series[kind] = {layer: sum(found) / len(found) for layer, found in each.items()}
    last = max((layer for found in series.values() for layer in found), default=0)
    top = max((value for found in series.values() for value in found.values()), default=0.0) or 1.0

    def x(layer: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * layer / max(last, 1)

    def y(value: float) -> float:
        return (_HEIGHT - _BOTTOM) * (1 - value / top) + 8

    parts = [
        f'<text x="{_LEFT - 6}" y="{y(top * i / 4) + 4:.1f}" text-anchor="end">{top * i / 4:.2g}</text>'
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(top * i / 4):.1f}" y2="{y(top * i / 4):.1f}" stroke="#8885"/>'
        for i in range(5)
    ]
    step = max(1, (last + 1) // 12)
    parts += [
        f'<text x="{x(i):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{i}</text>' for i in range(0, last + 1, step)
    ]
    legend: list[str] = []
    for number, (kind, found) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(f"{x(layer):.1f},{y(value):.1f}" for layer, value in sorted(found.items()))
        dash = "" if number < len(_COLOURS) else ' stroke-dasharray="4 3"'
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        legend.append(f'<span style="color:{colour}">&#9632;</span> {html.escape(kind)}')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg><p>{" &nbsp; ".join(legend)}</p>'
