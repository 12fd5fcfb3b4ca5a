"""The table of models by direction as a PDF: landscape A4, its head on each page, in a font that every reader has."""

from __future__ import annotations

import importlib
import importlib.util
from datetime import UTC, datetime
from typing import Any, Final

from dconv import __version__
from dconv.directions import SIGNS, Line, Way
from dconv.errors import ToolMissing
from dconv.report.archs import COMMAND, NOTES, TITLE, Directions

#: Millimetres.
_MARGIN: Final = 9.0
_STEP: Final = 2.7
_PAD: Final = 0.7
_WIDTHS: Final = {"models": 39.0, "name": 23.0, "layouts": 15.0, "shown": 33.0}
_HEAD: Final = 19.0
_FONT: Final = "Helvetica"
#: Points.
_SIZE: Final = 6.2
#: Behind the signs; dark letters stay readable on each, also where a printer has no colours.
_GROUNDS: Final[dict[Way, tuple[int, int, int]]] = {
    "exact": (198, 233, 226), "coded": (205, 219, 247), "calibrated": (221, 211, 244), "folded": (243, 222, 186),
    "handed": (222, 226, 231), "unsaid": (245, 246, 248), "none": (255, 255, 255),
}  # fmt: skip
_RULE: Final = (176, 184, 193)


def pdf(table: Directions) -> bytes:
    """The file.

    Raises:
        ToolMissing: fpdf2 is not installed.
    """
    if importlib.util.find_spec("fpdf") is None:
        raise ToolMissing(
            "a PDF is written by the package fpdf2, nothing was written",
            found="no module fpdf",
            do="pip install 'dconv[pdf]', or --format html, which browsers print",
        )
    return _Paper(table).made()


