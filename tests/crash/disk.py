"""A disk as a power cut leaves it: what was synced is there, of the rest any part.

A run's calls are recorded by inode; `Disk` plays a beginning of them back and loses some of what was not synced: bytes
in any combination, names of a directory from some moment on.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: A call: its name and what it was about, by inode.
Event = tuple[Any, ...]


class Recorder:
    """Every call below ``root`` that changes it, in order, while a `pytest.MonkeyPatch` lasts. One thread at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.events: list[Event] = []
        self.root = os.stat(root).st_ino
        self._below = os.path.realpath(root)
        self._real = {name: getattr(os, name) for name in _NAMES}
        for name in _NAMES:
            patch.setattr(os, name, getattr(self, name))
        real_open = io.open

        def opened(file: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
            writes = any(letter in mode for letter in "wax+") and self._path(file, None).startswith(self._below)
            assert not writes, f"a write that is not recorded: {file}"
            return real_open(file, mode, *words, **options)

        patch.setattr(io, "open", opened)

    @staticmethod
    def _path(what: Any, folder: int | None) -> str:
        if isinstance(what, int):
            return os.readlink(f"/proc/self/fd/{what}")
        at = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        return os.path.join(at, os.fsdecode(what))

    def _note(self, path: str, *event: Any) -> None:
        if path.startswith(self._below):
            self.events.append(event)

    @staticmethod
    def _parent(path: str) -> int:
        return os.stat(os.path.dirname(path)).st_ino

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        full = self._path(path, dir_fd)
        made = bool(flags & os.O_CREAT) and not os.path.lexists(full)
        fd = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        if made:
            self._note(full, "add", self._parent(full), os.path.basename(full), os.fstat(fd).st_ino, False)
        if flags & os.O_TRUNC:
            self._note(full, "truncate", os.fstat(fd).st_ino, 0)
        return fd

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        full = self._path(path, dir_fd)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        self._note(full, "add", self._parent(full), os.path.basename(full), os.stat(full).st_ino, True)

    def write(self, fd: int, data: Any) -> int:
        at = os.fstat(fd).st_size  # journals are appended to; closing files are written from the start in one go
        done = self._real["write"](fd, data)
        self._note(self._path(fd, None), "write", os.fstat(fd).st_ino, at, bytes(data[:done]))
        return done

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        done = self._real["pwrite"](fd, data, offset)
        self._note(self._path(fd, None), "write", os.fstat(fd).st_ino, offset, bytes(data[:done]))
        return done

    def ftruncate(self, fd: int, size: int) -> None:
        self._real["ftruncate"](fd, size)
        self._note(self._path(fd, None), "truncate", os.fstat(fd).st_ino, size)

    def fsync(self, fd: int) -> None:
        self._real["fsync"](fd)
        self._note(self._path(fd, None), "sync", os.fstat(fd).st_ino)

    def rename(self, source: Any, target: Any) -> None:
        old, new = self._path(source, None), self._path(target, None)
        event = "move", self._parent(old), os.path.basename(old), self._parent(new), os.path.basename(new)
        self._real["rename"](source, target)
        self._note(new, *event)

    def replace(self, source: Any, target: Any) -> None:
        self.rename(source, target)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        full = self._path(path, dir_fd)
        parent = self._parent(full)
        self._real["unlink"](path, dir_fd=dir_fd)
        self._note(full, "remove", parent, os.path.basename(full))

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        full = self._path(path, dir_fd)
        parent = self._parent(full)
        self._real["rmdir"](path, dir_fd=dir_fd)
        self._note(full, "remove", parent, os.path.basename(full))


_NAMES = ("open", "mkdir", "write", "pwrite", "ftruncate", "fsync", "rename", "replace", "unlink", "rmdir")


@dataclass
class _File:
    """Bytes that are safe, and what was done since the last sync."""

    data: bytearray = field(default_factory=bytearray)
    pending: list[Event] = field(default_factory=list)

    def settled(self, kept: Sequence[Event]) -> bytearray:
        data = bytearray(self.data)
        for event in kept:
            if event[0] == "truncate":
                data = data[: event[2]].ljust(event[2], b"\0")
            else:
                _, _, at, what = event
                data = data.ljust(at + len(what), b"\0")
                data[at : at + len(what)] = what
        return data


@dataclass
class _Folder:
    """Names that are safe, and what was done to names since the last sync: in order, so that a beginning survives."""

    names: dict[str, int] = field(default_factory=dict)
    pending: list[Event] = field(default_factory=list)

    def settled(self, kept: Sequence[Event]) -> dict[str, int]:
        names = dict(self.names)
        for event in kept:
            what, _, *about = event
            if what == "remove":
                names.pop(about[0], None)
            elif what == "rename":
                old, new, inode = about
                names.pop(old, None)
                names[new] = inode
            else:
                names[about[0]] = about[1]
        return names


class Disk:
    """A disk to which calls were made."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._now: dict[int, dict[str, int]] = {root: {}}  # names as running processes see them
        self._all: dict[int, _File | _Folder] = {root: _Folder()}

    def do(self, event: Event) -> None:
        """Make one call."""
        what, inode, *rest = event
        if what == "add":
            name, made, is_folder = rest
            self._all[made] = _Folder() if is_folder else _File()
            self._now.setdefault(made, {})
            self._named(inode, name, made)
        elif what == "remove":
            self._now[inode].pop(rest[0], None)
            self._all[inode].pending.append(event)
        elif what == "move":
            old, target, new = rest
            assert target == inode, "a name that goes to another folder"
            moved = self._now[inode].pop(old)
            self._now[inode][new] = moved
            self._all[inode].pending.append(("rename", inode, old, new, moved))
        elif what == "sync":
            one = self._all[inode]
            if isinstance(one, _File):
                one.data = one.settled(one.pending)
            else:
                one.names = one.settled(one.pending)
            one.pending.clear()
        else:
            self._all[inode].pending.append(event)

    def _named(self, folder: int, name: str, made: int) -> None:
        self._now[folder][name] = made
        self._all[folder].pending.append(("add", folder, name, made))

    def lost(self, where: Path, keeps_bytes: Callable[[], bool], keeps_names: Callable[[int], int]) -> None:
        """Write the disk below ``where`` as a power cut now would leave it.

        Args:
            keeps_bytes: whether a write that was not synced is there.
            keeps_names: how many of so many changes of a directory that were not synced are there.
        """
        self._put(self._root, where, keeps_bytes, keeps_names)

    def _put(self, inode: int, where: Path, keeps_bytes: Callable[[], bool], keeps_names: Callable[[int], int]) -> None:
        one = self._all[inode]
        if isinstance(one, _File):
            where.write_bytes(one.settled([event for event in one.pending if keeps_bytes()]))
            return
        where.mkdir(exist_ok=True)
        for name, inner in one.settled(one.pending[: keeps_names(len(one.pending))]).items():
            self._put(inner, where / name, keeps_bytes, keeps_names)


def ways(seed: int) -> list[tuple[Callable[[], bool], Callable[[int], int]]]:
    """What may be lost: all, nothing, bytes alone, names alone, and by chance."""
    chance = random.Random(seed)

    def some() -> bool:
        return chance.random() < 0.5

    def beginning(count: int) -> int:
        return chance.randint(0, count)

    return [
        (lambda: False, lambda _: 0),
        (lambda: True, lambda count: count),
        (lambda: False, lambda count: count),
        (lambda: True, lambda _: 0),
        (some, lambda count: count),
        (some, beginning),
        (some, beginning),
    ]
