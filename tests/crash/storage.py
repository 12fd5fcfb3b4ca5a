"""Every call of the operating system that a run makes below a folder: counted; made to fail, fall short, or kill."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

#: Calls that change what is on a disk, or make it durable; of those that open a file these that may make it.
CHANGING = ("open", "pwrite", "write", "fsync", "ftruncate", "mkdir", "rename", "replace", "unlink", "rmdir")
#: Calls that only look.
LOOKING = ("pread", "preadv", "stat", "lstat", "listdir", "scandir", "lseek", "statvfs", "flock")
#: Calls of a reader.
READING = (*LOOKING, "open for reading", "read")
#: What a hook returns for a call that is to do half of what it was asked for.
SHORT = "short"

#: Called before each call with its number, from 1, and its name; may raise, end the process, or return `SHORT`.
Hook = Callable[[int, str], object]


class Storage:
    """Puts a hook before the calls below ``root``, while a `pytest.MonkeyPatch` lasts.

    Args:
        names: of the calls that are counted.

    Attributes:
        calls: names of those that were made.
    """

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, hook: Hook, names: tuple[str, ...] = CHANGING) -> None:
        self.calls: list[str] = []
        self._root, self._hook, self._inside = os.path.realpath(root), hook, False
        for name in set(names) - {"open", "open for reading"}:
            module: ModuleType = fcntl if name == "flock" else os
            patch.setattr(module, name, self._counting(name, getattr(module, name)))
        if opens := {"open", "open for reading"} & set(names):
            (name,) = opens
            patch.setattr(os, "open", self._counting(name, os.open))
            patch.setattr(io, "open", self._counting(name, io.open))

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            if not self._is_below(words[0] if words else ".", options.get("dir_fd")) or not _matters(name, words):
                return real(*words, **options)
            self.calls.append(name)
            if self._hook(len(self.calls), name) == SHORT:
                return real(*_half(name, words), **options)
            return real(*words, **options)

        return call

    def _is_below(self, what: Any, folder: int | None) -> bool:
        if isinstance(what, int):
            path = os.readlink(f"/proc/self/fd/{what}")
        else:
            path = os.fsdecode(what)
            if not os.path.isabs(path):
                path = os.path.join(os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}"), path)
        return path.startswith(self._root)


def _matters(name: str, words: tuple[Any, ...]) -> bool:
    """Whether a call to open a file makes one, where that is asked."""
    if not name.startswith("open"):
        return True
    how = words[1] if len(words) > 1 else "r"
    makes = bool(how & os.O_CREAT) if isinstance(how, int) else any(letter in how for letter in "wax+")
    return makes == (name == "open")


def _half(name: str, words: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call for half of the bytes."""
    first, what, *rest = words if len(words) > 1 else (*words, None)
    if name in ("write", "pwrite"):
        return first, memoryview(what)[: max(1, len(what) // 2)], *rest
    if name in ("pread", "read"):
        return first, max(1, what // 2), *rest
    if name == "preadv":
        return first, [memoryview(what[0])[: max(1, len(what[0]) // 2)]], *rest
    return words
