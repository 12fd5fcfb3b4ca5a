"""Which ranks have nothing under way any more: one empty file each, so that one listing tells about all.

What thousands of ranks note is in as many journals; to read them all, all ranks would open a million files.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

from dconv.errors import StorageFault
from dconv.sharding.journal import GONE, opened_at

_FOLDER: Final = "ends"
#: The journal of who made it, how many ranks there were, and which one it is.
_NAME: Final = re.compile(r"([0-9]{1,20}-.+)-([0-9]{1,9})-([0-9]{1,9})")


class Ends:
    """The ranks of one run of a plan that are done with their share, and with what they took of others.

    Args:
        state: the folder of working state.
        journal: this rank's, whose name tells when it was opened.
        since: when the ranks of this run were started (seconds since the epoch); older files are of another one.
    """

    def __init__(self, state: Path, journal: str, rank: int, world: int, since: float) -> None:
        self._folder, self._world, self._since = state / _FOLDER, world, since
        self._mine = self._folder / f"{journal}-{world}-{rank}"

    def mark(self) -> None:
        """Say that this rank has nothing under way.

        Raises:
            StorageFault: the file cannot be made.
        """
        try:
            self._folder.mkdir(exist_ok=True)
            os.close(os.open(self._mine, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as fault:
            if fault.errno not in GONE:  # committed meanwhile, by one that took what this rank was at
                raise StorageFault(f"cannot write: {fault.strerror}", where=str(self._folder)) from fault

    def unmark(self) -> None:
        """Say that this rank has something under way again."""
        with contextlib.suppress(OSError):  # a mark that stays costs the others a look
            self._mine.unlink()

    def missing(self) -> set[int] | None:
        """The ranks that are not; None where another process has committed.

        Raises:
            StorageFault: the folder cannot be read.
        """
        try:
            names = os.listdir(self._folder)
        except OSError as fault:
            if fault.errno in GONE:
                return None
            raise StorageFault(f"cannot read: {fault.strerror}", where=str(self._folder)) from fault
        found = set(range(self._world))
        for match in filter(None, map(_NAME.fullmatch, names)):
            journal, world, rank = match.groups()
            if world == str(self._world) and opened_at(journal) >= self._since:
                found.discard(int(rank))
        return found
