"""One look for what all commands print.

A pipe or a file gets the plain text, line for line, whatever its width. A terminal gets the same words in its width:
tables folded into it, long values wrapped under their first word, labels faint, an error's name in colour.
``NO_COLOR``, ``FORCE_COLOR``, ``TERM=dumb`` and ``COLUMNS`` are heard, as rich hears them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Final, TextIO

from dconv.errors import DconvError
from dconv.launch.process import mute, say
from dconv.report.table import Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: What an error of this exit code is coloured as: one that a person can mend by other words is none of damage.
_COLOURS: Final = {2: "yellow", 3: "yellow", 7: "yellow", 75: "cyan"}
#: ``label   value``, as reports, plans and errors have it; a wrapped value goes on below its beginning.
_LABELLED: Final = re.compile(r"(?P<label> *\S+(?: \S+)?) {2,}(?=\S)")
#: Columns of a terminal that are no longer left to a value, before it is wrapped below its label instead.
_LEAST: Final = 24


def show_json(said: object) -> None:
    """Print one line of JSON on standard output, the same at a terminal: it is for a program."""
    say(json.dumps(said))


def show(*parts: str | Table, stream: TextIO | None = None) -> None:
    """Print texts and tables below each other, on standard output by default."""
    at = stream or sys.stdout
    if not is_terminal(at):
        say("\n".join(map(str, parts)), at)
        return
    console = console_of(at)
    try:
        for part in parts:
            if isinstance(part, Table):
                for number, piece in enumerate(part.parts(console.width)):
                    if number:
                        console.print()
                    console.print(_drawn(piece))
            else:
                for line in part.split("\n"):
                    console.print(_dressed(line, console), soft_wrap=True)
    except BrokenPipeError:
        mute(at)


def tell(error: DconvError, prefix: str = "") -> None:
    """Print an error on standard error, in its form.

    Args:
        error: what is told.
        prefix: of its first line, such as a rank's number.
    """
    if not is_terminal(sys.stderr):
        say(f"{prefix}{error}", sys.stderr)
        return
    from rich.text import Text

    console = console_of(sys.stderr)
    head, *rest = str(error).split("\n")
    name = f"{error.label} ({error.exit_code})"
    colour = f"bold {_COLOURS.get(error.exit_code, 'red')}"
    first = Text.assemble(prefix, (name, colour), Text(head[len(name) :], "bold"))
    try:
        console.print(_folded(first, len(prefix) + len(name) + 2, console), soft_wrap=True)
        for line in rest:
            console.print(_dressed(line, console), soft_wrap=True)
    except BrokenPipeError:
        mute(sys.stderr)


def is_terminal(stream: TextIO) -> bool:
    """Whether it is one that rich would draw on; nothing is imported to find out that it is none."""
    forced = os.environ.get("FORCE_COLOR", "")
    return bool(forced) or (stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"))


def console_of(stream: TextIO) -> Console:
    """Rich's, that changes no word: no markup, no emoji, no colours by guess."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False)


def _drawn(table: Table) -> object:
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(table.head), header_style="bold")
    for place, width in enumerate(table.widths):
        justify = "right" if place in table.numbers else "center" if place in table.centred else "left"
        drawn.add_column(
            table.head[place] if table.head else "", justify=justify, no_wrap=width <= _LEAST, overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*(Text(cell, "bold" if not place else "") for place, cell in enumerate(row)))
    return drawn


def _dressed(line: str, console: Console) -> Text:
    """A line with its label faint, wrapped below where its value begins."""
    from rich.text import Text

    found = _LABELLED.match(line)
    at = found.end() if found else len(line) - len(line.lstrip())
    text = Text(line)
    if found and (line[0] == " " or found["label"].islower()):
        text.stylize("dim", 0, found.end("label"))
    return _folded(text, at, console)


def _folded(text: Text, at: int, console: Console) -> Text:
    """Wrapped from place ``at`` on, each line begun below it, or below two spaces where little room is left."""
    from rich.text import Text

    if text.cell_len <= console.width:
        return text
    first, indent = (at, at) if console.width - at >= _LEAST else (0, 2)
    lines = text[first:].wrap(console, console.width - indent, overflow="fold")
    for line in lines:
        line.rstrip()
    return Text.assemble(text[:first], Text("\n" + " " * indent).join(lines))
