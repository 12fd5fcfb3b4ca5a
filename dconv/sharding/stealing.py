"""Which tasks a rank that is done takes from the others: from the slow, and from those that are gone.

There is no owner to ask and no lock: what two ranks do at once they write twice, the same bytes to the same place. So
all that is here is advice, and it only has to be right often. A rank works through its share from the start; another
takes from its end, and says so in its own journal. What nothing has been heard of for a while is anyone's.

Most runs end without a look at a journal: who is done waits for a moment, and one listing tells that all are.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from dconv.sharding.ends import Ends
from dconv.sharding.follow import Follower
from dconv.sharding.plan import Plan, Task
from dconv.sharding.tuning import Tuner

#: Tasks that are taken at once, at most: so that many helpers share what is left.
_TAKE: Final = 8
#: Seconds without news of a task under way after which it counts as given up, and how many of this rank's own slowest
#: tasks they are at least: on slow storage all are slow.
_PATIENCE: Final = 5.0
_SLOWEST: Final = 8
#: Seconds between two looks at whether anyone takes tasks.
_LOOK: Final = 0.5
#: Part of the time that it has worked for which a rank that is done waits for the others, before it looks at what they
#: are at; they were given as much.
_GRACE: Final = 0.1
#: Ranks that help, for each that is not done.
_HELPERS: Final = 8
#: Times its patience after which a rank helps that was not to.
_LONG: Final = 12
#: Seconds that each rank of a run adds to the time between two looks.
_EACH: Final = 0.02
#: The first wait for others that are about to end; twice as long each time.
QUICK: Final = 0.02
#: A look at all journals may cost this part of the time; with a thousand ranks on a network file system it takes long.
_PART: Final = 0.1

_MARK: Final = "stealing"


class Stealing:
    """The tasks of a run as one rank sees them. Not shared between threads.

    Args:
        state: the folder of working state, which holds the journals in ``journal``.
        name: of this rank's own journal.
        since: when the ranks of this run were started (seconds since the epoch).
        share: of a rank, in the order in which it works through it; of all ranks together every task.
        tuner: says how many tasks a rank has under way at once.
    """

    def __init__(
        self, plan: Plan, state: Path, name: str, since: float, rank: int, world: int, tuner: Tuner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._plan, self._rank, self._world, self._tuner, self._clock = plan, rank, world, tuner, clock
        self._mark = state / _MARK
        self._journals = Follower(state / "journal", name, since)
        self._ends = Ends(state, name, rank, world, since)
        self._began = clock()
        self._arrived = 0.0  # when this rank had done its share
        self._due = 0.0  # the next look at the journals
        self._missing: tuple[set[int], float] = (set(), 0.0)  # ranks that are not done, and since when it is these
        self._doubted = False
        self._looked = -1e9
        self._heard: dict[int, tuple[int, float]] = {}  # a rank: tasks it has left, and since when
        self._claimed: dict[int, float] = {}  # a task: since when another rank is known to have taken it
        self._slowest = 0.0
        self._pause = self._wait = QUICK

    def took(self, seconds: float) -> None:
        """Note the time between the ends of two tasks of this rank, whose threads are at one each."""
        self._slowest = max(self._slowest, seconds * self._tuner.threads)

    def is_taken(self, task: Task) -> bool:
        """Whether another rank has a task of this rank's share, or has done it. Quick: the journals are read seldom."""
        now = self._clock()
        if now - self._looked >= max(_LOOK, self._pause):
            self._looked = now
            if os.path.exists(self._mark):
                self._look()
        return task.index in self._journals.done or task.index in self._journals.claims

    def end_of_share(self) -> None:
        """This rank has done its share."""
        self._arrived = self._clock()
        self._due = self._arrived + min(_PATIENCE, _GRACE * (self._arrived - self._began))
        self._ends.mark()

    def begin(self) -> None:
        """Say that this rank has tasks of others under way."""
        self._ends.unmark()

    def end(self) -> None:
        """Say that it has none under way any more."""
        self._ends.mark()

    def doubt(self) -> None:
        """All ranks said that they were done, and something is not: believe the journals alone."""
        self._doubted = True

    def next(self) -> list[Task] | None:
        """Tasks to do now; none of them while all that are left seem to be under way; None when all are done."""
        missing = self._ends.missing()
        if missing is None or not (missing or self._doubted):
            return None
        now = self._clock()
        if now < self._due or not (self._doubted or self._helps(missing, now)):
            return []
        self._look()
        if self._journals.gone:
            return None
        left = [[task for task in share if task.index not in self._journals.done] for share in self._shares]
        if not any(left):
            return None
        now = self._clock()
        ways = [self._free(owner, tasks, now) for owner, tasks in enumerate(left)]
        # From whoever has most; among equals every helper begins with another one.
        sizes = [(sum(task.nbytes + 1 for task in way), (i - self._rank) % self._world) for i, way in enumerate(ways)]
        found = ways[sizes.index(max(sizes))]
        if found:
            with contextlib.suppress(FileNotFoundError):  # committed meanwhile
                self._mark.touch()
        else:
            self._due = now + max(self._pause, _EACH * self._world)
        return found[-max(1, min(_TAKE, (len(found) + 1) // 2)) :]

    def _helps(self, missing: set[int], now: float) -> bool:
        """Whether this rank is one of those that help; anyone is where nothing is heard for long."""
        if missing != self._missing[0]:
            self._missing = missing, now
        if now - self._missing[1] >= _LONG * self._patience:
            return True
        first = min(missing)
        before = sum((rank - first) % self._world < (self._rank - first) % self._world for rank in missing)
        return (self._rank - first) % self._world - before < _HELPERS * len(missing)

    @property
    def _patience(self) -> float:
        return max(_PATIENCE, _SLOWEST * self._slowest)

    def wait(self) -> float:
        """Seconds to wait before the next look, where there was nothing to do."""
        self._wait = min(2 * self._wait, max(_LOOK, _EACH * self._world / 4))
        return self._wait

    def _free(self, owner: int, left: Sequence[Task], now: float) -> list[Task]:
        """What of a rank's tasks may be taken: not those that are under way, unless nothing is heard of them."""
        count, since = self._heard.get(owner, (-1, now))
        if count != len(left):
            since = now
            self._heard[owner] = (len(left), now)
        lost = owner == self._rank or now - since >= self._patience
        mine = self._journals.mine
        held = {task for task, at in self._claimed.items() if now - at < self._patience}
        free = [task for task in left if task.index not in held or task.index in mine]
        return free if lost else free[self._tuner.threads :]

    def _look(self) -> None:
        began = self._clock()
        self._journals.look()
        now = self._clock()
        self._pause = (now - began) / _PART
        for task in self._journals.claims - self._claimed.keys():
            self._claimed[task] = now

    @cached_property
    def _shares(self) -> list[tuple[Task, ...]]:
        return self._plan.shares(self._world)
