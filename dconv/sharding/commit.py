"""One rank's run of a plan, and the commit by whichever rank finds everything journaled.

Output grows in ``OUT.partial-<plan id>/``. No rank waits for another: each does its share, and the one that then
finds all tasks in the journal writes the closing files and the receipt under a lock, and renames. A directory
without a valid receipt is not a result.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dconv.errors import Damaged, DconvError, Preempted, Refused, StorageFault
from dconv.sharding.digest import ALGORITHMS, DEFAULT
from dconv.sharding.execute import Done, Outputs, run_tasks
from dconv.sharding.finish import STATE, aside_of, cannot, finish, finish_earlier, remove, sync_folders, write_synced
from dconv.sharding.journal import Flusher, Journal, Noted, sync_folder
from dconv.sharding.ops import Kernel
from dconv.sharding.plan import Plan, Task
from dconv.sharding.reader import BoxReader, ReadLog
from dconv.sharding.receipt import (
    RECEIPT,
    check_output,
    hash_bytes,
    is_result,
    is_whole,
    make_receipt,
    partial_folder,
    read_receipt,
    to_json,
    update_from_file,
)

#: Tasks that a committing rank looks at again before it asks the journal what the others did meanwhile.
_LOOK: Final = 8


@dataclass(frozen=True)
class Settings:
    """How to run; none of it changes an output byte.

    Attributes:
        max_memory: bytes that one rank's buffers may take.
        overwrite: replace an existing output at commit.
        resume: an output that this very plan already wrote counts as done.
        launched: when the ranks of this run were started (seconds since the epoch); an output of this plan that is
            newer was committed by another rank of the same run.
        progress: called with (bytes finished by this rank, bytes of its share).
        stop: set to leave after the tasks under way.
    """

    rank: int = 0
    world: int = 1
    max_memory: int = 256 << 20
    threads: int = 1
    overwrite: bool = False
    resume: bool = False
    launched: float = math.inf
    progress: Callable[[int, int], None] = lambda *_: None
    stop: threading.Event | None = None
    log: ReadLog | None = None
    about: Mapping[str, object] = field(default_factory=dict)
    algorithm: str = DEFAULT


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rank did.

    Attributes:
        committed: this rank wrote the receipt.
        complete: the output is there.
        written: bytes put into files (holes not counted).
        kept: bytes of this rank's share that an earlier run had finished.
    """

    committed: bool
    complete: bool
    share: int
    written: int
    kept: int


def run_rank(
    plan: Plan, out: Path, kernel: Kernel, settings: Settings, work: Callable[[Rank], None] | None = None
) -> Outcome:
    """Do this rank's share of the plan and commit if it was the last.

    Args:
        work: does the tasks in an order of its own (`Rank.do`), where the source comes into being on the way; returns
            when all that is this rank's to do is done. Without it the share is done in the plan's order.

    Raises:
        Preempted: ``stop`` was set before the share was done; what is finished is journaled.
        DconvError: bad input or storage; what is finished is journaled.
    """
    began = time.time()
    partial = partial_folder(out, plan)
    if check_output(plan, out, overwrite=settings.overwrite, resume=settings.resume, launched=settings.launched):
        remove(aside_of(out, partial))  # of a run that was killed before it came to that
        return Outcome(False, True, 0, 0, 0)
    tasks = plan.share(settings.rank, settings.world)
    share = sum(task.nbytes for task in tasks)
    with _locked(partial):
        # Looked at again: another process of this plan may have committed while this one waited for the lock.
        launched = min(settings.launched, began)
        if check_output(plan, out, overwrite=settings.overwrite, resume=settings.resume, launched=launched):
            return Outcome(False, True, share, 0, 0)
        earlier = read_receipt(partial)
        if earlier is not None and is_whole(plan, partial):  # killed between receipt and rename
            finish_earlier(out, partial, settings.overwrite, earlier)
            return Outcome(True, True, share, 0, share)
        outputs, journal = _open(partial, plan)
    run = Rank(plan, out, partial, kernel, settings, outputs, journal)
    try:
        if work:
            work(run)
            share, written, kept = run.share, run.written, run.share - run.written
        else:
            written, kept = run.do_share(tasks, share)
        committed = run.commit()
        complete = committed or not run.is_ours()
        if complete and not is_result(plan, out):
            raise StorageFault("the partial output went away while it was being written", where=str(partial))
        return Outcome(committed, complete, share, written, kept)
    except DconvError as error:
        if not run.is_ours() and is_result(plan, out):
            return Outcome(False, True, share, 0, 0)  # another process finished the same plan meanwhile
        fault = _source_fault(plan) or error
        if isinstance(fault, Damaged | Refused):
            run.abandon()
            raise fault from None
        raise
    finally:
        outputs.close()
        journal.close()


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Alone among the processes of one plan. The lock's file lies beside ``partial`` and goes when that goes."""
    path = partial.with_name(partial.name + ".lock")
    try:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _same(os.fstat(fd), path):
                break
            os.close(fd)  # whoever held it removed the file: the lock is now another file
    except OSError as fault:
        raise cannot("create the output", path, fault) from fault
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not partial.exists():
                path.unlink(missing_ok=True)
        os.close(fd)


