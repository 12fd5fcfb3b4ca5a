"""One process at work in an open partial folder: its share, what others leave undone, and what it notes."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Protocol

from dconv.errors import Preempted, StorageFault
from dconv.sharding.digest import ALGORITHMS, DEFAULT
from dconv.sharding.execute import Done, run_tasks
from dconv.sharding.finish import STATE
from dconv.sharding.journal import Flusher, Journal, Noted
from dconv.sharding.ops import Kernel
from dconv.sharding.outputs import Outputs
from dconv.sharding.plan import Plan, Task
from dconv.sharding.reader import BoxReader, ReadLog
from dconv.sharding.receipt import update_from_file
from dconv.sharding.staging import Stage
from dconv.sharding.stealing import Stealing
from dconv.sharding.transient import Tries
from dconv.sharding.tuning import Tuner

#: Tasks that a rank which is done looks at again before it asks the journal what the others did meanwhile.
_LOOK: Final = 8


class Watch(Protocol):
    """Is told what a rank does; in more than one thread."""

    def done(self, tasks: Sequence[Task]) -> None:
        """These are on disk, and come to the journal now."""
        ...

    def kept(self, tasks: Sequence[Task]) -> None:
        """These the journal has already, and their bytes are whole."""
        ...


@dataclass(frozen=True)
class Settings:
    """How to run; none of it changes an output byte.

    Attributes:
        max_memory: bytes that one rank's buffers may take.
        threads: that it works with; `dconv.sharding.tuning.AUTO` finds a number.
        overwrite: replace an existing output at commit.
        resume: an output that this very plan already wrote counts as done.
        launched: when the ranks of this run were started (seconds since the epoch); an output of this plan that is
            newer was committed by another rank of the same run.
        again: ranks of this run were lost, and are started once more: what they noted counts as an earlier run's.
        progress: called with (bytes finished by this rank, bytes of its share).
        stop: set to leave after the tasks under way.
        steal: after its share a rank goes on with what the others have not done, until all is done: for ranks that run
            at one time.
        meet: called once the partial folder is open, with its folder of working state; to make sure that all ranks
            work in the same one. What it raises ends the run.
        told: called with lines for a person, of what went wrong and was made good.
        committing: called by the rank that commits, just before.
        watch: told what this rank has done, before the journal is, and what it found done.
        stage_dir: on a disk of this machine, for copies of what is read (`dconv.sharding.staging`).
    """

    rank: int = 0
    world: int = 1
    max_memory: int = 256 << 20
    threads: int = 1
    overwrite: bool = False
    resume: bool = False
    launched: float = math.inf
    again: bool = False
    progress: Callable[[int, int], None] = lambda _finished, _share: None
    stop: threading.Event | None = None
    log: ReadLog | None = None
    about: Mapping[str, object] = field(default_factory=dict[str, object])
    algorithm: str = DEFAULT
    steal: bool = False
    meet: Callable[[Path], None] | None = None
    told: Callable[[str], None] = lambda _: None
    committing: Callable[[], None] = lambda: None
    watch: Watch | None = None
    stage_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rank did.

    Attributes:
        committed: this rank wrote the receipt.
        complete: the output is there.
        share: bytes that this rank was asked for.
        written: bytes put into files (holes not counted).
        kept: bytes of the output that earlier runs had finished; only the rank that commits knows.
    """

    committed: bool
    complete: bool
    share: int
    written: int
    kept: int


def hash_task(plan: Plan, outputs: Outputs, task: Task, algorithm: str) -> str:
    """The digest of a task's bytes as they are on disk."""
    stretches = [(task.offset, task.nbytes)]
    if task.tensor < 0:
        stretches = [(offset, len(data)) for offset, data in plan.target.files[task.file].literals]
    hasher = ALGORITHMS[algorithm]()
    fd = outputs.fd(task.file)
    try:
        for offset, nbytes in stretches:
            update_from_file(hasher, fd, offset, nbytes)
    except OSError as fault:
        raise StorageFault(f"cannot read back: {fault.strerror}", where=plan.target.files[task.file].path) from fault
    return hasher.hexdigest()


