"""``--launcher ray``: an actor for each rank, and this process, which outlives them.

Relayout needs no communication, so that a lost rank stops no other one, and the others do what it has left. What they
cannot do is done by another start, with as many ranks as the cluster has room for then: any number resumes any plan.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

from dconv.errors import DconvError, Preempted, StorageFault, ToolMissing
from dconv.launch import worker
from dconv.launch.display import Display
from dconv.launch.history import Record
from dconv.launch.options import target, to_request
from dconv.launch.place import Place
from dconv.launch.process import Stop, Stopped, preempted, say
from dconv.launch.ray_cluster import Share, places, reached, room, share_of
from dconv.launch.ray_ranks import Ended, Ranks
from dconv.pipeline import Job
from dconv.request import CALIBRATED
from dconv.sharding.receipt import check_output, is_result

#: Starts after the first one, where nothing else is said.
_RESTARTS: Final = 3
#: Seconds that a first start waits for its places: others may be using the cluster.
_QUEUE: Final = 600.0
#: Seconds that one waits which the cluster, as it is, has no room for: it may be growing.
_GROWING: Final = 30.0
#: Seconds after which waiting is said.
_QUIET: Final = 5.0


def run(args: argparse.Namespace, words: Sequence[str], record: Record) -> int:
    """Run ``python -m dconv.launch`` with ``words`` on a Ray cluster; returns the conversion's exit code."""
    stop = Stop()
    here = Place(0, 1, 0, math.inf, record)
    try:
        share = share_of(args.cpus_per_rank, args.gpus_per_rank)
        with stop.planning(0.0, lambda: worker.report(preempted(), args.json)):
            job = _planned(args)
        if job is not None:
            plan = job.plan
            record.note(
                plan=plan.id, family=job.family.name, bytes_read=plan.bytes_read, bytes_written=plan.bytes_written
            )
        out, directory = sys.stdout, str(Path.cwd())  # a job's may be unpacked anew under its feet
        with reached(args.address, lambda error: record.end(worker.failed(error, args, here))) as ray:
            return _Driver(ray, args, words, share, job, stop, out, directory).run()
    except Stopped:
        worker.report(preempted(), args.json)
        return Preempted.exit_code
    except (DconvError, OSError, MemoryError) as fault:
        return worker.failed(fault, args, here)


def _planned(args: argparse.Namespace) -> Job | None:
    """The plan, so that what is refused is refused before an actor is started; None where only the nodes can tell.

    Raises:
        DconvError: see `dconv.launch.worker.planned`.
    """
    if not args.model.exists():
        return None
    if target(args) is not None:
        from dconv.launch import compiling

        compiling.prepare(args)
        return None
    job = worker.planned(args)
    check_output(job.plan, job.request.output, overwrite=args.overwrite, resume=args.resume, launched=math.inf)
    return job