def _same(seen: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(seen, os.stat(path))
    except FileNotFoundError:
        return False


def _open(partial: Path, plan: Plan) -> tuple[Outputs, Journal]:
    """The partial folder, made if need be. Both hold it open, so that a commit by another process moves them along."""
    folder = partial / STATE / "journal"
    fresh = not partial.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(partial.parent)
        sync_folder(partial)
        return Outputs(partial, plan), Journal(folder)
    except OSError as fault:
        if fresh:
            shutil.rmtree(partial, ignore_errors=True)
        raise cannot("create the output", partial, fault) from fault


def conclude(plan: Plan, out: Path, partial: Path, done: Mapping[int, str], settings: Settings) -> None:
    """From a partial folder with every task's bytes in it to a result: closing files, receipt, rename.

    Args:
        done: the digest of each task.
    """
    closing: dict[str, str] = {}
    for name, data in plan.target.closing():
        write_synced(partial / name, data)
        closing[name] = hash_bytes(data, settings.algorithm)
    sync_folders(partial)
    receipt = make_receipt(plan, done, closing, settings.algorithm, settings.about)
    write_synced(partial / RECEIPT, to_json(receipt))
    finish(out, partial, settings.overwrite)


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
        written: bytes put into files by `do`.
        share, finished: bytes that `do` will be asked for in all, and those that it is done with.
        reader: opens what reads the source, given its scratch buffer's size; None reads its files.
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

    @property
    def state(self) -> Path:
        """A folder for working state, which goes at the commit."""
        return self.partial / STATE

    def unfinished(self, tasks: Sequence[Task]) -> list[Task]:
        """Those that no run has finished; what earlier runs noted is looked at."""
        noted = self.journal.read()
        intact, spoilt = self._recheck([task for task in tasks if task.index in noted], noted)
        # Noted anew, so that this run's last rank need not look again. Nothing is taken back before it is looked at:
        # a kill during the check loses nothing.
        self.journal.append([Done(task, noted[task.index].digest, 0) for task in intact])
        self.journal.retract(spoilt)
        done = {task.index for task in intact}
        return [task for task in tasks if task.index not in done]

    def do(self, tasks: Sequence[Task]) -> None:
        """Do those of some tasks that no run has finished; when this returns they are on disk and noted.

        Raises:
            Preempted: ``stop`` was set.
        """
        left = self.unfinished(tasks)
        self.finished += sum(task.nbytes for task in tasks) - sum(task.nbytes for task in left)
        self.written += self._do(left, self.finished, self.share)
        self.finished += sum(task.nbytes for task in left)
        self.settings.progress(self.finished, self.share)

    def do_share(self, tasks: Sequence[Task], share: int) -> tuple[int, int]:
        """Do ``tasks``, less those that an earlier run finished: (bytes written, bytes kept)."""
        left = self.unfinished(tasks)
        kept = share - sum(task.nbytes for task in left)
        self.settings.progress(kept, share)
        return self._do(left, kept, share), kept

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

    def _do(self, tasks: Sequence[Task], finished: int, share: int) -> int:
        written = 0
        with Flusher(self.outputs, self.journal) as flush:

            def on_done(done: Done) -> None:
                nonlocal finished, written
                finished += done.task.nbytes
                written += done.written
                self.settings.progress(finished, share)
                flush(done)

            whole = run_tasks(
                self.plan,
                tasks,
                self.outputs,
                on_done,
                kernel=self.kernel,
                max_memory=self.settings.max_memory,
                threads=self.settings.threads,
                algorithm=self.settings.algorithm,
                stop=self.settings.stop,
                log=self.settings.log,
                reader=self.reader,
            )
        if not whole:
            raise self._preempted()
        return written

    def _preempted(self) -> Preempted:
        return Preempted(
            "stopped by a signal; what is finished is kept",
            where=str(self.partial),
            do="run the same command again (with --resume) to go on",
        )

    def is_ours(self) -> bool:
        """Whether the partial folder at its path is still the one that this process works in."""
        return _same(os.fstat(self.outputs.folder), self.partial)

    def commit(self) -> bool:
        """Commit if every task is journaled. True when this call did it.

        Lines of earlier runs count only after a second look at the bytes; the ranks of this run usually took it.
        """
        looked_at: set[int] = set()
        while True:
            noted = self.journal.read()
            if len(noted) < len(self.plan.tasks):
                return False  # another rank is still at work, or committed already
            old = [i for i, line in noted.items() if self._is_old(line) and i not in looked_at]
            if not old:
                break
            # From the end: the rank whose share this is goes from the start, and what it noted meanwhile drops out.
            some = [self.plan.tasks[i] for i in sorted(old)[-_LOOK:]]
            _, spoilt = self._recheck(some, noted)
            looked_at.update(task.index for task in some)
            if spoilt:
                self.journal.retract(spoilt)
                self._do(spoilt, 0, sum(task.nbytes for task in spoilt))
        with _locked(self.partial):
            if not self.is_ours():
                return False
            try:
                return self._commit_locked()
            except OSError as fault:
                raise cannot("commit", self.partial, fault) from fault

    def _is_old(self, line: Noted) -> bool:
        return line.journal != self.journal.name and line.opened < self.settings.launched

    def _commit_locked(self) -> bool:
        noted = self.journal.read()
        if len(noted) < len(self.plan.tasks):
            return False
        # Looked at here, too: it may have come while this run was at work.
        check_output(self.plan, self.out, overwrite=self.settings.overwrite, resume=False, launched=math.inf)
        if fault := _source_fault(self.plan):
            raise fault
        done = {task: line.digest for task, line in noted.items()}
        conclude(self.plan, self.out, self.partial, done, self.settings)
        return True

    def abandon(self) -> None:
        """Remove the partial folder: no run can bring such a plan to its end."""
        with _locked(self.partial):
            if self.is_ours():
                shutil.rmtree(self.partial, ignore_errors=True)


def _source_fault(plan: Plan) -> DconvError | None:
    """What is wrong with the source now that was not when it was planned."""
    if plan.source.reader is not None:  # no file that could change
        return None
    for name, stamp in plan.source.files.items():
        path = plan.source.root / name
        try:
            now = os.stat(path)
        except FileNotFoundError:
            found = "no such file any more"
        except OSError as fault:
            return StorageFault(f"cannot look at a source file: {fault.strerror}", where=str(path))
        else:
            if (now.st_size, now.st_mtime_ns, now.st_ino) == (stamp.size, stamp.mtime_ns, stamp.inode):
                continue
            found = f"{now.st_size} bytes" if now.st_size != stamp.size else "another time or inode"
        return Damaged(
            "a source file changed while it was being converted, nothing was committed",
            where=str(path),
            expected=f"{stamp.size} bytes, unchanged since the plan",
            found=found,
            do="run again when nothing writes to the source",
        )
    return None
