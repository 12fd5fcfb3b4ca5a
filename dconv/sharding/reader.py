"""Read boxes out of files: only the byte ranges that are needed, never a mapped page.

A box with arbitrary byte strides is cut into spans that are read with ``preadv``: straight into place where both
sides are contiguous, else through a scratch buffer. Holes of sparse files are found, not read.
"""

from __future__ import annotations

import errno
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from dconv.errors import Damaged, StorageFault
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.plan import Copy
from dconv.sharding.staging import Stage
from dconv.sharding.tensor import FileStamp

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A contiguous run at least this long is read by itself. Shorter runs are read together with the gaps between them:
#: a system call costs about as much as copying this many bytes.
MIN_RUN: Final = 512

#: Open source files kept per reader; a sharded source may have thousands.
_OPEN_FILES: Final = 128

#: (file, byte offset, byte count) of every read; for tests and for the count of bytes read.
ReadLog = Callable[[str, int, int], None]


class BoxReader(Protocol):
    """What fills boxes: `Reader` from files, or a running job's own memory (`dconv.checkpoint.memory`)."""

    def has(self, file: str) -> bool:
        """Whether this process can read the file; in a job whose ranks hold the source, not every one can."""
        ...

    def is_sparse(self, file: str) -> bool:
        """Whether the file has stretches that were never written, so that asking for holes pays."""
        ...

    def is_hole(self, copy: Copy) -> bool:
        """Whether all bytes of the copy lie in such stretches, and are zeros without being read."""
        ...

    def read_box(self, copy: Copy, out: NDArray[np.generic]) -> None:
        """Fill ``out``, which has the copy's shape, with its elements as they are stored.

        Args:
            copy: the box, and where its elements lie.
            out: in ``carrier`` of the copy's dtype.

        Raises:
            DconvError: the file cannot be read, or is not what it was when the plan was made.
        """
        ...

    def close(self) -> None:
        """Give back what it holds open; it reads nothing after that."""
        ...


