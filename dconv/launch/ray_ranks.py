"""The ranks of one start on a Ray cluster: an actor each, heard and told by this process until all have ended."""

from __future__ import annotations

import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from dconv.errors import Preempted, ToolMissing
from dconv.launch.process import Stop, say
from dconv.launch.ray_cluster import Share, addresses, handed_on
from dconv.launch.ray_keeper import CALLS, Heard, Keeper

#: Seconds between two questions to a rank.
_TICK: Final = 0.3
#: Seconds that ranks have to leave once they were told; launchers wait as long.
_PATIENCE: Final = 30.0
#: Seconds that they have where they may be waiting for one that is gone: those hear nothing.
_WAITING_FOR_THE_LOST: Final = 8.0
#: Seconds for actors to start once they have their places: an environment may have to be made on a node.
_STARTING: Final = 600.0


class Said:
    """What ranks print, live; what several say alike, each because it cannot know of the others, is said once.

    Args:
        out: where a result goes.
    """

    def __init__(self, out: TextIO) -> None:
        self.result = False
        self._out = out
        self._printed: dict[str, Counter[str]] = {"out": Counter(), "err": Counter()}
        self._of_rank: dict[tuple[str, int], Counter[str]] = {}

    def hear(self, rank: int, heard: Heard) -> None:
        """Print what no other rank has said."""
        for name, text, stream in (("out", heard.out, self._out), ("err", heard.err, sys.stderr)):
            own, printed = self._of_rank.setdefault((name, rank), Counter()), self._printed[name]
            for line in text.removesuffix("\n").split("\n") if text else ():
                own[line] += 1
                if own[line] > printed[line]:
                    printed[line] += 1
                    say(line, stream)
        self.result |= bool(heard.out.strip())


@dataclass
class Notes:
    """The ranks' latest notes, for `dconv.launch.display.Display`."""

    found: dict[int, dict[str, int]] = field(default_factory=dict[int, dict[str, int]])

    def read(self) -> dict[int, dict[str, int]]:
        """See `dconv.launch.display.Notes`."""
        return dict(self.found)

    def is_in_use(self) -> bool:
        """See `dconv.launch.display.Notes`."""
        return True


@dataclass(frozen=True)
class Ended:
    """What became of the ranks of one start.

    Attributes:
        code: of the first that ended by itself with another one than 0.
        lost: why ranks were lost, by their numbers; another start may do what they have left.
        result: one of them printed what it made.
    """

    code: int
    lost: Mapping[int, str]
    result: bool


