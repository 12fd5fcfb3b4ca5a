"""Bytes a second over time, by rank, from what the ranks have noted (`dconv.report.tracks`)."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from dconv.report.tracks import Point, Track

#: Stretches of time that a run is cut into, and how long one is at least (seconds): ranks note no more often.
_BINS: Final = 96
_SHORTEST: Final = 0.5


@dataclass(frozen=True)
class RankDid:
    """What a rank of this run did, its restarts together.

    Attributes:
        seconds: from the run's first note to this rank's last.
        kept: bytes of its share that an earlier run had done.
        host: machines that it ran on.
    """

    rank: int
    read: int
    written: int
    kept: int
    seconds: float
    host: str

    def to_dict(self) -> dict[str, Any]:
        """For the page's JSON."""
        return {key: getattr(self, key) for key in ("rank", "read", "written", "kept", "seconds", "host")}


def ranks_of(tracks: Sequence[Track]) -> list[RankDid]:
    """What each rank did."""
    began = min((track.began for track in tracks), default=0.0)
    found: list[RankDid] = []
    for rank, mine in _by_rank(tracks).items():
        found.append(
            RankDid(
                rank,
                sum(track.last.read for track in mine),
                sum(track.last.written for track in mine),
                mine[0].last.kept,
                max(track.last.at for track in mine) - began,
                ", ".join(dict.fromkeys(track.host for track in mine)),
            )
        )
    return found


def rates_of(tracks: Sequence[Track]) -> tuple[list[float], dict[int, list[tuple[float, float]]]]:
    """Ends of stretches of time (seconds since the run began), and by rank (read, written) in each in B/s."""
    began = min((track.began for track in tracks), default=0.0)
    ended = max((track.last.at for track in tracks), default=0.0)
    lasted = max(ended - began, 1e-3)
    count = max(1, min(_BINS, int(lasted / _SHORTEST)))
    step = lasted / count
    ends = [step * (i + 1) for i in range(count)]
    rates: dict[int, list[tuple[float, float]]] = {}
    for rank, mine in _by_rank(tracks).items():
        sums = [_sum([_at(track.points, began + at) for track in mine]) for at in (0.0, *ends)]
        rates[rank] = [((b[0] - a[0]) / step, (b[1] - a[1]) / step) for a, b in pairwise(sums)]
    return ends, rates


def _by_rank(tracks: Sequence[Track]) -> Mapping[int, list[Track]]:
    found: dict[int, list[Track]] = defaultdict(list)
    for track in tracks:
        found[track.rank].append(track)
    return dict(sorted(found.items()))


def _sum(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _at(points: Sequence[Point], at: float) -> tuple[float, float]:
    """Bytes read and written by a moment; between two notes as if they had come evenly."""
    i = bisect_right(points, at, key=lambda point: point.at)
    if i == 0:
        return 0.0, 0.0
    if i == len(points):
        return float(points[-1].read), float(points[-1].written)
    a, b = points[i - 1], points[i]
    part = (at - a.at) / (b.at - a.at) if b.at > a.at else 1.0
    return a.read + (b.read - a.read) * part, a.written + (b.written - a.written) * part
