"""The conversions of a batch on a Ray cluster: each where there is room for it, with all its ranks on one node."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Final

from dconv.errors import Preempted
from dconv.launch.batch import Attempt, Job
from dconv.launch.process import say
from dconv.launch.ray_cluster import Share, handed_on, reached, share_of
from dconv.launch.ray_keeper import CALLS, Heard, Keeper

#: Conversions that wait or run at a time; this process has a thread for each.
MOST: Final = 256
#: Of a process that SIGKILL ended: so an actor or its node counts that is lost, and is tried again.
_KILLED: Final = 128 + 9
#: Seconds for the last words of one.
_PATIENCE: Final = 30.0


@contextlib.contextmanager
def cluster(address: str | None, cpus: float | None, gpus: float | None) -> Generator[Cluster]:
    """A cluster that is reached.

    Raises:
        ToolMissing: see `dconv.launch.ray_cluster.reached`.
        UsageError: a rank that asks for nothing.
    """
    share = share_of(cpus, gpus)
    with reached(address, lambda error: say(error, sys.stderr)) as ray:
        yield Cluster(ray, share)


class Cluster:
    """A `dconv.launch.batch.Runner`: Ray queues what it has no room for yet."""

    def __init__(self, ray: Any, share: Share) -> None:
        self._ray, self._share = ray, share

    def start(self, job: Job, words: Sequence[str]) -> Attempt:
        """See `dconv.launch.batch.Runner`."""
        return _Kept(self._ray, self._share.times(job.ranks), words)


class _Kept:
    """One conversion, and its actor."""

    def __init__(self, ray: Any, share: Share, words: Sequence[str]) -> None:
        self._ray, self._told = ray, False
        self._keeper = ray.remote(Keeper).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_concurrency=CALLS, max_restarts=0
        ).remote()  # fmt: skip
        self._here = self._keeper.where.remote()
        variables = handed_on() | ({} if share.gpus else {"CUDA_VISIBLE_DEVICES": ""})
        self._run = self._keeper.run.remote("dconv", list(words), str(Path.cwd()), variables)

    def stop(self) -> None:
        self._told = True
        if self._ray.wait([self._here], timeout=0)[0]:
            self._keeper.stop.remote()
        else:  # it waits for room, and hears nothing
            self.kill()

    def kill(self) -> None:
        self._ray.kill(self._keeper)

    def ended(self, seconds: float) -> tuple[int, str, str] | None:
        if not self._ray.wait([self._run], timeout=seconds)[0]:
            return None
        try:
            code: int = self._ray.get(self._run)
            heard: Heard = self._ray.get(self._keeper.heard.remote(), timeout=_PATIENCE)
        except self._ray.exceptions.RayError as fault:
            said = str(fault).strip().partition("\n")[0]
            return (Preempted.exit_code if self._told else _KILLED), "", said
        finally:
            self.kill()  # its cores are free for the next one
        return 128 - code if code < 0 else code, heard.out, heard.err
