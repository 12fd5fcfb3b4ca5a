"""What each module gets, as a table for a terminal of 80 columns: no name is left out, none stands there twice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from dconv.quant.mixed import Choice
from dconv.quant.names import folded

_WIDTH: Final = 80


def lines_of(choices: Mapping[str, Choice]) -> list[str]:
    """A heading for each choice, the most weights first, and below it whose it is, in ranges."""
    by_choice: dict[str, list[str]] = {}
    for name, choice in choices.items():
        by_choice.setdefault(choice.words, []).append(name)
    lines: list[str] = []
    for words, names in sorted(by_choice.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"{words:<48}{len(names):>8,} {'weight' if len(names) == 1 else 'weights'}")
        lines += [line for text in folded(names) for line in _wrapped(text)]
    return lines


def _wrapped(text: str) -> Iterator[str]:
    """Lines that fit the width, broken after a dot or a comma."""
    line = "  "
    for part in re.findall(r"[^.,]*[.,]?", text):
        if len(line) + len(part) > _WIDTH and line.strip():
            yield line
            line = "      "
        line += part
    if line.strip():
        yield line
