"""What each rank did over time, for the conversion report: noted in the working state, which goes at the commit.

Ranks may be on other machines and share the output's file system only, so each has a file of its own, which is closed
after each note, that others see it. Its first line, always as long, says where the rank is now, and is written over
before the journal says so: whoever commits finds all of it. Nothing is noted of a run that nobody wants a report of.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.sharding.parsed import is_list
from dconv.sharding.plan import Plan, Task

#: Seconds by which a process's notes may begin before what is known as its run's beginning: clocks of files lag.
TICK: Final = 0.1
_FOLDER: Final = "tracks"
#: Seconds between the notes that stay: enough for a picture.
_EVERY: Final = 0.5
#: Notes after which fewer stay, half as many a second: of a day some thousand.
_MANY: Final = 1000
#: Bytes of the first line.
_LINE: Final = 512
#: Bytes of a file that are read: many times what a rank notes.
_READ: Final = 1 << 22
#: Files that are read: as many processes as any run has, and some that it lost.
_FILES: Final = 100_000


@dataclass(frozen=True, slots=True)
class Point:
    """Where a process was.

    Attributes:
        at: seconds since the epoch.
        read, written: bytes of the plan that it has read and written so far.
        kept: bytes that it found done by an earlier run.
    """

    at: float
    read: int
    written: int
    kept: int


@dataclass(frozen=True, slots=True)
class Track:
    """One process's points, in order; the first is its beginning."""

    rank: int
    world: int
    host: str
    points: tuple[Point, ...]

    @property
    def began(self) -> float:
        """Seconds since the epoch."""
        return self.points[0].at

    @property
    def last(self) -> Point:
        """The newest point."""
        return self.points[-1]


class Recorder:
    """Notes what this process does (`dconv.sharding.rank.Watch`); it begins with this object.

    Args:
        state: the folder of working state.
    """

    def __init__(self, state: Path, plan: Plan, rank: int, world: int) -> None:
        self._plan, self._state = plan, state
        self._head = json.dumps([rank, world, socket.gethostname()])
        began = time.time()
        self._path = state / _FOLDER / f"{rank}-{int(began * 1e9):020}-{os.getpid()}"
        self._lock = threading.Lock()
        self._points = [Point(began, 0, 0, 0)]
        self._noted = self._read = self._written = self._kept = 0
        self._known: set[int] = set()
        self._tick, self._last = _EVERY, -math.inf

    def done(self, tasks: Sequence[Task]) -> None:
        """See `dconv.sharding.rank.Watch`."""
        with self._lock:
            for task in tasks:
                self._known.add(task.index)
                self._read += read_by(self._plan, task)
                self._written += task.nbytes
            self._note()

    def kept(self, tasks: Sequence[Task]) -> None:
        """See `dconv.sharding.rank.Watch`; what this process has done itself is not kept of another."""
        with self._lock:
            fresh = [task for task in tasks if task.index not in self._known]
            self._known.update(task.index for task in fresh)
            self._kept += sum(task.nbytes for task in fresh)
            self._note()

    def _note(self) -> None:
        """Note where it is now; one moment in every tick stays, all others are written over."""
        now = time.monotonic()
        point = Point(time.time(), self._read, self._written, self._kept)
        stays = now - self._last >= self._tick
        if stays:
            self._last = now
            self._points.append(point)
            if len(self._points) % _MANY == 0:
                self._tick *= 2
        with contextlib.suppress(OSError):  # a lost note is made good by the next one
            fd = self._open()
            try:
                os.pwrite(fd, _line(self._head, point).ljust(_LINE - 1).encode() + b"\n", 0)
                if stays:
                    lines = "".join(_line("", each) + "\n" for each in self._points[self._noted :])
                    os.lseek(fd, 0, os.SEEK_END)
                    os.write(fd, lines.encode())
                    self._noted = len(self._points)
            finally:
                os.close(fd)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(self._path, flags, 0o644)
        except FileNotFoundError:
            self._path.parent.mkdir(exist_ok=True)
            return os.open(self._path, flags, 0o644)


def _line(head: str, point: Point) -> str:
    numbers = json.dumps([point.at, point.read, point.written, point.kept])
    return f"[{head}, {numbers}]" if head else numbers


def read_by(plan: Plan, task: Task) -> int:
    """Source bytes that a task reads."""
    if task.tensor < 0:
        return 0
    return sum(c.nbytes for copy in plan.copies[task.tensor] if (c := copy.clip(task.region)) is not None)


def tracks(state: Path) -> list[Track]:
    """The notes in a folder of working state, by rank; what is no note is passed over."""
    found: list[Track] = []
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(state / _FOLDER))[:_FILES]:
            with contextlib.suppress(OSError):
                if (track := _track(state / _FOLDER / name)) is not None:
                    found.append(track)
    return sorted(found, key=lambda track: (track.rank, track.began))


def _track(path: Path) -> Track | None:
    with path.open("rb") as file:
        first, *others = [_list(line) for line in file.read(_READ).splitlines()] or [[]]
    if len(first) != 2 or not (_is_head(first[0]) and _is_point(first[1])):
        return None
    points = {_point(line) for line in (first[1], *others) if _is_point(line)}
    rank, world, host = first[0]
    return Track(rank, world, host, tuple(sorted(points, key=lambda point: point.at)))


def _list(line: bytes) -> list[Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # torn, or not ours
        return []
    return found if is_list(found) else []


def _is_head(line: object) -> bool:
    match line:
        case [int(rank), int(world), str()]:
            return 0 <= rank < world
        case _:
            return False


def _is_point(line: object) -> bool:
    if not is_list(line) or len(line) != 4 or type(line[0]) not in (int, float):
        return False
    return 0 < line[0] < 1e11 and all(type(value) is int and 0 <= value < 1 << 63 for value in line[1:])


def _point(line: Sequence[Any]) -> Point:
    return Point(float(line[0]), line[1], line[2], line[3])
