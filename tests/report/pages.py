"""Reports of conversions, taken apart as a browser does, and held to what pages of ours may have in them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

_HTML = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "pre", "dl", "dt", "dd", "ul", "li"),
    *("div", "span", "b", "i", "strong", "code", "table", "thead", "tbody", "tr", "th", "td", "script"),
    *("svg", "text", "path", "rect", "line", "polyline", "circle"),
}
_VOID = {"meta"}
#: Attributes by which a page would fetch, go somewhere or run something.
_ACTIVE = {"src", "href", "xlink:href", "action", "srcset", "data", "poster", "background", "formaction"}


class Read(HTMLParser):
    """A report.

    Attributes:
        bands: of the plan's picture: ends and bytes, those of the source first.
        rows: of all tables, the cells' texts.
        facts: of all lists of labels and values.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.bands: list[tuple[str, int]] = []
        self.rows: list[list[str]] = []
        self.facts: dict[str, str] = {}
        self.scripts: list[str] = []
        self.heads: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self._bytes: int | None = None
        self._label = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {key: value or "" for key, value in attrs}
        assert tag in _HTML, tag
        assert not _ACTIVE & said.keys() and not any(key.startswith("on") for key in said), said
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag == "dt":
            self._label = ""
        if tag == "path":
            self._bytes = int(said["data-bytes"])
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            self.scripts.append(data)
            return
        if inside == "style":
            return
        self.words += data
        if inside == "title" and self._bytes is not None:
            self.bands.append((data, self._bytes))
            self._bytes = None
        if inside in ("h1", "h2", "h3"):
            self.heads.append(data)
        if inside == "dt":
            self._label += data
        if inside == "dd":
            self.facts[self._label] = self.facts.get(self._label, "") + data
        if self.rows and self.rows[-1] and {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def report(self) -> Any:
        """What a program reads of it."""
        return json.loads(self.scripts[0])

    def by_rank(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of the bands to each rank, and from it."""
        to: dict[str, int] = {}
        out: dict[str, int] = {}
        for words, nbytes in self.bands:
            a, b = words.rpartition(": ")[0].split(" to ")
            side, rank = (out, a) if a.startswith("rank ") or a.endswith(" more ranks") else (to, b)
            side[rank] = side.get(rank, 0) + nbytes
        return to, out