class Ranks:
    """So many actors in a placement group, each with one rank.

    Args:
        out: where their result goes.
        together: the ranks talk to each other, so that without one of them the others wait in vain.
    """

    def __init__(
        self, ray: Any, group: Any, share: Share, count: int, stop: Stop, out: TextIO, *, together: bool
    ) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In

        self.said, self.notes = Said(out), Notes()
        self._ray, self._stop, self._together = ray, stop, together
        actor = ray.remote(Keeper)
        self._keepers: list[Any] = [
            actor.options(
                num_cpus=share.cpus,
                num_gpus=share.gpus,
                max_concurrency=CALLS,
                max_restarts=0,
                scheduling_strategy=In(group, bundle),
            ).remote()
            for bundle in range(count)
        ]
        self._held: dict[int, list[Heard]] = {}
        self._gpus = share.gpus
        self._codes: dict[int, int] = {}
        self._lost: dict[int, str] = {}
        self._asked: dict[Any, tuple[str, int]] = {}
        self._told: float | None = None

    def run(self, words: Sequence[str], directory: str) -> Ended:
        """Run ``python -m dconv.launch WORDS`` in each, until all have ended.

        Raises:
            ToolMissing: the nodes cannot start an actor of dconv.
        """
        places = self._places()
        if places is None:
            return Ended(0, dict.fromkeys(range(len(self._keepers)), "its node"), False)
        for rank, variables in enumerate(self._variables(places)):
            self._ask("run", rank, "dconv.launch", list(words), directory, variables)
            self._ask("heard", rank)
        while self._left():
            self._hear()
            if self._stop.is_set():
                self._tell(_PATIENCE)
            if self._lost and self._together:
                self._tell(_WAITING_FOR_THE_LOST)
            if any(self._codes.values()):
                self._tell(_PATIENCE)
            if self._told is not None and time.monotonic() > self._told:
                for rank in self._left():
                    self._ray.kill(self._keepers[rank])
                self._told += _PATIENCE
        failed = [code for _, code in sorted(self._codes.items()) if code]
        return Ended(failed[0] if failed else 0, self._lost, self.said.result)

    def close(self) -> None:
        """End the actors, with all that they keep."""
        for keeper in self._keepers:
            self._ray.kill(keeper)

    def _left(self) -> list[int]:
        return [rank for rank in range(len(self._keepers)) if rank not in self._codes and rank not in self._lost]

    def _places(self) -> list[tuple[str, int]] | None:
        """Where the actors are; ranks of one node are neighbours, as under other launchers. None where one is lost."""
        faults = self._ray.exceptions
        asked = [keeper.where.remote() for keeper in self._keepers]
        until = time.monotonic() + _STARTING
        while self._ray.wait(asked, num_returns=len(asked), timeout=_TICK)[1]:
            if self._stop.is_set() or time.monotonic() > until:
                return None
        found: list[tuple[str, int]] = []
        for one in asked:
            try:
                found.append(self._ray.get(one))
            except (faults.NodeDiedError, faults.ActorUnavailableError):
                return None
            except faults.RayError as fault:
                if "ModuleNotFoundError" not in str(fault) and "ImportError" not in str(fault):
                    return None
                raise ToolMissing(
                    "a node of the cluster cannot start dconv, nothing was written",
                    found=_last_line(fault),
                    do="install dconv on every node, or ray job submit --working-dir with its sources",
                ) from fault
        order = {node: number for number, node in enumerate(dict.fromkeys(node for node, _ in found))}
        both = sorted(zip(found, self._keepers, strict=True), key=lambda one: order[one[0][0]])
        self._keepers = [keeper for _, keeper in both]
        return [place for place, _ in both]

    def _variables(self, places: Sequence[tuple[str, int]]) -> list[dict[str, str]]:
        """The environment of each rank, as torchrun would set it."""
        from dconv.launch.history import VARIABLE
        from dconv.launch.place import LAUNCHED

        nodes = [node for node, _ in places]
        machines = list(dict.fromkeys(nodes))
        run = uuid.uuid4().hex
        common = {
            "WORLD_SIZE": str(len(places)),
            "MASTER_ADDR": addresses(self._ray).get(nodes[0], "127.0.0.1"),
            "MASTER_PORT": str(places[0][1]),
            LAUNCHED: str(time.time()),
            VARIABLE: "off",  # this process keeps the record
            **handed_on(),
            # A rank sees the GPUs that its actor was given, and no other one: of several each is number 0.
            **({} if self._gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        }
        return [
            {
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(nodes[:rank].count(node)),
                "LOCAL_WORLD_SIZE": str(nodes.count(node)),
                "GROUP_RANK": str(machines.index(node)),
                "GROUP_WORLD_SIZE": str(len(machines)),
                "DCONV_RUN": f"{run} {node}",
            }
            for rank, node in enumerate(nodes)
        ]

    def _ask(self, what: str, rank: int, *words: object) -> None:
        self._asked[getattr(self._keepers[rank], what).remote(*words)] = (what, rank)

    def _hear(self) -> None:
        """Take the answers that have come, and ask anew."""
        ready, _ = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=_TICK)
        for one in ready:
            what, rank = self._asked.pop(one, ("", 0))
            if rank in self._lost or not what:
                continue
            try:
                answer = self._ray.get(one)
                if what == "heard":
                    self._heard(rank, answer)
                    self._ask("heard", rank)
                else:
                    self._last_words(rank)
                    self._over(rank, answer)
            except self._ray.exceptions.RayError as fault:
                self._lose(rank, f"its actor: {type(fault).__name__}")
                self._ray.kill(self._keepers[rank])  # one that only cannot be reached must not go on for long

    def _last_words(self, rank: int) -> None:
        for one in [ref for ref, (_, of) in self._asked.items() if of == rank]:
            del self._asked[one]
            self._heard(rank, self._ray.get(one, timeout=_PATIENCE))
        self._heard(rank, self._ray.get(self._keepers[rank].heard.remote(), timeout=_PATIENCE))

    def _heard(self, rank: int, heard: Heard) -> None:
        if heard.note:
            self.notes.found[rank] = dict(heard.note)
        if self._told is None or any(self._codes.values()):
            self.said.hear(rank, heard)
        else:  # told to leave for no fault of its own: whether that is worth a word, this process will know
            self._held.setdefault(rank, []).append(heard)

    def _over(self, rank: int, code: int) -> None:
        if code < 0:
            self._lose(rank, f"signal {-code}")
        elif code == Preempted.exit_code:
            self._lose(rank, "it was told to stop")
        else:
            self._codes[rank] = code
            for heard in self._held.pop(rank, ()):
                self.said.hear(rank, heard)

    def _lose(self, rank: int, why: str) -> None:
        if rank in self._codes or rank in self._lost:
            return
        self._lost[rank] = why
        if self._told is None:
            rest = "all start again" if self._together else "the others go on"
            say(f"rank {rank} was lost ({why}); {rest}", sys.stderr)

    def _tell(self, seconds: float) -> None:
        """Tell the ranks to leave, once."""
        if self._told is None:
            self._told = time.monotonic() + seconds
            for rank in self._left():
                self._keepers[rank].stop.remote()


def _last_line(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return (lines[-1] if lines else type(fault).__name__)[:300]
