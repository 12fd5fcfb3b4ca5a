"""Expert parallelism: which rank has which experts of a layer, and threads that go through a layer in step.

Expert ``e`` is the ``e mod N``-th peer's. So N neighbouring experts are N ranks', and a token's answers come back in
the order in which one process adds them up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from dconv.quant.ranks import Ranks, Told

#: In the place of a block, where a rank has none left and its peers do.
AWAY: Final = -1


@dataclass(frozen=True)
class Peers:
    """This rank among those that have a layer's experts between them.

    Attributes:
        replicas: the ranks with the same experts as this one.
        lanes: the peers, once for each thread: what two threads say at once must not be confused.
        stop: set when this rank is to leave.
    """

    replicas: Ranks = Ranks()
    lanes: tuple[Ranks, ...] = (Ranks(),)
    stop: threading.Event = field(default_factory=threading.Event)
    _here: threading.local = field(default_factory=threading.local)

    @classmethod
    def of(cls, ranks: Ranks, size: int, threads: int) -> Peers:
        """Parts all ranks, neighbours together; all of them call it.

        Args:
            ranks: all of them.
            size: ranks that have one model's experts between them; divides how many ranks there are.
            threads: blocks that a rank computes at once.
        """
        if size == 1:
            return cls(ranks, (Ranks(0, 1, ranks.device),), ranks.stop)
        firsts = range(0, ranks.world, size)
        agreed = ranks.least(1 if ranks.device.startswith("cuda") else threads)
        replicas = ranks.part([[first + i for first in firsts] for i in range(size)])
        lanes = tuple(ranks.part([range(i, i + size) for i in firsts]) for _ in range(agreed))
        return cls(replicas, lanes, ranks.stop)

    @property
    def size(self) -> int:
        """How many ranks have a layer's experts between them."""
        return self.lanes[0].world

    @property
    def lane(self) -> Ranks:
        """The peers as the calling thread speaks to them."""
        return getattr(self._here, "lane", self.lanes[0])

    @property
    def item(self) -> Any:
        """What the calling thread is at: a block, a sample, or `AWAY`."""
        return getattr(self._here, "item", 0)

    def hear(self, *, told: bool = False) -> None:
        """Go on, unless this rank was told to stop and may leave where it is: peers do so where they all meet.

        Args:
            told: they meet here, and one of them was.

        Raises:
            Told: this rank may leave.
        """
        if told or (self.size == 1 and self.stop.is_set()):
            raise Told

    def owns(self, expert: int) -> bool:
        """Whether an expert is this rank's."""
        return expert % self.size == self.lanes[0].rank

    def mine(self, count: int) -> range:
        """Which of ``count`` experts are here."""
        return range(self.lanes[0].rank, count, self.size)

    def padded(self, items: Sequence[Any], most: int) -> list[Any]:
        """Items of this rank, as many as any of its peers may have: ``most``."""
        return [*items, *[AWAY] * (most - len(items))] if self.size > 1 else list(items)

    def run(self, items: Sequence[Any], one: Callable[[Any], Any], threads: int) -> list[Any]:
        """Do something for each item, so many at once as there are threads; where experts are divided, in step.

        Args:
            items: what it is done for; with peers, as many as each of them has (`padded`).
            one: what is done.
            threads: the same number on all peers.
        """
        if self.size == 1:

            def alone(item: Any) -> Any:
                return self._alone(self.lanes[0], item, one)

            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(alone, items))
        found: dict[int, Any] = {}
        lanes = self.lanes[:threads]

        def go(lane: int) -> None:
            for at in range(lane, len(items), len(lanes)):
                found[at] = self._alone(lanes[lane], items[at], one)

        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(go, range(len(lanes))))
        return [found[at] for at in range(len(items))]

    def _alone(self, lane: Ranks, item: Any, one: Callable[[Any], Any]) -> Any:
        import torch

        torch.set_num_threads(1)  # so that no sum depends on how many there are
        self._here.lane, self._here.item = lane, item
        with torch.no_grad():
            return one(item)
