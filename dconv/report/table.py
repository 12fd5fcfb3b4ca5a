"""A table for a person: what a pipe gets of it, and what a terminal needs to draw it in the width that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many cells each.

    Attributes:
        head: titles of the columns; empty for none.
        numbers: columns that are set to the right.
        centred: columns of signs.
    """

    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    numbers: frozenset[int] = frozenset()
    centred: frozenset[int] = frozenset()

    @property
    def lines(self) -> list[Sequence[str]]:
        """All rows, the titles first."""
        return [self.head, *self.rows] if self.head else list(self.rows)

    @property
    def widths(self) -> list[int]:
        """Characters of the longest cell of each column."""
        return [max(map(len, column)) for column in zip(*self.lines, strict=True)]

    def __str__(self) -> str:
        widths = self.widths if self.rows else []
        cells = ([self._set(*one) for one in zip(range(len(line)), line, widths, strict=False)] for line in self.lines)
        return "\n".join(_GAP.join(line).rstrip() for line in cells)

    def _set(self, place: int, cell: str, width: int) -> str:
        if place in self.numbers:
            return cell.rjust(width)
        return cell.center(width) if place in self.centred else cell.ljust(width)

    def parts(self, width: int) -> list[Table]:
        """Where there are signs, tables of the first column and some of the others, as fit into ``width`` characters.

        A table of words stays one: its words fold.
        """
        widths = self.widths
        if not self.centred or sum(widths) + len(_GAP) * (len(widths) - 1) <= width:
            return [self]
        some: list[list[int]] = [[]]
        taken = widths[0]
        for place in range(1, len(widths)):
            if some[-1] and taken + len(_GAP) + widths[place] > width:
                some.append([])
                taken = widths[0]
            some[-1].append(place)
            taken += len(_GAP) + widths[place]
        return [self._only([0, *places]) for places in some]

    def _only(self, places: Sequence[int]) -> Table:
        def of(line: Sequence[str]) -> list[str]:
            return [line[place] for place in places]

        def moved(which: frozenset[int]) -> frozenset[int]:
            return frozenset(at for at, place in enumerate(places) if place in which)

        head = of(self.head) if self.head else ()
        return Table([of(row) for row in self.rows], head, moved(self.numbers), moved(self.centred))
