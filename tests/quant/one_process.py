"""Ranks that calibrate, each a thread of this process; nothing is written."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dconv.calibrate import Calibrating
from dconv.calibrate_rank import calibration_of
from dconv.quant.network import Network
from dconv.quant.parts import Result
from dconv.quant.peers import Peers
from dconv.quant.ranks import Ranks, Told


class Threads:
    """Ranks that are threads: what they say to each other is added up last rank first."""

    def __init__(self, world: int) -> None:
        self._barrier, self._heap = threading.Barrier(world, timeout=60), [None] * world
        self.each = [_OfThread(self, rank, world) for rank in range(world)]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._heap[rank] = value
        self._barrier.wait()
        found = list(self._heap)
        self._barrier.wait()
        return found


@dataclass(frozen=True)
class _OfThread:
    hub: Threads
    rank: int
    world: int
    device: str = "cpu"
    stop: threading.Event = field(default_factory=threading.Event)

    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            parts = self.hub.exchange(self.rank, tensor.clone())[::-1]
            tensor.copy_(functools.reduce(torch.add, parts))

    def counts(self, numbers: list[int]) -> list[int]:
        return [sum(each) for each in zip(*self.hub.exchange(self.rank, numbers), strict=True)]

    def tell(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self.hub.exchange(self.rank, tensor.clone())[source])

    def least(self, number: int) -> int:
        return min(self.hub.exchange(self.rank, number))

    def any(self, sign: bool) -> bool:
        return any(self.hub.exchange(self.rank, sign))

    def hear(self) -> None:
        if self.stop.is_set():
            raise Told

    def leaving_together(self) -> Any:
        return Ranks.leaving_together(self)  # type: ignore[arg-type]

    def wait(self) -> None:
        self.hub.exchange(self.rank, None)

    def all_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.hub.exchange(self.rank, tensor))

    def exchange(self, rows: torch.Tensor, sent: Sequence[int], coming: Sequence[int]) -> torch.Tensor:
        found = [parts[self.rank] for parts in self.hub.exchange(self.rank, rows.split(list(sent)))]
        assert [len(part) for part in found] == list(coming)
        return torch.cat(found)

    def gather(self, said: Any) -> list[Any]:
        return self.hub.exchange(self.rank, said)

    def part(self, each: Sequence[Sequence[int]]) -> _OfThread:
        mine = next(members for members in each if self.rank in members)
        hub = Threads(len(mine)) if self.rank == mine[0] else None
        return self.hub.exchange(self.rank, hub)[mine[0]].each[list(mine).index(self.rank)]


@dataclass
class Noted:
    """What a rank's calibration came to: numbers and plain tensors by name, lines of the report."""

    chosen: dict[str, Any] = field(default_factory=dict)
    folded: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)


def calibrated(
    job: Calibrating, folder: Path, ranks: Any = None, threads: int = 1, ep: int = 1, room: int = 1 << 28
) -> Noted:
    """One rank's run; of the experts it has those that are its own."""
    ranks, noted = ranks or Ranks(), Noted()
    peers = Peers.of(ranks, ep, threads)
    net = Network(job.source.config, job.source.logical, "cpu", 1 << 26, peers, job.source.family)

    def keep(results: Mapping[str, Any]) -> None:
        noted.chosen |= {name: result.chosen for name, result in results.items() if isinstance(result, Result)}
        noted.folded |= {name: value for name, value in results.items() if isinstance(value, torch.Tensor)}

    try:
        noted.lines = calibration_of(job, net, ranks, peers, folder, room, threads, keep).run()
    finally:
        net.close()
    return noted


def calibrated_by(
    job: Calibrating, folder: Path, world: int, threads: int = 1, ep: int = 1, room: int = 1 << 28
) -> list[Noted]:
    """The runs of ``world`` ranks."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: calibrated(job, folder, rank, threads, ep, room), Threads(world).each))


def assert_same(one: Noted, ranks: Sequence[Noted], ep: int = 1) -> None:
    """Ranks have bit for bit what one has; where experts are divided, every expert's on as many ranks as the others."""
    for many in ranks:
        for name, chosen in many.chosen.items():
            for part in ("codes", "scales", "zeros", "groups", "error"):
                assert torch.equal(getattr(one.chosen[name], part), getattr(chosen, part)), name
        assert all(torch.equal(value, one.folded[name]) for name, value in many.folded.items())
        assert [line["weight"] for line in many.lines] == [line["weight"] for line in ranks[0].lines]
    held = Counter(name for many in ranks for name in (*many.chosen, *many.folded))
    experts = {name for name in held if ".experts." in name} if ep > 1 else set()
    assert held == {name: len(ranks) // (ep if name in experts else 1) for name in (*one.chosen, *one.folded)}
    assert {line["weight"] for line in ranks[0].lines} == one.chosen.keys()