class Reader:
    """Reads from the files of one described source. Not shared between threads.

    Args:
        root: directory of the source.
        stamps: what each file was when the plan was made; another size, time or inode at opening is an error.
        scratch_bytes: size of the scratch buffer.
        stage: has copies of the files on this machine.
    """

    def __init__(
        self, root: Path, stamps: dict[str, FileStamp], scratch_bytes: int, log: ReadLog | None = None,
        stage: Stage | None = None,
    ) -> None:  # fmt: skip
        self._root = root
        self._stage = stage
        self._stamps = stamps
        self._scratch = np.empty(scratch_bytes, np.uint8)
        self._open: OrderedDict[str, int] = OrderedDict()
        self._log = log

    def close(self) -> None:
        """Close the files that are open."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def has(self, file: str) -> bool:
        """Whether this process can read ``file``: every file of the source."""
        return file in self._stamps

    def is_sparse(self, file: str) -> bool:
        """True when a file takes less room than its size: it may have holes."""
        stamp = self._stamps[file]
        return stamp.allocated < stamp.size

    def is_hole(self, copy: Copy) -> bool:
        """True when the file has no data between the copy's first and last byte."""
        if not self.is_sparse(copy.file):
            return False
        start, stop = span_of(copy)
        try:
            return os.lseek(self._fd(copy.file), start, os.SEEK_DATA) >= stop
        except OSError as fault:
            if fault.errno == errno.ENXIO:  # no data up to the end of the file
                return True
            raise self._fault(copy.file, fault) from fault

    def read_box(self, copy: Copy, out: NDArray[np.generic]) -> None:
        """Fill ``out`` (shape of the copy's region, any strides, itemsize of the source dtype) with the box."""
        itemsize = ITEMSIZE[copy.dtype]
        axes = [(n, s, o) for n, s, o in zip(copy.region.shape, copy.strides, out.strides, strict=True) if n > 1]
        axes.sort(key=lambda axis: -axis[1])
        axes = _merge(axes)
        raw = np.lib.stride_tricks.as_strided(
            out, [n for n, _, _ in axes] or [1], [o for _, _, o in axes] or [itemsize]
        )
        self._read_axes(copy.file, copy.offset, [(n, s) for n, s, _ in axes], raw, itemsize)

    def _read_axes(
        self, file: str, offset: int, axes: list[tuple[int, int]], out: NDArray[np.generic], itemsize: int
    ) -> None:
        if self._in_place(axes, out, itemsize):
            self._pread(file, offset, out.reshape(-1).data.cast("B"))
            return
        span = sum((n - 1) * s for n, s in axes) + itemsize
        needed = math.prod(n for n, _ in axes) * itemsize
        run = axes[-1][0] * itemsize if axes[-1][1] == itemsize else itemsize
        gapless = span == needed
        if span <= self._scratch.nbytes and (gapless or run < MIN_RUN or len(axes) == 1):
            scratch = self._scratch[:span]
            self._pread(file, offset, scratch.data)
            source = np.ndarray([n for n, _ in axes], out.dtype, scratch, strides=[s for _, s in axes])
            np.copyto(out, source)
            return
        n, stride = axes[0]
        rest = axes[1:]
        inner = sum((m - 1) * s for m, s in rest) + itemsize
        together = (self._scratch.nbytes - inner) // stride + 1 if run < MIN_RUN or gapless or not rest else 1
        if together > 1:
            for at in range(0, n, together):
                m = min(together, n - at)
                self._read_axes(file, offset + at * stride, [(m, stride), *rest], out[at : at + m], itemsize)
        elif len(rest) == 1 and self._in_place(rest, out[0], itemsize):
            nbytes = rest[0][0] * itemsize
            for i in range(n):  # the hot loop of a column cut: one run a row
                self._pread(file, offset + i * stride, out[i].data.cast("B"), nbytes)
        else:
            for i in range(n):
                self._read_axes(file, offset + i * stride, rest, out[i, ...], itemsize)

    @staticmethod
    def _in_place(axes: list[tuple[int, int]], out: NDArray[np.generic], itemsize: int) -> bool:
        return len(axes) <= 1 and (not axes or axes[0][1] == itemsize or axes[0][0] == 1) and out.flags.c_contiguous

    def _pread(self, file: str, offset: int, into: memoryview, nbytes: int = -1) -> None:
        fd = self._fd(file)
        want = len(into) if nbytes < 0 else nbytes
        if self._log is not None:
            self._log(file, offset, want)
        try:
            if self._stage is not None and want:
                fd = self._stage.fd(file, fd, self._stamps[file].size, offset, want)
            got = os.preadv(fd, [into], offset)
            while got < want:
                more = os.preadv(fd, [into[got:]], offset + got)
                if more == 0:
                    raise Damaged(
                        "a file ended before its data",
                        where=f"{file}, byte {offset + got}",
                        expected=f"{want} bytes at {offset}",
                        do="the file is truncated: fetch it again",
                    )
                got += more
        except OSError as fault:
            raise self._fault(file, fault) from fault

    def _fd(self, file: str) -> int:
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            return fd
        try:
            fd = os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC)
            now = os.fstat(fd)
        except OSError as fault:
            raise self._fault(file, fault) from fault
        stamp = self._stamps[file]
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (stamp.size, stamp.mtime_ns, stamp.inode):
            os.close(fd)
            raise Damaged(
                "a source file changed while it was being converted",
                where=str(self._root / file),
                expected=f"{stamp.size} bytes, unchanged since the plan",
                found=f"{now.st_size} bytes",
                do="run again when nothing writes to the source",
            )
        self._open[file] = fd
        if len(self._open) > _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _fault(self, file: str, fault: OSError) -> StorageFault:
        return StorageFault(f"cannot read: {fault.strerror}", where=str(self._root / file))


def span_of(copy: Copy) -> tuple[int, int]:
    """First byte and one past the last byte of a copy in its source file."""
    reach = sum((n - 1) * s for n, s in zip(copy.region.shape, copy.strides, strict=True))
    return copy.offset, copy.offset + reach + ITEMSIZE[copy.dtype]


def _merge(axes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Join neighbouring axes that step as one on both sides."""
    merged: list[tuple[int, int, int]] = []
    for n, s, o in axes:
        if merged and merged[-1][1] == n * s and merged[-1][2] == n * o:
            merged[-1] = (merged[-1][0] * n, s, o)
        else:
            merged.append((n, s, o))
    return merged
