"""Source bytes on a fast disk of this machine: fetched once, in large pieces, when the first of its ranks needs them.

A cut along a tensor's columns reads a short run in every row. On a disk in the machine that is cheap; a parallel file
system or an object store wants few and large requests. Every rank of the machine uses the same copies, and a later run
of the same plan goes on with those of a killed one, but not past a power cut: no copy is flushed to disk, so that of
those the marks may be there and the bytes not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from dconv.errors import StorageFault

#: Bytes that are fetched at once.
PIECE: Final = 8 << 20
_FOLDER: Final = "dconv-stage-"
#: Says which start of this machine it is (Linux, ``Documentation/admin-guide/sysctl/kernel.rst``).
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_LOCK: Final = "lock"


class Stage:
    """Copies of the files of one plan's source, which grow as they are read. Shared between threads.

    Args:
        folder: on a disk of this machine.
        plan: its id, which names the source's state.
        files: of the source.
        told: called with a line for a person.

    Raises:
        StorageFault: the folder cannot be written to.
    """

    def __init__(self, folder: Path, plan: str, files: Iterable[str], told: Callable[[str], None]) -> None:
        self._folder = folder / f"{_FOLDER}{plan}-{_boot()}"
        self._numbers = {file: number for number, file in enumerate(sorted(files))}
        self._told = told
        self._open: dict[str, tuple[int, int]] = {}
        self._had: dict[str, set[int]] = {}
        self._mutex = threading.Lock()
        self._full = False
        try:
            _remove_unused(folder, self._folder)
            self._lock = _taken(self._folder)
        except OSError as fault:
            raise StorageFault(f"cannot stage: {fault.strerror}", where=str(self._folder)) from fault

    def fd(self, file: str, source: int, size: int, offset: int, nbytes: int) -> int:
        """A descriptor from which a stretch of a file can be read: of its copy, or ``source`` where there is no room.

        Args:
            file: its path relative to the checkpoint's root.
            source: an open descriptor of the file itself.
            size: of the file, in bytes.
            offset: where the stretch begins, in bytes.
            nbytes: how long it is.

        Raises:
            OSError: the file cannot be read, or the copy not be written for want of anything but room.
        """
        if self._full:
            return source
        with self._mutex:
            data, marks = self._files(file)
            had = self._had[file]
        for piece in range(offset // PIECE, (offset + nbytes - 1) // PIECE + 1):
            if piece not in had and not self._fetch(source, size, data, marks, piece):
                return source
            had.add(piece)
        return data

    def _fetch(self, source: int, size: int, data: int, marks: int, piece: int) -> bool:
        """Have a piece on this machine; False where there is no room."""
        if os.pread(marks, 1, piece) == b"\1":
            return True
        fcntl.lockf(marks, fcntl.LOCK_EX, 1, piece)  # another rank may be at it
        try:
            if os.pread(marks, 1, piece) == b"\1":
                return True
            at, end = piece * PIECE, min((piece + 1) * PIECE, size)
            while at < end:
                got = os.pread(source, end - at, at)
                if not got:
                    return False  # shorter than it was: whoever reads it finds out
                view = memoryview(got)
                while view:
                    done = os.pwrite(data, view, at)
                    view, at = view[done:], at + done
            os.pwrite(marks, b"\1", piece)
        except OSError as fault:
            if fault.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._full:
                self._full = True
                self._told(f"no room to stage in {self._folder.parent}: the rest is read where it is")
            return False
        finally:
            fcntl.lockf(marks, fcntl.LOCK_UN, 1, piece)
        return True

    def _files(self, file: str) -> tuple[int, int]:
        if file not in self._open:
            found = [
                os.open(self._folder / f"{self._numbers[file]}.{end}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                for end in ("data", "have")
            ]
            self._open[file] = found[0], found[1]
            self._had[file] = set()
        return self._open[file]

    def close(self) -> None:
        """Done with it; the last rank of the machine removes the copies."""
        for pair in self._open.values():
            for fd in pair:
                os.close(fd)
        self._open.clear()
        if self._lock >= 0:
            _remove_if_unused(self._folder, self._lock)
            os.close(self._lock)
            self._lock = -1


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:  # it cannot be told: the ranks of one process alone share the copies
        return str(os.getpid())


def _taken(folder: Path) -> int:
    """Hold a folder, together with the other ranks of this machine."""
    while True:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(folder / _LOCK)):
                    return fd
            os.close(fd)


def _remove_unused(folder: Path, ours: Path) -> None:
    """Remove what killed runs of other plans left."""
    for other in folder.glob(f"{_FOLDER}*"):
        if other != ours:
            with contextlib.suppress(OSError):
                fd = os.open(other / _LOCK, os.O_RDWR | os.O_CLOEXEC)
                _remove_if_unused(other, fd)
                os.close(fd)


def _remove_if_unused(folder: Path, lock: int) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
