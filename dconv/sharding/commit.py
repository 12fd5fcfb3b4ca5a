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
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from dconv.errors import Damaged, DconvError, Refused, StorageFault
from dconv.sharding.finish import STATE, aside_of, cannot, finish, finish_earlier, remove, sync_folders, write_synced
from dconv.sharding.journal import Journal, sync_folder
from dconv.sharding.ops import Kernel
from dconv.sharding.outputs import Outputs
from dconv.sharding.plan import Plan
from dconv.sharding.rank import Outcome, Rank, Settings, same
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
)
from dconv.sharding.staging import Stage


def run_rank(
    plan: Plan, out: Path, kernel: Kernel, settings: Settings, work: Callable[[Rank], None] | None = None
) -> Outcome:
    """Do this rank's share of the plan and commit if it was the last.

    Args:
        plan: the same on every rank.
        out: the output, which is renamed into its place when all is done.
        kernel: applies numeric ops to tiles.
        settings: which rank this is, its bounds, and what the receipt says of the run.
        work: does the tasks in an order of its own (`Rank.do`), where the source comes into being on the way; returns
            when all that is this rank's to do is done. Without it the share is done in the plan's order.

    Raises:
        Preempted: ``stop`` was set before the share was done; what is finished is journaled.
        DconvError: bad input or storage; what is finished is journaled.
    """
    began = time.time()
    partial = partial_folder(out, plan)
    if check_output(plan, out, overwrite=settings.overwrite, resume=settings.resume, launched=settings.launched):
        _tidy(out, partial)
        return Outcome(False, True, 0, 0, 0)
    share = sum(task.nbytes for task in plan.share(settings.rank, settings.world))
    with _locked(partial):
        # Looked at again: another process of this plan may have committed while this one waited for the lock.
        launched = min(settings.launched, began)
        if check_output(plan, out, overwrite=settings.overwrite, resume=settings.resume, launched=launched):
            return Outcome(False, True, share, 0, 0)
        earlier = read_receipt(partial)
        if earlier is not None and is_whole(plan, partial):  # killed between receipt and rename
            finish_earlier(out, partial, settings.overwrite, earlier)
            return Outcome(True, True, share, 0, plan.bytes_written)
        outputs, journal = _open(partial, plan)
    run = Rank(plan, out, partial, kernel, settings, outputs, journal)
    try:
        _begin(run)
        if work:
            work(run)
            share = run.share
        else:
            run.do_share()
        while (kept := commit(run)) is None and run.help_on():
            pass
        committed = kept is not None
        complete = committed or not run.is_ours()
        if complete and not committed and not is_result(plan, out):
            raise StorageFault("the partial output went away while it was being written", where=str(partial))
        if work and not complete:  # its ranks wait for each other, and what is missing now no rank will do
            raise StorageFault(
                "a part of what was written is no longer as it was, nothing was committed",
                where=str(partial),
                do="run the same command again (with --resume): it is done again",
            )
        return Outcome(committed, complete, share, run.written, kept or 0)
    except DconvError as error:
        if not run.is_ours() and is_result(plan, out):
            return Outcome(False, True, share, 0, 0)  # another process finished the same plan meanwhile
        fault = _source_fault(plan) or error
        if isinstance(fault, Damaged | Refused):
            _abandon(run)
            raise fault from None
        raise
    finally:
        if run.stage is not None:
            run.stage.close()
        outputs.close()
        journal.close()


def _tidy(out: Path, partial: Path) -> None:
    """Remove what a run left that was killed after its rename, before it came to that."""
    remove(aside_of(out, partial))
    if os.path.lexists(_lock_of(partial)):
        with _locked(partial):
            pass


def _lock_of(partial: Path) -> Path:
    return partial.with_name(partial.name + ".lock")


@contextlib.contextmanager
def _locked(partial: Path) -> Generator[None, None, None]:
    """Alone among the processes of one plan. The lock's file lies beside ``partial`` and goes when that goes."""
    path = _lock_of(partial)
    try:
        fd = _lock(path)
    except OSError as fault:
        raise cannot("create the output", path, fault) from fault
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not partial.exists():
                path.unlink(missing_ok=True)
        os.close(fd)


def _lock(path: Path) -> int:
    """The file of a lock, open and locked."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if same(os.fstat(fd), path):
                return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)  # whoever held it removed the file: the lock is now another file


def _open(partial: Path, plan: Plan) -> tuple[Outputs, Journal]:
    """The partial folder, made if need be. Both hold it open, so that a commit by another process moves them along."""
    folder = partial / STATE / "journal"
    fresh = not partial.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:  # whoever made it has flushed it: ranks come here one after the other
            sync_folder(partial.parent)
            sync_folder(partial)
        outputs = Outputs(partial, plan)
        try:
            return outputs, Journal(folder)
        except OSError:
            outputs.close()
            raise
    except OSError as fault:
        if fresh:
            shutil.rmtree(partial, ignore_errors=True)
        raise cannot("create the output", partial, fault) from fault


def conclude(plan: Plan, out: Path, partial: Path, done: Mapping[int, str], settings: Settings) -> None:
    """From a partial folder with every task's bytes in it to a result: closing files, receipt, rename.

    Args:
        plan: what was made.
        out: where the result goes.
        partial: the folder that becomes it.
        done: the digest of each task.
        settings: the run's; its digest and what the receipt says of it are taken.
    """
    closing: dict[str, str] = {}
    for name, data in plan.target.closing():
        write_synced(partial / name, data)
        closing[name] = hash_bytes(data, settings.algorithm)
    sync_folders(partial)
    receipt = make_receipt(plan, done, closing, settings.algorithm, settings.about)
    write_synced(partial / RECEIPT, to_json(receipt))
    finish(out, partial, settings.overwrite)


def commit(run: Rank) -> int | None:
    """Commit if every task is journaled: bytes that earlier runs had finished; None where this call did not do it."""
    # Ranks that help each other all come here at one time: whoever has the lock looks at the journals, the others wait.
    if not (run.is_ours() if run.settings.steal else run.all_noted() is not None):
        return None  # another rank is still at work, or committed already
    with _locked(run.partial):
        if not run.is_ours() or (noted := run.all_noted()) is None:
            return None
        try:
            # Looked at here, too: it may have come while this run was at work.
            check_output(run.plan, run.out, overwrite=run.settings.overwrite, resume=False, launched=math.inf)
            if fault := _source_fault(run.plan):
                raise fault
            run.settings.committing()
            done = {task: line.digest for task, line in noted.items()}
            conclude(run.plan, run.out, run.partial, done, run.settings)
        except OSError as fault:
            raise cannot("commit", run.partial, fault) from fault
    return run.kept(noted)


def _begin(run: Rank) -> None:
    """What is to be made sure of before the first byte."""
    settings, source = run.settings, run.plan.source
    try:
        if settings.meet:
            settings.meet(run.state)
        if settings.stage_dir is not None and source.reader is None:
            run.stage = Stage(settings.stage_dir, run.plan.id, source.files, settings.told)
    except DconvError:
        if not run.journal.read():  # nothing that a later run could go on with
            _abandon(run)
        raise


def _abandon(run: Rank) -> None:
    """Remove the partial folder: no run can bring such a plan to its end."""
    with _locked(run.partial):
        if run.is_ours():
            shutil.rmtree(run.partial, ignore_errors=True)


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
