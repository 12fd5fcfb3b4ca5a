"""Regular expressions of a config, which may be hostile: only those are tried whose search is short.

Python's matcher tries what a repeat may take one way after the other, so that n repeats take up to the n-th power of a
name's length, and a repeated group may take 2 to the power of it.
"""

from __future__ import annotations

import re
from typing import Final

from dconv.errors import Damaged

#: Longer names, and longer expressions for them, are no module's.
LONGEST: Final = 300
#: Repeats in one expression from which on matching could take very long.
REPEATS: Final = 3
_ESCAPED: Final = re.compile(r"\\.", re.DOTALL)
#: ``?`` behind a parenthesis that opens is the kind of a group.
_REPEAT: Final = re.compile(r"[*+{]|(?<!\()\?")
_GROUP_REPEATED: Final = re.compile(r"\)[*+{]")


def is_tame(text: str, *, repeats: int = REPEATS, longest: int = LONGEST) -> bool:
    """Whether an expression of at most so many characters has at most so many repeats, and none of a group."""
    if len(text) > longest:
        return False
    bare = _ESCAPED.sub("_", text)
    return len(_REPEAT.findall(bare)) <= repeats and not _GROUP_REPEATED.search(bare)


def compiled(text: str) -> re.Pattern[str]:
    """An expression, compiled; whether it is a tame one is asked before (`is_tame`).

    Raises:
        ValueError: it is no regular expression.
    """
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{error!s:.80}") from error


def check_length(module: str, where: str) -> None:
    """See that a module's name is short enough for expressions to be tried on it.

    Raises:
        Damaged: a module's name is longer than any is.
    """
    if len(module) > LONGEST:
        raise Damaged("a module's name is too long", where=f"{where:.100}", found=f"{len(module)} characters")
