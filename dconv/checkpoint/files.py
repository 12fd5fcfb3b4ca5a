"""Looking at files of a checkpoint: stamps, and names that must stay inside the directory."""

from __future__ import annotations

import json
import os
import stat as modes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from dconv.errors import Damaged, StorageFault
from dconv.sharding.tensor import FileStamp

#: What is larger is no config (the largest tokenizers are about 35 MB, indexes of 10^5 tensors about 10 MB).
MAX_SMALL: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Made:
    """A file that travels along and is not there yet: ``make`` gives its content, always the same."""

    make: Callable[[], bytes]


def stamp(path: Path) -> FileStamp:
    """Size, time, inode and allocated bytes of a file.

    Raises:
        Damaged: it is not there or not a regular file.
        StorageFault: it cannot be looked at.
    """
    try:
        seen = os.stat(path)
    except FileNotFoundError as fault:
        raise Damaged("a file is missing", where=str(path), do="fetch it again; nothing was written") from fault
    except OSError as fault:
        raise StorageFault(f"cannot look at a file: {fault.strerror}", where=str(path)) from fault
    if not modes.S_ISREG(seen.st_mode):
        raise Damaged("not a regular file", where=str(path))
    return FileStamp(seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_blocks * 512)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def stamps(folder: Path, suffixes: tuple[str, ...]) -> dict[str, FileStamp]:
    """The stamps of a directory's files by name; to be taken before the files are read.

    Args:
        suffixes: how their names end.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(suffixes) and entry.is_file())
    except OSError as fault:
        raise StorageFault(f"cannot list a directory: {fault.strerror}", where=str(folder)) from fault
    return {name: stamp(folder / name) for name in names}


def listed(folder: Path, pattern: str) -> list[Path]:
    """The entries of a directory whose names match, sorted; none where it is no directory.

    `Path.glob` takes a directory that may not be read for an empty one.

    Raises:
        StorageFault: it cannot be read.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder) if fnmatchcase(name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as fault:
        raise StorageFault(f"cannot list a directory: {fault.strerror}", where=str(folder)) from fault


def read_whole(fd: int, nbytes: int, offset: int) -> bytes:
    """Bytes of an open file, however few come at a time; fewer only where it ends.

    Raises:
        OSError: they cannot be read.
    """
    parts = []
    while nbytes and (part := os.pread(fd, nbytes, offset)):
        parts.append(part)
        offset, nbytes = offset + len(part), nbytes - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_plain_name(name: object, *, said_by: Path) -> str:
    """A file name that an index or header gives, which must name a file beside it.

    Raises:
        Damaged: it is a path, absolute, hidden behind ``..``, or no name at all.
    """
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or not _is_text(name)
        or len(name.encode()) > 255
        or any(c in name for c in "/\\:")
        or any(ord(c) < 32 for c in name)
    ):
        raise Damaged(
            "a file name points outside the checkpoint's directory",
            where=str(said_by),
            expected="a plain file name",
            found=repr(name)[:120],
        )
    return name


def read_json(path: Path, *, what: str) -> dict[str, object]:
    """A JSON object; duplicate keys are refused.

    Raises:
        Damaged: not JSON, not an object, or implausibly large.
    """
    return parse_json(read_small(path, what=what), where=str(path), what=what)


def read_small(path: Path, *, what: str) -> bytes:
    """The content of a file that fits into memory.

    Raises:
        Damaged: it is missing, no regular file, or implausibly large.
        StorageFault: it cannot be read.
    """
    if stamp(path).size > MAX_SMALL:
        raise Damaged(f"{what} is implausibly large", where=str(path), expected=f"at most {MAX_SMALL >> 20} MiB")
    try:
        return path.read_bytes()
    except OSError as fault:
        raise StorageFault(f"cannot read {what}: {fault.strerror}", where=str(path)) from fault


def parse_json(data: bytes, *, where: str, what: str) -> dict[str, object]:
    """`read_json` for bytes at hand."""
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
        if b"\\ud" in data.lower():  # half of a surrogate pair is no text: it could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as fault:
        raise Damaged(f"{what} is not valid JSON", where=where, found=str(fault)[:200]) from fault
    if not isinstance(value, dict):
        raise Damaged(f"{what} is not a JSON object", where=where, found=type(value).__name__)
    return value


def _no_duplicates(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key[:80]!r} stands there twice")
        seen[key] = value
    return seen
