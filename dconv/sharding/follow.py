"""What all processes of a plan have noted, read on from where the last look ended."""

from __future__ import annotations

import os
from pathlib import Path

from dconv.errors import StorageFault
from dconv.sharding.journal import FINISHED, GONE, good_words, is_journal, opened_at


class Follower:
    """Reads journals (`dconv.sharding.journal`) as they grow.

    Args:
        name: of this process's own journal.
        since: seconds since the epoch; what journals opened before say to be at, they are at no more.

    Attributes:
        done: tasks that some process has noted, and none has taken back.
        claims: tasks that other processes have said to be at.
        mine: tasks that this process said to be at.
        gone: whether the folder is: another process has committed.
    """

    def __init__(self, folder: Path, name: str, since: float) -> None:
        self._folder, self._name, self._since = folder, name, since
        self._read: dict[str, int] = {}
        self._noted: dict[int, set[str]] = {}
        self._retracted: set[tuple[int, str]] = set()
        self.done: set[int] = set()
        self.claims: set[int] = set()
        self.mine: set[int] = set()
        self.gone = False

    def look(self) -> None:
        """Read what was added.

        Raises:
            StorageFault: the journals cannot be read.
        """
        try:
            for path in sorted(path for path in self._folder.iterdir() if is_journal(path.name)):
                self._look_at(path)
        except OSError as fault:
            if fault.errno not in GONE:
                raise StorageFault(f"cannot read the journal: {fault.strerror}", where=str(self._folder)) from fault
            self.gone = True

    def _look_at(self, path: Path) -> None:
        at = self._read.get(path.name, 0)
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= at:
                return
            file.seek(at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read[path.name] = at + len(whole)
        changed: set[int] = set()
        for words in good_words(whole):
            task = int(words[2] if words[0] == "retract" else words[1])
            if words[0] in FINISHED:
                self._noted.setdefault(task, set()).add(path.name)
            elif words[0] == "retract":
                self._retracted.add((task, words[1]))
            elif words[0] == "claim":
                if path.name == self._name:
                    self.mine.add(task)
                elif opened_at(path.name) >= self._since:
                    self.claims.add(task)
            changed.add(task)
        for task in changed:
            live = any((task, name) not in self._retracted for name in self._noted.get(task, ()))
            (self.done.add if live else self.done.discard)(task)