class _Driver:
    """Starts ranks until the output is there."""

    def __init__(
        self, ray: Any, args: argparse.Namespace, words: Sequence[str], share: Share, job: Job | None, stop: Stop,
        out: TextIO, directory: str,
    ) -> None:  # fmt: skip
        self._ray, self._args, self._words, self._share = ray, args, words, share
        self._job, self._stop, self._out, self._directory = job, stop, out, directory
        self._together = job.calibrating is not None if job else args.format in CALIBRATED

    def run(self) -> int:
        """The exit code of the conversion.

        Raises:
            Preempted: it was stopped, or ranks were lost too often.
            StorageFault: the ranks have ended well, and there is no output.
            ToolMissing: the cluster has no room for one rank.
        """
        most = _RESTARTS if self._args.max_restarts is None else max(self._args.max_restarts, 0)
        ended = self._start(again=False)
        restarts = 0
        while not self._is_over(ended):
            if self._stop.is_set():
                raise self._preempted("stopped by a signal; what is finished is kept")
            if restarts == most:
                raise self._fault(ended, most)
            restarts += 1
            say(f"not all is done: the ranks start again ({restarts} of {most})", sys.stderr)
            ended = self._start(again=True)
        return ended.code

    def _fault(self, ended: Ended, restarts: int) -> DconvError:
        """What is wrong where so many starts have not sufficed."""
        if not ended.lost:
            return StorageFault(
                "all ranks have done their share, and the output is not there",
                where=str(to_request(self._args).output),
                do="put OUT where all nodes see the same files; the nodes write to one file system",
            )
        return self._preempted(f"ranks were lost in {restarts + 1} starts; what is finished is kept")

    def _is_over(self, ended: Ended) -> bool:
        if ended.code:
            return True
        whole = self._is_whole()
        if not ended.lost:
            return whole is not False
        # The one that commits prints the result, after it has verified it.
        said = ended.result or (self._args.quiet and not self._args.json and self._args.verify == "none")
        return said and whole is not False

    def _is_whole(self) -> bool | None:
        """Whether the output is there; None where this process cannot see it."""
        out = to_request(self._args).output
        if self._job is None or not out.parent.is_dir():
            return None
        return is_result(self._job.plan, out)

    def _start(self, *, again: bool) -> Ended:
        """Start ranks, as many as have room, and stay until they have ended."""
        words = [*self._words, *(["--resume"] if again and not self._args.resume else [])]
        fits = room(self._ray, self._share)
        count = self._args.nproc if not again else max(1, min(self._args.nproc, fits))
        while not self._stop.is_set():
            patience = _QUEUE if fits >= count and not again else _GROWING
            waiting = threading.Timer(_QUIET, self._waits, (count,))
            waiting.start()
            with places(self._ray, self._share, count, patience, partial(self._has_no_use, again, count)) as group:
                waiting.cancel()
                if group is not None:
                    return self._ranks(group, count, words)
            fits = room(self._ray, self._share)
            if count == 1 or not fits:
                break
            count = fits if fits < count else max(1, count // 2)
            say(f"the cluster has room for {count} of {self._args.nproc} ranks: they do it all", sys.stderr)
        if self._stop.is_set():
            raise self._preempted("stopped by a signal; what is finished is kept")
        if again:
            raise self._preempted("the cluster has no room left for a rank; what is finished is kept")
        raise ToolMissing(
            "the Ray cluster has no room for a rank, nothing was written",
            expected=f"{self._share.words} on one node",
            found=f"{_total(self._ray) or 'nothing'} in all" + (", in use by others" if fits else ""),
            do="--cpus-per-rank, --gpus-per-rank; or another --address",
        )

    def _has_no_use(self, again: bool, count: int) -> bool:
        """Whether there is no use in waiting for so many places; a lost node is known to be lost after a while."""
        return self._stop.is_set() or (again and room(self._ray, self._share) < count)

    def _waits(self, count: int) -> None:
        ranks = f"each of {count} ranks" if count > 1 else "a rank"
        say(f"waiting for room on the Ray cluster: {self._share.words} for {ranks}", sys.stderr)

    def _ranks(self, group: Any, count: int, words: Sequence[str]) -> Ended:
        ranks = Ranks(
            self._ray, group, self._share, count, self._stop, self._out, together=self._together and count > 1
        )
        try:
            with contextlib.ExitStack() as stack:
                if self._job is not None and not self._args.quiet and not self._args.json:
                    stack.enter_context(Display(ranks.notes, self._job.plan.bytes_written, count))
                return ranks.run(words, self._directory)
        finally:
            ranks.close()

    def _preempted(self, what: str) -> Preempted:
        return Preempted(what, where=str(to_request(self._args).output),
                         do="run the same command again (with --resume) to go on")  # fmt: skip


def _total(ray: Any) -> str:
    found = ray.cluster_resources()
    return ", ".join(f"{name} {found[name]:g}" for name in ("CPU", "GPU") if found.get(name))
