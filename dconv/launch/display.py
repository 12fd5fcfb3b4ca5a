"""What one rank draws of all: a live bar for each on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from dconv.launch.process import mute
from dconv.launch.terminal import console_of, is_terminal

if TYPE_CHECKING:
    from rich.live import Live

#: Seconds between redraws.
_TICK: Final = 0.2
_PLAIN_TICK: Final = 5.0
#: Ranks with which redraws are as frequent as that; with more they are rarer: each reads a file of each rank.
_RANKS: Final = 64
#: Ranks that have a bar of their own; of more, those that have most to do.
_BARS: Final = 16
#: Seconds without news after which a rank is not waited for: it may have died.
_PATIENCE: Final = 10.0


class Notes(Protocol):
    """What a `Display` draws: a `Board`, or what a launcher has heard from its ranks."""

    def read(self) -> dict[int, dict[str, int]]:
        """Every rank's latest note."""
        ...

    def is_in_use(self) -> bool:
        """Whether ranks may still note something."""
        ...


class Display:
    """Draws the progress of all ranks until closed."""

    def __init__(self, board: Notes, total: int, world: int, stream: TextIO | None = None) -> None:
        self._board = board
        self._total = total
        self._world = world
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        self._tick = (_TICK if is_terminal(self._stream) else _PLAIN_TICK) * max(1.0, world / _RANKS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dconv-progress", daemon=True)
        self._began = time.monotonic()

    def __enter__(self) -> Display:
        if is_terminal(self._stream):
            from rich.live import Live

            console = console_of(self._stream)
            console.show_cursor = lambda show=True: False  # noqa: ARG005 - nobody would show it again after a kill
            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._live:
            self._live.stop()

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
            lines = [self.line(sum(note["done"] for note in notes.values()), time.monotonic() - self._began)]
            try:
                if self._live:
                    from rich.text import Text

                    drawn = Text("\n".join([*lines, *self.bars(notes)]), no_wrap=True, overflow="ellipsis")
                    self._live.update(drawn, refresh=True)
                else:
                    self._stream.write(f"{lines[0]}\n")
                    self._stream.flush()
            except BrokenPipeError:  # nobody looks any more
                mute(self._stream)

    def line(self, done: int, seconds: float) -> str:
        """All ranks together: ``[######----]  58%  0.54/0.92 GB  0.61 GB/s  1 s left  2 ranks``."""
        share = min(1.0, done / self._total) if self._total else 1.0
        rate = done / seconds if seconds > 0 else 0.0
        left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "-"
        ranks = f"{self._world} rank" + "s" * (self._world > 1)
        return (
            f"{_bar(share)} {share:4.0%}  {done / 1e9:.2f}/{self._total / 1e9:.2f} GB  "
            f"{rate / 1e9:.2f} GB/s  {left}  {ranks}"
        )

    def bars(self, notes: Mapping[int, Mapping[str, int]]) -> list[str]:
        """A line for each of several ranks, of many for those that are farthest from their end."""
        if self._world == 1:
            return []
        shares = {rank: min(1.0, one["done"] / one["total"]) if one["total"] else 1.0 for rank, one in notes.items()}
        slowest = sorted(shares, key=lambda rank: (shares[rank], rank))[:_BARS]
        wide = len(str(self._world - 1))
        lines = [
            f"{_bar(shares[rank])} {shares[rank]:4.0%}  rank {rank:>{wide}}  {notes[rank]['done'] / 1e9:.2f}/"
            f"{notes[rank]['total'] / 1e9:.2f} GB  peak {notes[rank]['peak'] / 2**20:.0f} MiB"
            for rank in sorted(slowest)
        ]
        if more := len(shares) - len(slowest):
            whole = sum(share == 1.0 for rank, share in shares.items() if rank not in slowest)
            lines.append(f"and {more} more ranks, {whole} of them done")
        return lines


def _bar(share: float) -> str:
    return f"[{'#' * round(share * 20):-<20}]"
