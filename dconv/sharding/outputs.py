"""The files that a plan writes, held open by one process and written at any offset."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from dconv.errors import StorageFault
from dconv.sharding.plan import Plan

#: Source files, journals, libraries.
_OTHER_FILES: Final = 512
#: What is read at once to see whether it is zero.
_READ_BYTES: Final = 1 << 20


class Outputs:
    """The files being written, sized on first use. Shared between threads.

    Held by the open directory ``folder``, not by its path: when another process of the plan commits (renames it),
    this one goes on writing the same bytes to the same files and leaves nothing at the old path.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        self._root = root
        self.folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files = plan.target.files
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        _allow_files(len(self._files))

    def fd(self, file: int) -> int:
        """The descriptor of a file by its number in the plan, made and sized where it is not there yet.

        Raises:
            StorageFault: it cannot be made.
        """
        with self._lock:
            fd = self._open.get(file)
            if fd is None:
                fd = self._open[file] = self._create(file)
            return fd

    def _create(self, file: int) -> int:
        path = self._files[file].path
        try:
            for parent in reversed(Path(path).parents[:-1]):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parent, dir_fd=self.folder)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=self.folder)
            if os.fstat(fd).st_size != self._files[file].size:
                os.ftruncate(fd, self._files[file].size)
        except OSError as fault:
            raise self._fault("create", file, fault) from fault
        return fd

    def _fault(self, what: str, file: int, fault: OSError) -> StorageFault:
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
        return StorageFault(
            f"cannot {what}: {fault.strerror}",
            where=str(self._root / self._files[file].path),
            do="free the space and run again with --resume: what is finished is kept and continued" if full else "",
        )

    def write(self, file: int, data: memoryview, offset: int) -> None:
        """Write all of ``data`` at a byte offset of a file; several threads may, at places of their own.

        Raises:
            StorageFault: it cannot be written, as on a full disk.
        """
        fd = self.fd(file)
        try:
            done = os.pwrite(fd, data, offset)
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
        except OSError as fault:
            raise self._fault("write", file, fault) from fault

    def blank(self, file: int, offset: int, nbytes: int) -> None:
        """Leave a stretch a hole; bytes that something put there (a spoilt partial output) are zeroed."""
        fd = self.fd(file)
        end = offset + nbytes
        try:
            while (offset := _next_data(fd, offset, end)) < end:
                data = os.pread(fd, min(_READ_BYTES, end - offset), offset)
                if data.count(0) < len(data):
                    self.write(file, memoryview(bytes(len(data))), offset)
                offset += len(data)
        except OSError as fault:
            raise self._fault("read back", file, fault) from fault

    def sync(self, files: Sequence[int]) -> None:
        """Flush what was written to these files to disk.

        Raises:
            StorageFault: a write that was taken before turns out to have failed.
        """
        for file in files:
            try:
                os.fsync(self.fd(file))
            except OSError as fault:
                raise self._fault("flush to disk", file, fault) from fault

    def sync_names(self, files: Iterable[int]) -> None:
        """Flush to disk that these files are there, by the names that they have."""
        folders = {folder for file in files for folder in Path(self._files[file].path).parents}
        try:
            for folder in sorted(folders, reverse=True):
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.folder)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        except OSError as fault:
            raise StorageFault(f"cannot flush to disk: {fault.strerror}", where=str(self._root)) from fault

    def close_files(self) -> None:
        """They are opened anew when they are next needed; to be called when nothing is under way."""
        for fd in self._open.values():
            with contextlib.suppress(OSError):  # a network file system tells here of writes that failed; they were told
                os.close(fd)
        self._open.clear()

    def close(self) -> None:
        """Close the files and the folder; the second time does nothing."""
        self.close_files()
        if self.folder >= 0:
            os.close(self.folder)
            self.folder = -1


def _allow_files(count: int) -> None:
    """Let this process hold as many files open as it may write, as far as it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES if hard == resource.RLIM_INFINITY else min(hard, count + _OTHER_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _next_data(fd: int, offset: int, end: int) -> int:
    """Where data begin at or after ``offset``, ``end`` when there are none before it."""
    try:
        return min(end, os.lseek(fd, offset, os.SEEK_DATA))
    except OSError as fault:
        if fault.errno == errno.ENXIO:  # no data up to the end of the file
            return end
        raise
