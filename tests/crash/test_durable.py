"""What a run calls finished survives a power cut: lines, receipts and names come after the sync of what they mean."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dconv.arch.registry import by_name
from dconv.errors import StorageFault, UsageError
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.models import config_of, tensors, tree_digest, write_random

LLAMA = by_name("llama")
CONTAINERS = ("hf", "legacy", "torch_dist")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", LLAMA, config_of(LLAMA), shard_size=30_000)


def job_of(model: Path, container: str) -> Job:
    out = model.parent / "out"
    if container == "hf":
        return prepare(Request(model, "hf", out, shard_size=20_000))
    parallel = Parallel(tp=2, pp=2, etp=2)
    return prepare(Request(model, "megatron", out, parallel=parallel, megatron_format=container, divisor=8))


@dataclass(frozen=True)
class Event:
    """A call that ended. ``began`` and ``ended`` number the beginnings and ends of all calls in one order."""

    call: str
    inode: int
    path: str
    began: int
    ended: int
    start: int = 0
    data: bytes = b""


class Log:
    """Every call that changes a disk, in order, by the inode of its file (of the directory for a new name)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._count = 0
        self._lock = threading.Lock()
        self._real = {name: getattr(os, name) for name in ("fsync", "write", "pwrite", "open", "mkdir", "rename")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def _tick(self) -> int:
        with self._lock:
            self._count += 1
            return self._count

    def _call(self, name: str, *args: Any, about: Callable[[Any], tuple[Any, ...]], **kwargs: Any) -> Any:
        began = self._tick()
        result = self._real[name](*args, **kwargs)
        inode, path, *more = about(result)
        self.events.append(Event(name, inode, path, began, self._tick(), *more))
        return result

    @staticmethod
    def _of(fd: int) -> tuple[int, str]:
        return os.fstat(fd).st_ino, os.readlink(f"/proc/self/fd/{fd}")

    def fsync(self, fd: int) -> None:
        self._call("fsync", fd, about=lambda _: self._of(fd))

    def write(self, fd: int, data: bytes) -> int:
        return self._call("write", fd, data, about=lambda n: (*self._of(fd), 0, bytes(data[:n])))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return self._call("pwrite", fd, data, offset, about=lambda n: (*self._of(fd), offset, bytes(data[:n])))

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & os.O_CREAT:
            return self._real["open"](path, flags, mode, dir_fd=dir_fd)
        return self._call("open", path, flags, mode, dir_fd=dir_fd, about=lambda fd: self._parent(self._of(fd)[1]))

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        folder = Path() if dir_fd is None else Path(self._of(dir_fd)[1])
        self._call("mkdir", path, mode, dir_fd=dir_fd, about=lambda _: self._parent(str(folder / path)))

    def rename(self, source: Any, target: Any) -> None:
        self._call("rename", source, target, about=lambda _: (os.stat(target).st_ino, str(target)))

    @staticmethod
    def _parent(path: str) -> tuple[int, str]:
        return os.stat(os.path.dirname(path)).st_ino, path

    def about(self, inode: int, *calls: str) -> list[Event]:
        return [event for event in self.events if event.inode == inode and event.call in calls]

    def synced(self, inode: int, after: int, before: int) -> bool:
        """Whether a sync began after one moment and ended before another."""
        return any(after < event.began and event.ended < before for event in self.about(inode, "fsync"))

    def is_safe(self, path: Path, before: int) -> bool:
        """Whether what was ever put into a file or directory until a moment was synced by then."""
        inode = path.stat().st_ino
        put = [e for e in self.about(inode, "open", "mkdir", "write", "pwrite") if e.began < before]
        return self.synced(inode, max((e.ended for e in put), default=0), before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_is_said_before_it_is_on_disk(
    model: Path, container: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model, container)
    out = job.request.output
    with monkeypatch.context() as patch:
        log = Log(patch)
        assert run(job, Settings(threads=threads, max_memory=1 << 20)).committed
    check_journal(job, log)
    (rename,) = [event for event in log.events if event.call == "rename"]
    assert rename.path == str(out)
    # a receipt in a partial output is taken for the end of the work: all else must be safe before it is begun
    receipt = out / "dconv.json"
    said = min(event.began for event in log.about(receipt.stat().st_ino, "write"))
    everything = [out, *out.rglob("*")]
    assert len(everything) > 4
    for path in everything:
        assert log.is_safe(path, rename.began), f"{path} when the output got its name"
        if path not in (out, receipt):
            assert log.is_safe(path, said), f"{path} when the receipt was written"
    parent = out.parent.stat().st_ino
    assert log.synced(parent, rename.ended, log.events[-1].ended + 1), "the output's own name"


def check_journal(job: Job, log: Log) -> None:
    """Every task is noted, and no line was begun before a sync that began after the last byte that it is about."""
    lines = [e for e in log.events if e.call == "write" and "/.dconv/journal/" in e.path]
    inodes = {file.path: (job.request.output / file.path).stat().st_ino for file in job.plan.target.files}
    noted: set[int] = set()
    for event in lines:
        for line in event.data.decode().splitlines():
            word, index, *_ = line.split()
            assert word == "done"
            task = job.plan.tasks[int(index)]
            file = job.plan.target.files[task.file]
            stretches = [(task.offset, task.nbytes)]
            if task.tensor < 0:
                stretches = [(offset, len(data)) for offset, data in file.literals]
            put = [
                e
                for e in log.about(inodes[file.path], "pwrite")
                if any(e.start < offset + n and offset < e.start + len(e.data) for offset, n in stretches)
            ]
            assert put, line
            last = max(e.ended for e in put)
            assert log.synced(inodes[file.path], last, event.began), line
            noted.add(task.index)
        assert log.synced(event.inode, event.ended, log.events[-1].ended), "the journal itself"
    assert noted == {task.index for task in job.plan.tasks}


FAULTS: dict[str, Callable[[str], bool]] = {
    "data": lambda path: path.endswith((".safetensors", ".pt", ".distcp")),
    "journal": lambda path: "/.dconv/journal/" in path,
    "closing file": lambda path: path.endswith("config.json"),
    "receipt": lambda path: path.endswith("dconv.json"),
    "folder": lambda path: ".partial-" in os.path.basename(path) and not path.endswith(".lock"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_disk_that_cannot_flush(model: Path, container: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 5 and no output; what was to be flushed is not noted as finished, and a later run makes it."""
    job = job_of(model, container)
    out = job.request.output
    real = os.fsync
    failed: list[str] = []

    def fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if FAULTS[fault](path) and (not failed or path in failed):
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageFault) as caught:
            run(job, Settings())
    assert failed
    assert caught.value.exit_code == 5
    assert os.strerror(errno.EIO) in str(caught.value)
    assert not out.exists()
    if fault == "data":
        assert not {job.plan.tasks[index].file for index in journaled(out)} & {
            i for i, file in enumerate(job.plan.target.files) if failed[0].endswith(f"/{file.path}")
        }
    assert run(job, Settings(resume=True)).committed
    made = tree_digest(out)
    assert [path.name for path in out.parent.iterdir() if path.name not in ("model", "out")] == []
    assert run(job, Settings(overwrite=True)).committed
    assert tree_digest(out) == made
    if container == "hf":
        assert tensors(out) == tensors(model)


def journaled(out: Path) -> set[int]:
    lines = [line for path in out.parent.glob(f"{out.name}.partial-*/.dconv/journal/*") for line in path.open()]
    return {int(line.split()[1]) for line in lines if line.startswith("done")}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_source_rewritten_at_its_size_is_another_plan(model: Path, container: str) -> None:
    """Half done, then one shard is written anew in place: same name, size and inode, another time and other bytes."""
    job = job_of(model, container)
    stop = threading.Event()
    with pytest.raises(Exception, match="stopped"):
        run(job, Settings(stop=stop, progress=lambda done, _: stop.set() if done else None))
    assert journaled(job.request.output)
    shard = min(model.glob("*.safetensors"))
    before = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-100:] = bytes(100)
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert (shard.stat().st_size, shard.stat().st_ino) == (before.st_size, before.st_ino)
    again = job_of(model, container)
    assert again.plan.id != job.plan.id
    outcome = run(again, Settings(resume=True))
    assert outcome.committed
    assert outcome.kept == 0
    back = model.parent / "back"
    run(prepare(Request(again.request.output, "hf", back)), Settings())
    assert tensors(back) == tensors(model)


def test_an_output_that_was_there_before_the_run_is_not_its_own(model: Path) -> None:
    """Only what another rank of the same launch committed counts as done; an earlier result needs --resume."""
    job = job_of(model, "hf")
    out = job.request.output
    began = time.time()
    assert run(job, Settings()).committed
    finished = json.loads((out / "dconv.json").read_text())["finished"]
    assert began <= finished <= time.time()
    made = tree_digest(out)
    with pytest.raises(UsageError, match="exists"):
        run(job, Settings(launched=time.time()))
    with pytest.raises(UsageError, match="exists"):
        run(job, Settings())
    assert run(job, Settings(rank=1, world=2, launched=began)).complete
    assert run(job, Settings(launched=time.time(), resume=True)).complete
    assert tree_digest(out) == made
