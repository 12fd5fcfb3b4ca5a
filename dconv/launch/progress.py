"""Progress of all ranks, without communication: each notes its own in a small file, which whoever draws them reads."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Final

from dconv.sharding.parsed import is_mapping

#: Names one more file for a rank's notes: a launcher that asks for it draws them itself.
NOTES: Final = "DCONV_NOTES"
#: Seconds between notes.
_TICK: Final = 0.2


def peak_memory() -> int:
    """Peak resident bytes of this process; ``VmHWM``, since ``ru_maxrss`` is inherited from a launcher."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Board:
    """The notes of all ranks of one run, in ``<partial>/.dconv/ranks/``.

    Args:
        since: seconds since the epoch; older notes are of an earlier run that was killed.
    """

    def __init__(self, partial: Path, rank: int, since: float) -> None:
        self.folder = partial / ".dconv" / "ranks"
        self._since = since
        self._mine = self.folder / f"{rank}.json"
        self._asked_for = os.environ.get(NOTES)
        self._last = 0.0

    def note(self, done: int, total: int) -> None:
        """Note this rank's bytes; at most every tick, and at the end. Who helps others does more than its all."""
        now = time.monotonic()
        if done != total and now - self._last < _TICK:
            return
        self._last = now
        text = json.dumps({"done": done, "total": total, "peak": peak_memory()})
        with contextlib.suppress(OSError):  # a lost note costs a redraw, nothing else
            try:
                self._mine.write_text(text)
            except FileNotFoundError:
                self.folder.mkdir()
                self._mine.write_text(text)
        if self._asked_for:
            with contextlib.suppress(OSError):
                Path(self._asked_for).write_text(text)

    def read(self) -> dict[int, dict[str, int]]:
        """Every rank's latest note."""
        notes: dict[int, dict[str, int]] = {}
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    if path.stat().st_mtime >= self._since and _is_note(note := json.loads(path.read_text())):
                        notes[int(path.stem)] = note
        return notes

    def is_in_use(self) -> bool:
        """Whether ranks may still note something: the folder goes at the commit."""
        return self.folder.exists()


def _is_note(said: object) -> bool:
    numbers = [said.get(key) for key in ("done", "total", "peak")] if is_mapping(said) else [None]
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
