"""How many threads a rank works with, found while it works: the first tasks are the probe.

Threads hide the time that storage takes to answer, and cost where the processor is the limit; which of the two it is
differs by machine, file system and conversion. So the number is doubled as long as that pays, and then left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

#: ``Settings.threads`` for a number that is found.
AUTO: Final = 0
_MOST: Final = 16
#: Bytes of buffers below which a thread's tiles get smaller than is good (`dconv.sharding.execute`).
_EACH: Final = 24 << 20
#: A rate is taken over this many seconds at least, and this many tasks a thread.
_SECONDS: Final = 0.5
_TASKS: Final = 3
#: Twice the threads are worth it from here: less is noise, or another rank's loss.
_GAIN: Final = 1.15


class Tuner:
    """The number of threads, now.

    Args:
        asked: a number of threads, or `AUTO`.
        max_memory: bytes of buffers that all threads have together.

    Attributes:
        most: threads that there may be.
        threads: that there are to be now.
    """

    def __init__(self, asked: int, max_memory: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = asked or max(1, min(_MOST, max_memory // _EACH))
        self.threads = asked or 1
        self._clock = clock
        self._best = 0.0
        self._settled = bool(asked)
        self._bytes = self._tasks = 0
        self._since: float | None = None

    def done(self, nbytes: int) -> None:
        """Note a task, of so many bytes, at its end."""
        if self._settled:
            return
        now = self._clock()
        if self._since is None:  # what was under way before the number changed says little: count from its first end
            self._since = now
            return
        self._bytes += nbytes
        self._tasks += 1
        seconds = now - self._since
        if seconds < _SECONDS or self._tasks < _TASKS * self.threads:
            return
        rate = self._bytes / seconds
        if rate < self._best * _GAIN:
            self.threads //= 2
            self._settled = True
        elif self.threads * 2 > self.most:
            self._settled = True
        else:
            self._best, self.threads = rate, self.threads * 2
        self._bytes, self._tasks, self._since = 0, 0, None
