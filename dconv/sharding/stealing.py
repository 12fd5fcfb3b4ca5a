"""Which tasks a rank that is done takes from the others: from the slow, and from those that are gone.

There is no owner to ask and no lock: what two ranks do at once they write twice, the same bytes to the same place. So
all that is here is advice, and it only has to be right often. A rank works through its share from the start; another
takes from its end, and says so in its own journal. What nothing has been heard of for a while is anyone's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

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

    def next(self) -> list[Task] | None:
        """Tasks to do now; none of them while all that are left seem to be under way; None when all are done."""
        self._look()
        if self._journals.gone:
            return None
        left = [
            [task for task in share if task.index not in self._journals.done]
            for share in self._shares
        ]  # fmt: skip
        if not any(left):
            return None
        now = self._clock()
        patience = max(_PATIENCE, _SLOWEST * self._slowest)
        ways = [self._free(owner, tasks, now, patience) for owner, tasks in enumerate(left)]
        # From whoever has most; among equals every helper begins with another one.
        sizes = [(sum(task.nbytes + 1 for task in way), (i - self._rank) % self._world) for i, way in enumerate(ways)]
        found = ways[sizes.index(max(sizes))]
        if found:
            with contextlib.suppress(FileNotFoundError):  # committed meanwhile
                self._mark.touch()
        return found[-max(1, min(_TAKE, (len(found) + 1) // 2)) :]

    def wait(self) -> float:
        """Seconds to wait before the next look, where there was nothing to do."""
        self._wait = min(2 * self._wait, max(_LOOK, self._pause))
        return self._wait

    def _free(self, owner: int, left: Sequence[Task], now: float, patience: float) -> list[Task]:
        """What of a rank's tasks may be taken: not those that are under way, unless nothing is heard of them."""
        count, since = self._heard.get(owner, (-1, now))
        if count != len(left):
            since = now
            self._heard[owner] = (len(left), now)
        lost = owner == self._rank or now - since >= patience
        mine = self._journals.mine
        held = {task for task, at in self._claimed.items() if now - at < patience}
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
        return [self._plan.share(rank, self._world) for rank in range(self._world)]
