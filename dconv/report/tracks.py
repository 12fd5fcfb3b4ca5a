"""What each rank did over time, for the conversion report: noted in the working state, which goes at the commit.

Ranks may be on other machines and share the output's file system only, so each appends to a file of its own, opened
for each note, that others see it. Nothing is noted of a run that nobody wants a report of.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.sharding.plan import Plan, Task

_FOLDER: Final = "tracks"
#: Seconds between notes: enough for a picture, and nothing beside the flush of what they speak of.
_TICK: Final = 0.5
#: Notes after which they become half as frequent: a run of a day has some thousand of them.
_MANY: Final = 1000
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
        return self.points[0].at

    @property
    def last(self) -> Point:
        return self.points[-1]


class Recorder:
    """Notes what this process does.

    Args:
        state: the folder of working state.
    """

    def __init__(self, state: Path, plan: Plan, rank: int, world: int) -> None:
        self._plan, self._rank, self._world, self._state = plan, rank, world, state
        began = time.time()
        self._folder = state / _FOLDER
        self._path = self._folder / f"{rank}-{int(began * 1e9):020}-{os.getpid()}"
        self._points = [Point(began, 0, 0, 0)]
        self._noted = self._read = self._written = 0
        self._tick, self._last = _TICK, 0.0

    def did(self, task: Task) -> None:
        """A task is done (`dconv.sharding.rank.Settings.watch`)."""
        self._read += read_by(self._plan, task)
        self._written += task.nbytes

    def note(self, finished: int, share: int) -> None:
        """Note how far it is: at most every tick, and always where its share ends (`Settings.progress`).

        What ends the share is noted before the journal has it, so that whoever commits finds it here.
        """
        now = time.monotonic()
        if finished < share and now - self._last < self._tick and len(self._points) > 1:
            return
        self._last = now
        self._points.append(Point(time.time(), self._read, self._written, max(finished - self._written, 0)))
        if len(self._points) % _MANY == 0:
            self._tick *= 2
        self._append()

    def _append(self) -> None:
        """A lost note is noted by the next one."""
        lines = [] if self._noted else [[self._rank, self._world, socket.gethostname()]]
        fresh = self._points[self._noted :]
        text = "".join(
            json.dumps(line) + "\n" for line in [*lines, *([p.at, p.read, p.written, p.kept] for p in fresh)]
        )
        with contextlib.suppress(OSError):
            try:
                fd = self._open()
            except FileNotFoundError:
                self._folder.mkdir(exist_ok=True)
                fd = self._open()
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
            self._noted = len(self._points)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def all(self) -> tuple[Track, ...]:
        """What all processes have noted; of this one also what could not be written."""
        others = tracks(self._state, leave=self._path.name)
        mine = Track(self._rank, self._world, socket.gethostname(), tuple(self._points))
        return tuple(sorted([*others, mine], key=lambda track: (track.rank, track.began)))


def read_by(plan: Plan, task: Task) -> int:
    """Source bytes that a task reads."""
    if task.tensor < 0:
        return 0
    return sum(c.nbytes for copy in plan.copies[task.tensor] if (c := copy.clip(task.region)) is not None)


def tracks(state: Path, leave: str = "") -> Iterable[Track]:
    """The notes in a folder of working state; what is no note is passed over.

    Args:
        leave: a file that is not read.
    """
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(state / _FOLDER))[:_FILES]
    for name in names:
        with contextlib.suppress(OSError):
            if name != leave and (track := _track(state / _FOLDER / name)) is not None:
                yield track


def _track(path: Path) -> Track | None:
    with path.open("rb") as file:
        lines = [_numbers(line) for line in file.read(_READ).splitlines()]
    head = lines[0] if lines else None
    if head is None or len(head) != 3 or not isinstance(head[2], str):
        return None
    points = [Point(float(line[0]), *map(int, line[1:])) for line in lines[1:] if line and _is_point(line)]
    points.sort(key=lambda point: point.at)
    whole = isinstance(head[0], int) and isinstance(head[1], int) and 0 <= head[0] < head[1]
    return Track(head[0], head[1], head[2], tuple(points)) if points and whole else None


def _numbers(line: bytes) -> list[Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # torn, or not ours
        return None
    return found if isinstance(found, list) else None


def _is_point(line: Sequence[Any]) -> bool:
    return (
        len(line) == 4
        and all(type(value) in (int, float) for value in line)
        and 0 < line[0] < 1e11
        and all(0 <= value < 1 << 63 for value in line[1:])
    )
