"""The table of models by direction that people send around: families against what is read and what is written.

Three forms say the same: Markdown for a repository, one page for a browser, a PDF (`dconv.report.archs_pdf`).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final

from dconv import __version__
from dconv.directions import MEANINGS, SIGNS, Column, Line, Way
from dconv.report.parts import framed, said

TITLE: Final = "Models by direction"
COMMAND: Final = "dconv archs"
#: What a group of columns is called above a table, and before the name of one of them.
GROUPS: Final = {"from": ("read from", "from"), "to": ("written as", "to"), "compiler": ("handed to", "for")}
#: In all forms of the table, by which one is known.
MARK: Final = b"dconv archs"
#: What a table cannot say.
NOTES: Final = (
    "What is read from any source of its line becomes any FORMAT of it. Sources in codes (FP8, MX, GPTQ, AWQ, GGUF's "
    "blocks, MLX's) are decoded where a FORMAT does not keep them: dconv formats.",
    "A model's config can have what a form lacks, such as a rotation that its reader does not compute, or widths that "
    "are no whole groups: dconv plan MODEL FORMAT says so and writes nothing.",
    "A GGUF names an architecture that several families may share, and is read as the one that it then is: the same "
    "function.",
)


@dataclass(frozen=True)
class Directions:
    """The table.

    Attributes:
        day: when it was made.
        columns, lines: see `dconv.directions`.
    """

    day: date
    columns: tuple[Column, ...]
    lines: Sequence[Line]

    @property
    def head(self) -> str:
        """Version, date and size, in a line."""
        size = f"{len(self.lines)} families, {len(self.columns)} directions"
        return f"dconv {__version__}, {self.day.isoformat()}: {size}"

    @property
    def groups(self) -> list[tuple[str, list[Column]]]:
        """Words and columns of each group."""
        found = ((words, [one for one in self.columns if one.group == name]) for name, (words, _) in GROUPS.items())
        return [(words, columns) for words, columns in found if columns]

    @property
    def legend(self) -> list[tuple[Way, str]]:
        """The ways that occur, with what they mean."""
        there = {way for line in self.lines for way in line.ways.values()}
        return [(way, words) for way, words in MEANINGS.items() if way in there]

    @property
    def named(self) -> list[tuple[str, str]]:
        """Of the columns whose words are not their name: as it stands in a sentence, and the words."""
        return [(f"{GROUPS[one.group][1]} {one.name}", one.words) for one in self.columns if one.words != one.name]

    def json(self) -> dict[str, object]:
        """For a program."""
        return {
            "dconv": __version__,
            "date": self.day.isoformat(),
            "columns": [{"name": one.name, "group": one.group, "words": one.words} for one in self.columns],
            "families": [
                {
                    "family": line.name, "models": line.models, "layouts": line.layouts, "note": line.note,
                    "shown": line.shown,
                    "ways": [{"group": one.group, "name": one.name, "way": way} for one, way in line.ways.items()],
                }
                for line in self.lines
            ],
        }  # fmt: skip


def markdown(table: Directions) -> str:
    """A table that GitHub shows, and its legend."""
    heads = [f"{GROUPS[one.group][1]}<br>`{_cell(one.name)}`" for one in table.columns]
    words = ["family", "`--model-type`", *heads, "layouts", "shown by"]
    lines = [f"<!-- {COMMAND} -->", f"# {TITLE}", "", f"{table.head}.", "", _row(words)]
    lines.append(_row(["---", "---", *[":-:"] * len(heads), "---", "---"]))
    for line in table.lines:
        signs = (SIGNS[way] for way in line.ways.values())
        lines.append(_row([_cell(line.models), f"`{line.name}`", *signs, line.layouts, _cell(line.shown)]))
    lines += ["", *(f"- {f'`{SIGNS[way]}`' if SIGNS[way] else 'Empty'}: {words}" for way, words in table.legend)]
    lines += ["", *(f"- `{_cell(name)}`: {_cell(words)}" for name, words in table.named)]
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text that stays in its cell, whatever another package calls its models."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "'")


def page(table: Directions) -> str:
    """One file for a browser, which asks for no other."""
    after = [False] * (len(table.lines) - 1)
    parts = {
        "title": said(TITLE),
        "head": said(table.head),
        "legend": "".join(
            f'<li><span class="key {way}">{SIGNS[way] or "&nbsp;"}</span>{said(words)}</li>'
            for way, words in table.legend
        ),
        "groups": "".join(
            f'<th scope="colgroup" class="group" colspan="{len(columns)}">{said(words)}</th>'
            for words, columns in table.groups
        ),
        "heads": "".join(
            f'<th scope="col"{_first(one, table)}><span class="name">{said(one.name)}</span></th>'
            for one in table.columns
        ),
        "rows": "".join(_line(line, table, first) for first, line in zip([True, *after], table.lines, strict=True)),
        "named": "".join(f'<dt class="name">{said(name)}</dt><dd>{said(words)}</dd>' for name, words in table.named),
        "notes": "".join(f"<p>{said(note)}</p>" for note in NOTES),
    }
    return framed("archs.html", parts, title=f"{TITLE}, dconv {__version__}", command=COMMAND, report=table.json())


def _line(line: Line, table: Directions, first: bool) -> str:
    cells: list[str] = []
    for number, (column, way) in enumerate(line.ways.items()):
        words = said(f"{line.models} ({line.name}), {GROUPS[column.group][0]} {column.words}\n{MEANINGS[way]}")
        stop = 0 if first and not number else -1
        begins = " begins" if _first(column, table) else ""
        cells.append(f'<td class="{way}{begins}" tabindex="{stop}" data-c="{words}" title="{words}">{SIGNS[way]}</td>')
    about = f'<br><span class="faint">{said(line.note)}</span>' if line.note else ""
    return (
        f'<tr><th scope="row"><b>{said(line.models)}</b><br><code>{said(line.name)}</code></th>{"".join(cells)}'
        f'<td class="said">{said(line.layouts)}</td><td class="said">{said(line.shown)}{about}</td></tr>'
    )


def _first(column: Column, table: Directions) -> str:
    """The class of a column that its group begins with."""
    return ' class="begins"' if any(columns[0] == column for _, columns in table.groups) else ""
