"""Writing what each rank holds at its final offset, reading back what several wrote, and committing once."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dconv.checkpoint.memory import MemoryReader
from dconv.codec.kernels import apply
from dconv.errors import StorageFault
from dconv.live.ranks import Ranks
from dconv.live.shards import Places
from dconv.pipeline import Job, check_space
from dconv.sharding.commit import conclude
from dconv.sharding.execute import Done, run_tasks
from dconv.sharding.finish import cannot
from dconv.sharding.journal import sync_folder
from dconv.sharding.outputs import Outputs
from dconv.sharding.plan import Plan, Task
from dconv.sharding.rank import Outcome, Settings, hash_task
from dconv.sharding.receipt import check_output, partial_folder
from dconv.sharding.tuning import Tuner


def start(job: Job, settings: Settings) -> Path:
    """The partial folder, made by one rank when nothing is in the way.

    Raises:
        UsageError: the output exists, or is no place for one.
        StorageFault: there is no room, or the folder cannot be made.
    """
    out = job.request.output.absolute()
    check_output(job.plan, out, overwrite=settings.overwrite, resume=False, launched=math.inf)
    check_space(job.plan, out)
    partial = partial_folder(out, job.plan)
    try:
        partial.mkdir()
        try:
            sync_folder(partial.parent)
        except OSError:
            partial.rmdir()
            raise
    except OSError as fault:
        raise cannot("create the output", partial, fault) from fault
    return partial


def _writers(plan: Plan, holders: Mapping[str, Sequence[int]], world: int) -> list[list[int]]:
    """For each task the ranks that write it: one for each shard that has bytes of it, data-parallel ranks in turn."""
    found: list[list[int]] = []
    for task in plan.tasks:
        copies = plan.copies[task.tensor] if task.tensor >= 0 else ()
        files = dict.fromkeys(copy.file for copy in copies if copy.region.intersect(task.region) is not None)
        found.append([holders[file][task.index % len(holders[file])] for file in files] or [task.index % world])
    return found


def write(job: Job, partial: Path, shards: Places, settings: Settings, ranks: Ranks) -> Outcome:
    """Write what this rank holds, read back what several ranks wrote, and commit; all ranks call it.

    Args:
        job: what is written where.
        partial: the folder of `start`.
        shards: who holds what, and this rank's own.
        settings: memory, threads and the digest's algorithm.
        ranks: all of them; rank 0 commits.

    Raises:
        StorageFault: a rank cannot open the folder, or storage failed.
    """
    plan = job.plan
    holders = shards.holders
    if job.request.replicas == "first":  # copies that were not compared may differ: all bytes are of one
        holders = {file: held[:1] for file, held in holders.items()}
    writers = _writers(plan, holders, ranks.world)
    mine = [task for task, who in zip(plan.tasks, writers, strict=True) if ranks.rank in who]
    written, done = ranks.together(lambda: _write_own(plan, mine, partial, shards, settings))
    digests = {task: digest for each in done for task, digest in each.items() if digest}
    shared = [task for task in plan.tasks if task.index not in digests]
    again = shared[ranks.rank :: ranks.world]
    _, done = ranks.together(lambda: (None, _read_back(plan, again, partial, settings.algorithm)))
    digests |= {task: digest for each in done for task, digest in each.items()}
    out = job.request.output.absolute()
    ranks.together(lambda: (_commit(plan, out, partial, digests, settings) if ranks.rank == 0 else None, None))
    return Outcome(ranks.rank == 0, True, sum(task.nbytes for task in mine), written, 0)


def _write_own(
    plan: Plan, tasks: Sequence[Task], partial: Path, shards: Places, settings: Settings
) -> tuple[int, dict[int, str]]:
    """Write what this rank holds: the bytes written, and the digests of leaves that it holds all of."""
    finished: list[Done] = []
    at, share = 0, sum(task.nbytes for task in tasks)

    def on_done(done: Done) -> None:
        nonlocal at
        finished.append(done)
        at += done.task.nbytes
        settings.progress(at, share)

    with contextlib.closing(_outputs(plan, partial)) as outputs:
        run_tasks(
            plan,
            tasks,
            outputs,
            on_done,
            kernel=apply,
            max_memory=settings.max_memory,
            tuner=Tuner(settings.threads, settings.max_memory),
            algorithm=settings.algorithm,
            reader=lambda _: MemoryReader(shards.file, shards.memory),
        )
        outputs.sync(sorted({task.file for task in tasks}))
    return sum(done.written for done in finished), {done.task.index: done.digest for done in finished}


def _read_back(plan: Plan, tasks: Sequence[Task], partial: Path, algorithm: str) -> dict[int, str]:
    """The digests of leaves that several ranks wrote."""
    with contextlib.closing(_outputs(plan, partial)) as outputs:  # opened anew: a network file system looks again
        return {task.index: hash_task(plan, outputs, task, algorithm) for task in tasks}


def _outputs(plan: Plan, partial: Path) -> Outputs:
    try:
        return Outputs(partial, plan)
    except OSError as fault:
        raise StorageFault(
            f"a rank cannot open the output's folder: {fault.strerror}",
            where=f"{partial} on {os.uname().nodename}",
            expected="a file system that all ranks share",
        ) from fault


def _commit(plan: Plan, out: Path, partial: Path, digests: Mapping[int, str], settings: Settings) -> None:
    check_output(plan, out, overwrite=settings.overwrite, resume=False, launched=math.inf)  # it may have come meanwhile
    try:
        conclude(plan, out, partial, digests, settings)
    except OSError as fault:
        raise cannot("commit", partial, fault) from fault
