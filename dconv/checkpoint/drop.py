"""``--drop``: a pattern that leaves nothing out is a mistake, found before anything is written."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from dconv.checkpoint.source import Source
from dconv.errors import UsageError, group_names
from dconv.sharding.tensor import Logical

#: Near misses that an error names.
_CLOSE: Final = 3
#: TransformerEngine's states are no tensors, and left out without a word.
_STATE: Final = "_extra_state"


def check_used(patterns: str | Sequence[str], *sides: tuple[Source, Logical]) -> None:
    """Hold patterns against the checkpoints that they were given for; each has to leave something out of one.

    Raises:
        UsageError: one matches nothing, or only what the model cannot be without.
    """
    left_out = {name for _, logical in sides for name in logical.left_out}
    needed = {name for source, logical in sides for name in (*logical.specs, *source.shapes)} - left_out
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        # the state of an optimizer is left out under its first word
        if _STATE in pattern or any(fnmatchcase(name, pattern) or pattern.startswith(f"{name}.") for name in left_out):
            continue
        kept = [name for name in sorted(needed) if fnmatchcase(name, pattern)]
        close = difflib.get_close_matches(pattern, sorted(left_out), _CLOSE)
        raise UsageError(
            "--drop names tensors that the model needs, nothing was written"
            if kept
            else "--drop matches no tensor of the source, nothing was written",
            where=f"--drop {pattern!r:.200}",
            expected="tensors that are in no row of the architecture",
            found=group_names(kept),
            do=f"did you mean {' or '.join(close)}?" if close and not kept else "take the pattern out or correct it",
        )