class _Paper:
    """The file while it is written: `_y` is where the next row begins."""

    def __init__(self, table: Directions) -> None:
        library: Any = importlib.import_module("fpdf")
        self._table = table
        self._pdf: Any = library.FPDF("landscape", "mm", "A4")
        self._pdf.set_margin(_MARGIN)
        self._pdf.set_auto_page_break(auto=False)
        self._pdf.set_title(TITLE)
        self._pdf.set_subject(table.head)
        self._pdf.set_creator(COMMAND)
        self._pdf.set_producer(f"dconv {__version__}")
        self._pdf.set_creation_date(datetime.combine(table.day, datetime.min.time(), UTC))
        self._bottom = self._pdf.h - _MARGIN - 4
        room = self._pdf.w - 2 * _MARGIN - sum(_WIDTHS.values())
        self._cell = min(room / len(table.columns), 6.0)
        self._y = 0.0

    def made(self) -> bytes:
        self._page()
        self._heads()
        for line in self._table.lines:
            self._line(line)
        self._legend()
        return bytes(self._pdf.output())

    def _page(self) -> None:
        """A new one: what it is, above; its number, below."""
        self._pdf.add_page()
        self._put(_MARGIN, _MARGIN, TITLE, size=13, style="B")
        self._put(_MARGIN, _MARGIN + 6.5, self._table.head, size=8)
        self._put(_MARGIN, self._pdf.h - _MARGIN - 3, f"page {self._pdf.page_no()}", size=_SIZE)
        self._y = _MARGIN + 12

    def _heads(self) -> None:
        """Names of the columns, upright, under the words of their groups."""
        top, at = self._y, self._signs_at
        for words, columns in self._table.groups:
            self._put(at + 0.5, top, words, size=7, style="B")
            at += len(columns) * self._cell
        foot = top + 3.5 + _HEAD
        for number, column in enumerate(self._table.columns):
            x = self._signs_at + number * self._cell + self._cell / 2 + 0.9
            with self._pdf.rotation(90, x, foot - 1):
                self._text(x, foot - 1, column.name, size=6.6)
        at = _MARGIN
        for key, words in (("models", "family"), ("name", "--model-type")):
            self._put(at + _PAD, foot - 4, words, size=7, style="B")
            at += _WIDTHS[key]
        at = self._signs_end
        for key, words in (("layouts", "layouts"), ("shown", "shown by")):
            self._put(at + _PAD, foot - 4, words, size=7, style="B")
            at += _WIDTHS[key]
        self._y = foot
        self._rule()
        self._between(top)

    def _line(self, line: Line) -> None:
        """A family, on a new page where this one is full."""
        texts = {"models": line.models, "name": line.name, "layouts": line.layouts, "shown": line.shown}
        parts = {key: self._parts(text, _WIDTHS[key] - 2 * _PAD) for key, text in texts.items()}
        height = max(len(part) for part in parts.values()) * _STEP + 2 * _PAD
        if self._y + height > self._bottom:
            self._page()
            self._heads()
        lefts = {"models": _MARGIN, "name": _MARGIN + _WIDTHS["models"], "layouts": self._signs_end}
        lefts["shown"] = self._signs_end + _WIDTHS["layouts"]
        for key, part in parts.items():
            top = self._y + (height - len(part) * _STEP) / 2
            for row, text in enumerate(part):
                style = "B" if key == "models" else ""
                self._put(lefts[key] + _PAD, top + row * _STEP, text, size=_SIZE, style=style)
        for number, way in enumerate(line.ways.values()):
            left = self._signs_at + number * self._cell
            self._pdf.set_fill_color(*_GROUNDS[way])
            self._pdf.rect(left, self._y, self._cell, height, style="F")
            wide = self._wide(SIGNS[way], 7.5)
            self._put(left + (self._cell - wide) / 2, self._y + height / 2 - _STEP / 2, SIGNS[way], size=7.5)
        self._rule()  # once more: the grounds lie on that of the line before
        self._y += height
        self._rule()
        self._between(self._y - height)

    def _between(self, top: float) -> None:
        """Lines beside the groups of columns, down to where the next row begins."""
        at = self._signs_at
        for _, columns in self._table.groups:
            self._pdf.line(at, top, at, self._y)
            at += len(columns) * self._cell
        self._pdf.line(at, top, at, self._y)

    def _legend(self) -> None:
        """What the signs mean, what the columns are, and what no table says; together on the last page."""
        wide = self._pdf.w - 2 * _MARGIN
        facts = "   ".join(f"{name}: {words}." for name, words in self._table.named)
        texts = [part for text in (facts, *NOTES) for part in [*self._parts(text, wide, size=7), ""]]
        height = (len(self._table.legend) + 2) * 3.6 + len(texts) * 3.1
        if self._y + height > self._bottom:
            self._page()
        self._y += 3
        for way, words in self._table.legend:
            self._pdf.set_fill_color(*_GROUNDS[way])
            self._pdf.set_draw_color(*_RULE)
            self._pdf.rect(_MARGIN, self._y, 5, 3.2, style="FD")
            self._put(_MARGIN + 2.5 - self._wide(SIGNS[way], 7) / 2, self._y + 0.2, SIGNS[way], size=7)
            self._put(_MARGIN + 7, self._y + 0.2, words, size=7)
            self._y += 3.6
        self._y += 2
        for text in texts:
            self._put(_MARGIN, self._y, text, size=7)
            self._y += 3.1 if text else 1.2

    @property
    def _signs_at(self) -> float:
        return _MARGIN + _WIDTHS["models"] + _WIDTHS["name"]

    @property
    def _signs_end(self) -> float:
        return self._signs_at + len(self._table.columns) * self._cell

    def _rule(self) -> None:
        self._pdf.set_draw_color(*_RULE)
        self._pdf.set_line_width(0.1)
        self._pdf.line(_MARGIN, self._y, self._signs_end + _WIDTHS["layouts"] + _WIDTHS["shown"], self._y)

    def _put(self, x: float, y: float, text: str, *, size: float, style: str = "") -> None:
        """Text whose top is at ``y``."""
        self._text(x, y + size * 0.3, text, size=size, style=style)

    def _text(self, x: float, y: float, text: str, *, size: float, style: str = "") -> None:
        self._pdf.set_font(_FONT, style, size)
        self._pdf.set_text_color(27, 31, 36)
        self._pdf.text(x, y, _spelled(text))

    def _wide(self, text: str, size: float) -> float:
        self._pdf.set_font(_FONT, "", size)
        return float(self._pdf.get_string_width(_spelled(text)))

    def _parts(self, text: str, wide: float, *, size: float = _SIZE) -> list[str]:
        """Text in lines of this width, in the wider of the two styles; a word that is wider alone is cut."""
        self._pdf.set_font(_FONT, "B", size)
        found = [""]
        for word in _spelled(text).split():
            longer = f"{found[-1]} {word}".strip()
            if found[-1] and self._pdf.get_string_width(longer) > wide:
                found.append("")
                longer = word
            while self._pdf.get_string_width(longer) > wide and len(longer) > 1:
                ends = range(len(longer) - 1, 0, -1)
                fits = next((n for n in ends if self._pdf.get_string_width(longer[:n]) <= wide), 1)
                found[-1], longer = longer[:fits], longer[fits:]
                found.append("")
            found[-1] = longer
        return found


def _spelled(text: str) -> str:
    """In letters that the font has: a name in others is spelled as Python does."""
    return text.encode("latin-1", "backslashreplace").decode("latin-1")
