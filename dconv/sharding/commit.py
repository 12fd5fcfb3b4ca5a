"""One rank's run of a plan, and the commit by whichever rank finds everything journaled.

Output grows in ``OUT.partial-<plan id>/``. No rank waits for another: each does its share, and the one that then
finds all tasks in the journal writes the closing files and the receipt under a lock, and renames. A directory
without a valid receipt is not a result.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dconv.errors import Damaged, Preempted, StorageFault, UsageError
from dconv.sharding.digest import ALGORITHMS, DEFAULT, tree
from dconv.sharding.execute import Done, Outputs, run_tasks
from dconv.sharding.journal import Flusher, Journal, sync_folder
from dconv.sharding.ops import Kernel
from dconv.sharding.plan import Plan, Task
from dconv.sharding.reader import ReadLog

RECEIPT: Final = "dconv.json"
_STATE: Final = ".dconv"
_READ: Final = 1 << 20


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


def partial_folder(out: Path, plan: Plan) -> Path:
    return out.with_name(f"{out.name}.partial-{plan.id}")


def read_receipt(folder: Path) -> dict[str, object] | None:
    """The receipt of a finished output, or None when there is none that parses."""
    try:
        receipt = json.loads((folder / RECEIPT).read_bytes())
    except (OSError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) and "plan" in receipt else None


def check_output(plan: Plan, out: Path, *, overwrite: bool, resume: bool, launched: float) -> bool:
    """True when the output is already there and complete: by an earlier run if ``resume``, else by a faster rank.

    Raises:
        UsageError: something else is there and may not be replaced.
    """
    if not os.path.lexists(out):
        return False
    receipt = read_receipt(out)
    if receipt is not None and receipt["plan"] == plan.id:
        finished = receipt.get("finished")
        if resume or (isinstance(finished, float) and finished >= launched):
            return True
    if overwrite:
        return False
    what = "a finished dconv output" if receipt is not None else "something without a dconv receipt"
    raise UsageError(
        "the output exists, nothing was written",
        where=str(out),
        found=what,
        do="name another -o, or --overwrite replaces it once the new one is whole",
    )


def run_rank(plan: Plan, out: Path, kernel: Kernel, settings: Settings) -> Outcome:
    """Do this rank's share of the plan and commit if it was the last.

    Raises:
        Preempted: ``stop`` was set before the share was done; what is finished is journaled.
        DconvError: bad input or storage; what is finished is journaled.
    """
    if check_output(plan, out, overwrite=settings.overwrite, resume=settings.resume, launched=settings.launched):
        return Outcome(False, True, 0, 0, 0)
    partial = partial_folder(out, plan)
    tasks = plan.share(settings.rank, settings.world)
    share = sum(task.nbytes for task in tasks)
    if read_receipt(partial) is not None:  # killed between receipt and rename
        return Outcome(_commit(plan, out, partial, settings), True, share, 0, share)
    journal = _open_journal(partial)
    outputs = Outputs(partial, plan)
    finished = written = 0

    def count(done: Done) -> None:
        nonlocal finished, written
        finished += done.task.nbytes
        written += done.written
        settings.progress(finished, share)

    try:
        kept = _recheck(tasks, journal, outputs, settings.algorithm)
        journal.append(list(kept.values()))
        finished = kept_bytes = sum(done.task.nbytes for done in kept.values())
        settings.progress(finished, share)
        with Flusher(outputs, journal) as flush:

            def on_done(done: Done) -> None:
                count(done)
                flush(done)

            whole = run_tasks(
                plan,
                [task for task in tasks if task.index not in kept],
                outputs,
                on_done,
                kernel=kernel,
                max_memory=settings.max_memory,
                threads=settings.threads,
                algorithm=settings.algorithm,
                stop=settings.stop,
                log=settings.log,
            )
    finally:
        outputs.close()
        journal.close()
    if not whole:
        raise Preempted(
            "stopped by a signal; what is finished is kept",
            where=str(partial),
            do="run the same command again (with --resume) to go on",
        )
    committed = _commit(plan, out, partial, settings)
    return Outcome(committed, committed or not partial.exists(), share, written, kept_bytes)


def _open_journal(partial: Path) -> Journal:
    folder = partial / _STATE / "journal"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(partial.parent)
        sync_folder(partial)
    except OSError as fault:
        raise StorageFault(f"cannot create the output: {fault.strerror}", where=str(partial)) from fault
    return Journal(folder)


def _recheck(tasks: tuple[Task, ...], journal: Journal, outputs: Outputs, algorithm: str) -> dict[int, Done]:
    """Tasks of this share that an earlier run journaled and whose bytes on disk still have the noted digest."""
    earlier = journal.take_back({task.index for task in tasks})
    kept: dict[int, Done] = {}
    for task in tasks:
        digest = earlier.get(task.index)
        if digest is not None and task.tensor >= 0 and _leaf(outputs, task, algorithm) == digest:
            kept[task.index] = Done(task, digest, 0)
    return kept


def _leaf(outputs: Outputs, task: Task, algorithm: str) -> str:
    return hash_stretch(outputs.fd(task.file), task.offset, task.nbytes, algorithm)


def hash_stretch(fd: int, offset: int, nbytes: int, algorithm: str) -> str:
    """The digest of a stretch of an open file; shorter files give another digest than the whole would."""
    hasher = ALGORITHMS[algorithm]()
    end = offset + nbytes
    while offset < end:
        data = os.pread(fd, min(_READ, end - offset), offset)
        if not data:
            break
        hasher.update(data)
        offset += len(data)
    return hasher.hexdigest()


def _commit(plan: Plan, out: Path, partial: Path, settings: Settings) -> bool:
    """Commit if every task is journaled. True when this call did it."""
    lock_path = partial.with_name(partial.name + ".lock")
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _commit_locked(plan, out, partial, settings)
        finally:
            if not partial.exists():
                lock_path.unlink(missing_ok=True)
            os.close(lock)
    except OSError as fault:
        raise StorageFault(f"cannot commit: {fault.strerror}", where=str(partial)) from fault


def _commit_locked(plan: Plan, out: Path, partial: Path, settings: Settings) -> bool:
    if not partial.exists():  # another rank did
        return False
    if read_receipt(partial) is None:
        done = Journal(partial / _STATE / "journal").read()
        if len(done) < len(plan.tasks):
            elsewhere = read_receipt(out)
            if not done and elsewhere is not None and elsewhere["plan"] == plan.id:
                shutil.rmtree(partial)  # this rank had nothing to do and came after the commit
            return False
        _check_sources(plan)
        _close(plan, partial, done, settings)
    # The journal goes after the receipt is safe and before the rename, so that OUT never holds working state.
    shutil.rmtree(partial / _STATE, ignore_errors=True)
    _rename(out, partial, settings.overwrite)
    return True


def _check_sources(plan: Plan) -> None:
    for name, stamp in plan.source.files.items():
        now = os.stat(plan.source.root / name)
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (stamp.size, stamp.mtime_ns, stamp.inode):
            raise Damaged(
                "a source file changed while it was being converted, the output was not committed",
                where=str(plan.source.root / name),
                do="run again when nothing writes to the source",
            )


def _close(plan: Plan, partial: Path, done: dict[int, str], settings: Settings) -> None:
    for name, data in plan.target.closing():
        _write_synced(partial / name, data)
    _write_synced(partial / RECEIPT, json.dumps(receipt(plan, done, settings), indent=1).encode() + b"\n")
    for folder, _, _ in os.walk(partial):
        sync_folder(Path(folder))


def receipt(plan: Plan, done: Mapping[int, str], settings: Settings) -> dict[str, object]:
    """What was made, by which plan, with a digest for every tensor and every file's framing."""
    leaves: dict[int, list[str]] = {}
    frames: dict[str, str] = {}
    for task in plan.tasks:
        if task.tensor < 0:
            frames[plan.target.files[task.file].path] = done[task.index]
        else:
            leaves.setdefault(task.tensor, []).append(done[task.index])
    tensors = {
        tensor.key: {
            "file": tensor.file,
            "offset": tensor.offset,
            "dtype": tensor.spec.dtype,
            "shape": list(tensor.spec.shape),
            "digest": tree(settings.algorithm, leaves.get(i, [])),
        }
        for i, tensor in enumerate(plan.target.tensors)
    }
    sources = {name: stamp.size for name, stamp in sorted(plan.source.files.items())}
    return {
        "plan": plan.id,
        **settings.about,
        "finished": time.time(),
        "digest": settings.algorithm,
        "left_out": plan.target.left_out or {},
        "source_files": sources,
        "frames": frames,
        "tensors": tensors,
    }


def _write_synced(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(out: Path, partial: Path, overwrite: bool) -> None:
    aside = out.with_name(f"{out.name}.replaced-{partial.name.rpartition('-')[2]}")
    if overwrite and os.path.lexists(out):
        os.rename(out, aside)
    os.rename(partial, out)
    sync_folder(out.parent)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    elif os.path.lexists(aside):
        os.unlink(aside)
