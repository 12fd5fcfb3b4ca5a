"""Progress of all ranks, without communication: each rank notes its own in a small file, one rank draws them all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Final, Protocol, TextIO

from dconv.launch.process import mute

#: Names one more file for a rank's notes: a launcher that asks for it draws them itself.
NOTES: Final = "DCONV_NOTES"
#: Seconds between notes and between redraws.
_TICK: Final = 0.2
_PLAIN_TICK: Final = 5.0
#: Ranks with which redraws are as frequent as that; with more they are rarer.
_RANKS: Final = 64
#: Seconds without news after which a rank is not waited for: it may have died.
_PATIENCE: Final = 10.0


def peak_memory() -> int:
    """Peak resident bytes of this process; ``VmHWM``, since ``ru_maxrss`` is inherited from a launcher."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Board:
    """The notes of all ranks of one run, in ``<partial>/.dconv/ranks/``.

    Args:
        since: seconds since the epoch; older notes are of an earlier run that was killed.
    """

    def __init__(self, partial: Path, rank: int, since: float) -> None:
        self.folder = partial / ".dconv" / "ranks"
        self._since = since
        self._mine = self.folder / f"{rank}.json"
        self._asked_for = os.environ.get(NOTES)
        self._last = 0.0

    def note(self, done: int, total: int) -> None:
        """Note this rank's bytes; at most every tick, and at the end. Who helps others does more than its all."""
        now = time.monotonic()
        if done != total and now - self._last < _TICK:
            return
        self._last = now
        text = json.dumps({"done": done, "total": total, "peak": peak_memory()})
        with contextlib.suppress(OSError):  # a lost note costs a redraw, nothing else
            try:
                self._mine.write_text(text)
            except FileNotFoundError:
                self.folder.mkdir()
                self._mine.write_text(text)
        if self._asked_for:
            with contextlib.suppress(OSError):
                Path(self._asked_for).write_text(text)

    def read(self) -> dict[int, dict[str, int]]:
        """Every rank's latest note."""
        notes: dict[int, dict[str, int]] = {}
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    if path.stat().st_mtime >= self._since and _is_note(note := json.loads(path.read_text())):
                        notes[int(path.stem)] = note
        return notes

    def is_in_use(self) -> bool:
        """Whether ranks may still note something: the folder goes at the commit."""
        return self.folder.exists()


def _is_note(said: object) -> bool:
    numbers = [said.get(key) for key in ("done", "total", "peak")] if isinstance(said, dict) else [None]
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


class Notes(Protocol):
    """What a `Display` draws: a `Board`, or what a launcher has heard from its ranks."""

    def read(self) -> dict[int, dict[str, int]]:
        """Every rank's latest note."""
        ...

    def is_in_use(self) -> bool:
        """Whether ranks may still note something."""
        ...


class Display:
    """Draws one line over all ranks until closed: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, board: Notes, total: int, world: int, stream: TextIO | None = None) -> None:
        self._board = board
        self._total = total
        self._world = world
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        # Every redraw reads a file of each rank.
        self._tick = (_TICK if self._live else _PLAIN_TICK) * max(1.0, world / _RANKS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dconv-progress", daemon=True)
        self._began = time.monotonic()

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._live:
            self._draw("\r\x1b[K")

    def linger(self, stop: threading.Event) -> None:
        """Go on drawing for the ranks that are still at work, as long as they note progress; for a live bar only."""
        if not self._live:
            return
        seen, changed = self._board.read(), time.monotonic()
        while self._board.is_in_use() and time.monotonic() - changed < _PATIENCE and not stop.wait(_TICK):
            if (now := self._board.read()) != seen:
                seen, changed = now, time.monotonic()

    def _run(self) -> None:
        while not self._stop.wait(self._tick):
            notes = self._board.read()
            line = self.line(sum(note["done"] for note in notes.values()), time.monotonic() - self._began)
            self._draw(f"\r\x1b[K{line}" if self._live else line + "\n")

    def _draw(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # nobody looks any more
            mute(self._stream)

    def line(self, done: int, seconds: float) -> str:
        """``[######----]  58%  0.54/0.92 GB  0.61 GB/s  1 s left  2 ranks``"""
        share = min(1.0, done / self._total) if self._total else 1.0
        rate = done / seconds if seconds > 0 else 0.0
        left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "-"
        bar = "#" * round(share * 20)
        ranks = f"{self._world} rank" + "s" * (self._world > 1)
        return (
            f"[{bar:-<20}] {share:4.0%}  {done / 1e9:.2f}/{self._total / 1e9:.2f} GB  "
            f"{rate / 1e9:.2f} GB/s  {left}  {ranks}"
        )
