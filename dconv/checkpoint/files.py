"""Looking at files of a checkpoint: stamps, and names that must stay inside the directory."""

from __future__ import annotations

import json
import os
import re
import stat as modes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from dconv.errors import Damaged, StorageFault
from dconv.sharding.parsed import is_dict
from dconv.sharding.tensor import FileStamp

#: ``follow`` takes links wherever they lead. No option: it is a person's word about a machine, and a file of options
#: (``--config``, a batch's) that came from elsewhere must not say it.
LINKS: Final = "DCONV_LINKS"

#: What is larger is no config (the largest tokenizers are about 35 MB, indexes of 10^5 tensors about 10 MB).
MAX_SMALL: Final = 256 << 20
#: No module is nested so deep.
_LONGEST_NAME: Final = 4096
# Three bytes of JSON make a list of 56. A header of 100 MB that names tensors has some 8 M of these, a tokenizer 2 M.
_MAX_VALUES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Made:
    """A file that travels along and is not there yet: ``make`` gives its content, always the same."""

    make: Callable[[], bytes]


def stamp(path: Path) -> FileStamp:
    """Size, time, inode and allocated bytes of a file.

    Raises:
        Damaged: it is not there, not a regular file, or a link that leads elsewhere (`check_link`).
        StorageFault: it cannot be looked at.
    """
    check_link(path)
    try:
        seen = os.stat(path)
    except FileNotFoundError as fault:
        raise Damaged("a file is missing", where=str(path), do="fetch it again; nothing was written") from fault
    except OSError as fault:
        raise StorageFault(f"cannot look at a file: {fault.strerror}", where=str(path)) from fault
    if not modes.S_ISREG(seen.st_mode):
        raise Damaged("not a regular file", where=str(path))
    return FileStamp(seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_blocks * 512)


def check_link(path: Path) -> None:
    """A checkpoint may come with links, and what they lead to would be read, and copied beside the weights.

    The hub's cache is made of links, from ``snapshots/<revision>`` into ``blobs`` beside it. The directory that a
    person names may itself be one.

    Raises:
        Damaged: a link that leads out of its directory, or nowhere.
    """
    if not path.is_symlink() or os.environ.get(LINKS) == "follow":
        return
    folder, target = os.path.realpath(path.parent), os.path.realpath(path)
    before, snapshots, _ = folder.rpartition("/snapshots/")
    inside = (folder, f"{before}/blobs") if snapshots else (folder,)
    if not any(target.startswith(f"{place}/") for place in inside):
        raise Damaged(
            "a link leads out of the checkpoint's directory",
            where=str(path),
            expected="files, or links to files of this directory",
            found=f"a link to {os.readlink(path)!r:.200}",
            do=f"put the file itself there; where the links are your own: {LINKS}=follow",
        )
    if os.path.islink(target):  # what is left of one that leads back to itself
        raise Damaged("a link leads nowhere", where=str(path), found=f"a link to {os.readlink(path)!r:.200}")


def _loops(path: Path) -> bool:
    """A link that leads back to itself, which `check_link` tells of."""
    return os.path.islink(os.path.realpath(path))


def check_tensor_name(name: str, *, said_by: object) -> None:
    """The name of a tensor in a file of weights, which others print, and some make file names of.

    Raises:
        Damaged: it is empty, longer than any, no text, has control characters in it, or reads as a path that leads out.
    """
    if (
        not name
        or len(name) > _LONGEST_NAME
        or name[0] in "/\\"
        or not name.isprintable()
        or (".." in name and ".." in re.split(r"[/\\]", name))
    ):
        raise Damaged(
            "no name of a tensor",
            where=str(said_by),
            expected=f"printable text of 1 to {_LONGEST_NAME:,} characters, no path",
            found=f"{name[:100]!a:.200}",
        )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def stamps(folder: Path, suffixes: tuple[str, ...]) -> dict[str, FileStamp]:
    """The stamps of a directory's files by name; to be taken before the files are read.

    Args:
        folder: the directory; those below it are not looked into.
        suffixes: how their names end.

    Raises:
        StorageFault: it cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(suffixes))
    except OSError as fault:
        raise StorageFault(f"cannot list a directory: {fault.strerror}", where=str(folder)) from fault
    return {name: stamp(folder / name) for name in names if (folder / name).is_file() or _loops(folder / name)}


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
    parts: list[bytes] = []
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
    """`read_json` for bytes at hand, which are UTF-8: ``json`` would guess at UTF-16 and more, other readers do not."""
    if sum(map(data.count, (b"[", b"{", b","))) > _MAX_VALUES:
        raise Damaged(f"{what} holds more values than any", where=where, expected=f"at most {_MAX_VALUES:,}")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_no_duplicates)
        if b"\\ud" in data.lower():  # half of a surrogate pair is no text: it could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as fault:
        raise Damaged(f"{what} is not valid JSON", where=where, found=str(fault)[:200]) from fault
    if not is_dict(value):
        raise Damaged(f"{what} is not a JSON object", where=where, found=type(value).__name__)
    return value


def _no_duplicates(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    seen: dict[str, object] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key[:80]!r} stands there twice")
        seen[key] = value
    return seen
