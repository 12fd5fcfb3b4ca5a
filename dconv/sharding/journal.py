"""What is finished, so that any number of ranks can go on after a kill.

Each process appends to a file of its own under ``OUT.partial-<plan id>/.dconv/journal/``. A line is written only
after the data it speaks of is flushed to disk. A line carries its own checksum, so a torn one counts as absent.

Lines: ``done <task> <digest>``; ``kept <task> <digest>``, which says the same of a task that an earlier run did and
whose bytes this process has looked at; ``retract <journal> <task>``, by which a later process takes back an earlier
process's line whose bytes it found changed; and ``claim <task>``, by which a process says that it is at a task of
another's share (`dconv.sharding.stealing`). A journal's name begins with the time at which it was opened.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import xxhash

from dconv.errors import StorageFault
from dconv.sharding.execute import Done
from dconv.sharding.outputs import Outputs
from dconv.sharding.plan import Task

#: A file system's words for a folder that another machine has removed: another process committed.
GONE: Final = (errno.ENOENT, errno.ESTALE)
#: A line without its checksum, and a journal's name.
_LINE: Final = re.compile(r"(?:done|kept) [0-9]{1,18} \S+|retract \S+ [0-9]{1,18}|claim [0-9]{1,18}")
#: What lines begin with that say that a task is finished.
FINISHED: Final = ("done", "kept")
_NAME: Final = re.compile(r"[0-9]{1,20}-.+")


@dataclass(frozen=True, slots=True)
class Noted:
    """A live line: who wrote it, and when that process opened its journal (seconds since the epoch).

    Attributes:
        kept: an earlier run did the task, as a live line of whoever has looked at it says.
    """

    journal: str
    opened: float
    digest: str
    kept: bool


class Journal:
    """The journals of all processes of one plan.

    This process's own is made at once, so that it can be written to also when another process commits and removes the
    folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = f"{time.time_ns():020}-{os.getpid()}-{os.urandom(6).hex()}"
        self._fd = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._durable = False
        self._torn = False  # an append has failed, perhaps in the middle of a line: the next begins a new one
        #: Tasks whose lines were written and may not be on disk: they count as not noted by this process.
        self.doubtful: set[int] = set()

    def read(self, before: float = math.inf) -> dict[int, Noted]:
        """Finished tasks as of now, each by this process's line or else the newest; none when the folder is gone.

        Args:
            before: seconds since the epoch; journals of others that were opened later are not read.
        """
        done: dict[int, list[Noted]] = {}
        retracted: set[tuple[str, int]] = set()
        for name, words in self._all(before):
            if words[0] in FINISHED:
                line = Noted(name, opened_at(name), words[2], words[0] == "kept")
                done.setdefault(int(words[1]), []).append(line)
            elif words[0] == "retract":
                retracted.add((words[1], int(words[2])))
        live = {task: [line for line in lines if (line.journal, task) not in retracted] for task, lines in done.items()}
        return {
            task: replace(
                next((line for line in lines if line.journal == self.name), lines[-1]),
                kept=any(line.kept for line in lines),
            )
            for task, lines in live.items()
            if lines
        }

    def retract(self, tasks: Iterable[Task]) -> None:
        """Take back every line about ``tasks``, whoever wrote it, except this process's own."""
        wanted = {task.index for task in tasks}
        if wanted:
            found = {
                (name, words[1]) for name, words in self._all() if words[0] in FINISHED and int(words[1]) in wanted
            }
            self._append([f"retract {name} {task}" for name, task in sorted(found) if name != self.name])

    def claim(self, tasks: Iterable[Task]) -> None:
        """Say that this process is at tasks of others."""
        self._append([f"claim {task.index}" for task in tasks])

    def append(self, done: Iterable[Done]) -> None:
        """Note tasks as done, each with its digest; they are in doubt until the lines are on disk."""
        items = list(done)
        tasks = {item.task.index for item in items}
        self.doubtful |= tasks
        self._append([f"done {item.task.index} {item.digest}" for item in items])
        self.doubtful -= tasks

    def keep(self, tasks: Iterable[Task], noted: Mapping[int, Noted]) -> None:
        """Note anew what earlier runs have noted, after a look at its bytes."""
        self._append([f"kept {task.index} {noted[task.index].digest}" for task in tasks])

    def _all(self, before: float = math.inf) -> Iterator[tuple[str, list[str]]]:
        """Every good line with its journal's name, oldest journal first; see `read`."""
        try:
            for path in sorted(path for path in self._folder.iterdir() if is_journal(path.name)):
                if path.name != self.name and opened_at(path.name) >= before:
                    continue
                for words in good_words(path.read_bytes()):
                    yield path.name, words
        except OSError as fault:
            if fault.errno in GONE:
                return
            raise StorageFault(f"cannot read the journal: {fault.strerror}", where=str(self._folder)) from fault

    def _append(self, lines: list[str]) -> None:
        if not lines:
            return
        try:
            data = "".join(f"{line} {_check(line)}\n" for line in lines).encode()
            data, self._torn = b"\n" * self._torn + data, True
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
            self._torn = False
            if not self._durable:
                with contextlib.suppress(FileNotFoundError):
                    sync_folder(self._folder)
                self._durable = True
        except OSError as fault:
            raise StorageFault(
                f"cannot write the journal: {fault.strerror}",
                where=str(self._folder),
                do="free the space and run again with --resume: what is finished is kept"
                if fault.errno in (errno.ENOSPC, errno.EDQUOT)
                else "",
            ) from fault

    def close(self) -> None:
        """Close this process's own journal; the second time does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Flusher:
    """Flushes finished tasks to disk and then journals them, beside the work: what piled up makes one batch.

    Use as a context manager; leaving it without an error flushes the rest.

    Args:
        before: called with tasks that are on disk, before the journal says so.
    """

    def __init__(
        self, outputs: Outputs, journal: Journal, before: Callable[[Sequence[Task]], None] | None = None
    ) -> None:
        self._before = before
        self._outputs = outputs
        self._journal = journal
        self._queue: queue.SimpleQueue[Done | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dconv-flush", daemon=True)

    def __enter__(self) -> Callable[[Done], None]:
        self._thread.start()
        return self._take

    def __exit__(self, kind: object, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None and self._failure is not None:
            raise self._failure

    def _take(self, done: Done) -> None:
        if self._failure is not None:
            raise self._failure
        self._queue.put(done)

    def _run(self) -> None:
        try:
            more = True
            while more:
                batch = [self._queue.get()]
                while not self._queue.empty():
                    batch.append(self._queue.get())
                more = None not in batch
                finished = [item for item in batch if item is not None]
                if finished:
                    self._outputs.sync(sorted({item.task.file for item in finished}))
                    if self._before is not None:
                        self._before([item.task for item in finished])
                    self._journal.append(finished)
        except BaseException as fault:  # handed to the thread that waits for it
            self._failure = fault


def sync_folder(folder: Path) -> None:
    """Flush a directory's entries to disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check(line: str) -> str:
    return f"{xxhash.xxh3_64_intdigest(line.encode()):016x}"


def good_words(data: bytes) -> list[list[str]]:
    """The words of every line that is whole, and says one of the three things that a line says."""
    good: list[list[str]] = []
    for line in data.decode("utf-8", "replace").splitlines():
        body, _, check = line.rpartition(" ")
        if _LINE.fullmatch(body) and check == _check(body):
            good.append(body.split(" "))
    return good


def is_journal(name: str) -> bool:
    """Whether a file's name is a journal's; a network file system gives a removed file that is open one of its own."""
    return _NAME.fullmatch(name) is not None


def opened_at(name: str) -> float:
    """When a journal was opened (seconds since the epoch), by its name."""
    return int(name.partition("-")[0]) / 1e9
