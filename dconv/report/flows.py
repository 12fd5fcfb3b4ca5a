"""Which bytes go from which source file through which rank to which target file, summed up from a plan."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Final

from dconv.quant.held import tasks_of
from dconv.sharding.derived import Derived
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.plan import Copy, Task
from dconv.sharding.tensor import Logical

if TYPE_CHECKING:
    from dconv.pipeline import Job

MADE: Final = "computed, from no file"
CHOSEN: Final = "numbers chosen by the calibration"

#: Bytes by (from, to).
Bands = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Flows:
    """A plan's bytes.

    Attributes:
        read: from source files to ranks; ``written``, from ranks to target files.
        ranks: by name, in order; those that have nothing to do among them.
    """

    read: Bands
    written: Bands
    ranks: tuple[str, ...]


@dataclass
class _Origins:
    """The files behind what pieces name as one."""

    logical: Logical
    known: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])

    def of(self, file: str) -> Mapping[str, float]:
        """Parts of 1 by file."""
        if file not in self.known:
            self.known[file] = {}  # a plan has no circles
            self.known[file] = self._found(file)
        return self.known[file]

    def _found(self, file: str) -> dict[str, float]:
        made = self.logical.derived.get(file)
        if made is not None and (weights := self._inputs(made)):
            whole = sum(weights.values())
            return {name: weight / whole for name, weight in weights.items()}
        if file in self.logical.held:
            return {CHOSEN: 1.0}
        return {file if file in self.logical.files and self.logical.reader is None else MADE: 1.0}

    def _inputs(self, made: Derived) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for array in made.inputs:
            for piece in array.pieces:
                nbytes = prod(piece.region.shape) * ITEMSIZE.get(piece.dtype, 1)
                for name, part in self.of(piece.file).items():
                    found[name] += nbytes * part
        return {name: weight for name, weight in found.items() if weight}


def flows_of(job: Job, world: int) -> Flows:
    """The bytes that each rank of a world reads and writes, by file, as planned; ranks that help others move some."""
    plan, origins = job.plan, _Origins(job.plan.source)
    names = tuple(f"rank {rank}" for rank in range(world))
    read: Counter[tuple[str, str]] = Counter()
    written: Counter[tuple[str, str]] = Counter()
    for name, tasks in zip(names, shares(job, world), strict=True):
        for task in tasks:
            written[name, plan.target.files[task.file].path] += task.nbytes
            for copy in plan.copies[task.tensor] if task.tensor >= 0 else ():
                part = copy.clip(task.region)
                if part is not None:
                    for file, nbytes in _by_file(part, origins):
                        read[file, name] += nbytes
    order = {file: i for i, file in enumerate(sorted(plan.source.files))}
    ranked = {name: i for i, name in enumerate(names)}
    return Flows(
        dict(sorted(read.items(), key=lambda one: (order.get(one[0][0], len(order)), ranked[one[0][1]]))),
        dict(written),
        names,
    )


def shares(job: Job, world: int) -> list[Sequence[Task]]:
    """The tasks of each rank. Those of calibrated weights are divided task by task (`dconv.calibrate_rank`)."""
    plan = job.plan
    if job.calibrating is None:
        return list(plan.shares(world))
    later = {index for found in tasks_of(plan).values() for index in found}
    plain = [[task for task in share if task.index not in later] for share in plan.shares(world)]
    return [
        sorted([*mine, *(plan.tasks[i] for i in later if i % world == rank)], key=lambda task: task.index)
        for rank, mine in enumerate(plain)
    ]


def _by_file(copy: Copy, origins: _Origins) -> Iterable[tuple[str, int]]:
    """A copy's bytes by file, which add up to `Copy.nbytes`."""
    each = copy.nbytes // (1 + len(copy.twins))
    for one in (copy, *copy.twins):
        left = each
        parts = list(origins.of(one.file).items())
        for file, part in parts[1:]:
            nbytes = min(int(each * part), left)
            left -= nbytes
            yield file, nbytes
        yield parts[0][0], left


def totals(bands: Bands, side: int) -> dict[str, int]:
    """Bytes of each node on a side (0 or 1) of some bands, in the order of their first band."""
    found: Counter[str] = Counter()
    for ends, nbytes in bands.items():
        found[ends[side]] += nbytes
    return dict(found)


def grouped(sums: Mapping[str, int], most: int, what: str) -> dict[str, str]:
    """What each node is shown as: itself, or one for all that follow where there are more than ``most``.

    Args:
        sums: bytes by node.
        most: nodes that are shown by themselves.
        what: they are, in the plural.
    """
    names = list(sums)
    if len(names) <= most:
        return {name: name for name in names}
    rest = names[most - 1 :]
    words = f"… and {len(rest):,} more {what}"
    return {name: name for name in names[: most - 1]} | dict.fromkeys(rest, words)


def merged(bands: Bands, left: Mapping[str, str], right: Mapping[str, str]) -> dict[tuple[str, str], int]:
    """Bands between nodes as they are shown."""
    found: Counter[tuple[str, str]] = Counter()
    for (a, b), nbytes in bands.items():
        found[left[a], right[b]] += nbytes
    return dict(found)