@dataclass
class Rank:
    """One process at work in an open partial folder.

    Attributes:
        written: bytes put into files.
        share, finished: bytes that this rank will be asked for in all, and those that it is done with.
        reader: opens what reads the source, given its scratch buffer's size; None reads its files.
        stage: has copies of these on this machine.
    """

    plan: Plan
    out: Path
    partial: Path
    kernel: Kernel
    settings: Settings
    outputs: Outputs
    journal: Journal
    written: int = 0
    share: int = 0
    finished: int = 0
    reader: Callable[[int], BoxReader] | None = None
    stage: Stage | None = None
    _stealing: Stealing | None = None

    @cached_property
    def _tuner(self) -> Tuner:
        return Tuner(self.settings.threads, self.settings.max_memory)

    @property
    def state(self) -> Path:
        """A folder for working state, which goes at the commit."""
        return self.partial / STATE

    def unfinished(self, tasks: Sequence[Task]) -> list[Task]:
        """Those that no run has finished; what earlier runs noted is looked at."""
        # Ranks of this run are at other tasks, and there are many of them.
        noted = self.journal.read(math.inf if self.settings.again else self.settings.launched)
        intact, spoilt = self._recheck([task for task in tasks if task.index in noted], noted)
        if self.settings.watch is not None:
            self.settings.watch.kept(intact)
        # Noted anew, so that this run's last rank need not look again. Nothing is taken back before it is looked at:
        # a kill during the check loses nothing.
        self.journal.keep(intact, noted)
        self.journal.retract(spoilt)
        done = {task.index for task in intact}
        return [task for task in tasks if task.index not in done]

    def do(self, tasks: Sequence[Task]) -> None:
        """Do those of some tasks that no run has finished; when this returns they are on disk and noted.

        The names of their files are on disk, too: whoever asks for some tasks before others goes on from here, and a
        later run may have nothing to make these of again.

        Raises:
            Preempted: ``stop`` was set.
        """
        left = self.unfinished(tasks)
        self.finished += sum(task.nbytes for task in tasks) - sum(task.nbytes for task in left)
        self._work_off(left)
        self.outputs.sync_names({task.file for task in tasks})
        self.settings.progress(self.finished, self.share)

    def do_share(self) -> None:
        """Do this rank's share, less what an earlier run finished; then help the others."""
        settings = self.settings
        tasks = self.plan.share(settings.rank, settings.world)
        self.share = sum(task.nbytes for task in tasks)
        left = self.unfinished(tasks)
        self.finished = self.share - sum(task.nbytes for task in left)
        settings.progress(self.finished, self.share)
        if not settings.steal or settings.world == 1:
            self._work_off(left)
            return
        self._stealing = Stealing(
            self.plan, self.state, self.journal.name, settings.launched, settings.rank, settings.world, self._tuner
        )
        self._work_off(left, self._stealing.is_taken)
        self._stealing.end_of_share()
        self._steal(self._stealing)
        settings.progress(self.finished, self.finished)

    def help_on(self) -> bool:
        """Go on where all ranks are done with their shares, and something is not; False if this rank does not help."""
        if self._stealing is None or not self.is_ours():
            return False
        self._stealing.doubt()
        self._steal(self._stealing)
        return True

    def _steal(self, stealing: Stealing) -> None:
        """Do what the other ranks have not, until all is done or one of them has committed."""
        waiting = self.settings.stop or threading.Event()
        while (tasks := stealing.next()) is not None:
            if waiting.is_set():
                raise self._preempted()
            if tasks:
                stealing.begin()
                self.journal.claim(tasks)
                self._work_off(tasks)
                stealing.end()
            else:
                waiting.wait(stealing.wait())

    def _recheck(self, tasks: Iterable[Task], noted: Mapping[int, Noted]) -> tuple[list[Task], list[Task]]:
        """Which journaled tasks still have the noted bytes on disk, and which do not."""
        intact: list[Task] = []
        spoilt: list[Task] = []
        for task in tasks:
            if self.settings.stop is not None and self.settings.stop.is_set():
                raise self._preempted()
            good = hash_task(self.plan, self.outputs, task, self.settings.algorithm) == noted[task.index].digest
            (intact if good else spoilt).append(task)
        return intact, spoilt

    def _work_off(self, tasks: Sequence[Task], skip: Callable[[Task], bool] = lambda _: False) -> None:
        """Do tasks, and those again whose error may pass; not those that are to be skipped when it comes to them."""
        tries = Tries(self.settings.told, self.settings.stop)
        while True:
            try:
                return self._work_off_once(tasks, skip)
            except StorageFault as fault:
                noted = self.journal.read().keys() - self.journal.doubtful
                left = [task for task in tasks if task.index not in noted]
                tries.failed(fault, progress=len(left) < len(tasks))
                tasks = left
                self.outputs.close_files()

    def _work_off_once(self, tasks: Sequence[Task], skip: Callable[[Task], bool]) -> None:
        last = time.monotonic()
        watch = self.settings.watch
        with Flusher(self.outputs, self.journal, watch.done if watch else None) as flush:

            def on_done(done: Done) -> None:
                nonlocal last
                self.finished += done.task.nbytes
                self.written += done.written
                self.settings.progress(self.finished, self.share)
                if self._stealing is not None:
                    self._stealing.took((now := time.monotonic()) - last)
                    last = now
                flush(done)

            whole = run_tasks(
                self.plan,
                tasks,
                self.outputs,
                on_done,
                kernel=self.kernel,
                max_memory=self.settings.max_memory,
                tuner=self._tuner,
                algorithm=self.settings.algorithm,
                stop=self.settings.stop,
                log=self.settings.log,
                reader=self.reader,
                skip=skip,
                stage=self.stage,
            )
        if not whole:
            raise self._preempted()

    def _preempted(self) -> Preempted:
        return Preempted(
            "stopped by a signal; what is finished is kept",
            where=str(self.partial),
            do="run the same command again (with --resume) to go on",
        )

    def is_ours(self) -> bool:
        """Whether the partial folder at its path is still the one that this process works in."""
        return same(os.fstat(self.outputs.folder), self.partial)

    def all_noted(self) -> Mapping[int, Noted] | None:
        """Every task's line, this rank's and all others'; None while one lacks.

        Lines of earlier runs count only after a second look at the bytes; the ranks of this run usually took it.
        """
        looked_at: set[int] = set()
        while True:
            noted = self.journal.read()
            if len(noted) < len(self.plan.tasks):
                return None
            old = [i for i, line in noted.items() if self._is_old(line) and i not in looked_at]
            if not old:
                return noted
            # From the end: the rank whose share this is goes from the start, and what it noted meanwhile drops out.
            some = [self.plan.tasks[i] for i in sorted(old)[-_LOOK:]]
            _, spoilt = self._recheck(some, noted)
            looked_at.update(task.index for task in some)
            if spoilt:
                self.journal.retract(spoilt)
                self._work_off(spoilt)

    def kept(self, noted: Mapping[int, Noted]) -> int:
        """Bytes of finished tasks that earlier runs did."""
        old = {index for index, line in noted.items() if line.kept or self._is_old(line)}
        return sum(task.nbytes for task in self.plan.tasks if task.index in old)

    def _is_old(self, line: Noted) -> bool:
        return line.journal != self.journal.name and line.opened < self.settings.launched


def same(seen: os.stat_result, path: Path) -> bool:
    """Whether what was seen is what lies at a path."""
    try:
        return os.path.samestat(seen, os.stat(path))
    except FileNotFoundError:
        return False
