"""What is finished, so that any number of ranks can go on after a kill.

Each process appends to a file of its own under ``OUT.partial-<plan id>/.dconv/journal/``. A line is written only
after the data it speaks of is flushed to disk. A line carries its own checksum, so a torn one counts as absent.

Lines: ``done <task> <digest>``, and ``retract <journal> <task>``, by which a later process takes back an earlier
process's line before it checks the bytes again.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import xxhash

from dconv.errors import StorageFault
from dconv.sharding.execute import Done, Outputs


class Journal:
    """The journals of all processes of one plan; this process's own is made on the first append."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._fd = -1

    def read(self) -> dict[int, str]:
        """Finished tasks and their digests, as of now."""
        done: dict[tuple[str, int], str] = {}
        retracted: set[tuple[str, int]] = set()
        for path in sorted(self._folder.iterdir()):
            for words in _lines(path):
                if words[0] == "done":
                    done[path.name, int(words[1])] = words[2]
                elif words[0] == "retract":
                    retracted.add((words[1], int(words[2])))
        return {task: digest for (name, task), digest in done.items() if (name, task) not in retracted}

    def take_back(self, wanted: set[int]) -> dict[int, str]:
        """Retract what earlier processes noted for ``wanted`` tasks; returns it, to be checked against the bytes."""
        found: dict[int, str] = {}
        lines: list[str] = []
        for path in sorted(self._folder.iterdir()):
            for words in _lines(path):
                if words[0] == "done" and int(words[1]) in wanted:
                    found[int(words[1])] = words[2]
                    lines.append(f"retract {path.name} {words[1]}")
        if lines:
            self._append(lines)
        live = self.read()
        return {task: digest for task, digest in found.items() if task not in live}

    def append(self, done: list[Done]) -> None:
        self._append([f"done {item.task.index} {item.digest}" for item in done])

    def _append(self, lines: list[str]) -> None:
        try:
            if self._fd < 0:
                path = self._folder / self.name
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                sync_folder(self._folder)
            data = "".join(f"{line} {_check(line)}\n" for line in lines).encode()
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as fault:
            raise StorageFault(f"cannot write the journal: {fault.strerror}", where=str(self._folder)) from fault

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Flusher:
    """Flushes finished tasks to disk and then journals them, beside the work: what piled up makes one batch.

    Use as a context manager; leaving it without an error flushes the rest.
    """

    def __init__(self, outputs: Outputs, journal: Journal) -> None:
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


def _lines(path: Path) -> list[list[str]]:
    good = []
    for line in path.read_text("utf-8", "replace").splitlines():
        body, _, check = line.rpartition(" ")
        if body and check == _check(body):
            good.append(body.split(" "))
    return good
