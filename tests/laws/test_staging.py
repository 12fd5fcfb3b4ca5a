"""--stage-dir: the same bytes, each source byte read once a machine and in large pieces, and nothing left behind."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from dconv.arch.registry import by_name
from dconv.errors import StorageFault
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding import staging
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.models import config_of, tree_digest, write_random
from tests.processes import call, local


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = by_name("qwen3_moe")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 499}
    return write_random(
        tmp_path_factory.mktemp("source") / "model", family, config_of(family, **sizes), shard_size=300_000
    )


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(staging, "PIECE", 64 << 10)
    (tmp_path / "stage").mkdir()
    return tmp_path / "stage"


def job_of(model: Path, out: Path) -> Job:
    """Cut by columns and rows."""
    return prepare(Request(model, "megatron", out, parallel=Parallel(tp=4, pp=2, etp=4), megatron_format="legacy"))


class Reads:
    """Stretches of the source that were read."""

    def __init__(self, model: Path, patch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()
        for name in ("pread", "preadv"):
            patch.setattr(os, name, self._counting(getattr(os, name), str(model.resolve())))

    def _counting(self, real: Any, root: str) -> Any:
        def read(fd: int, what: Any, offset: int) -> Any:
            got = real(fd, what, offset)
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith(root):
                with self._lock:
                    self.found.append((path, offset, got if isinstance(got, int) else len(got)))
            return got

        return read


def test_each_byte_is_read_once(model: Path, tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks with the same stage: fewer reads than without, none of them twice; and the copies go at the end."""
    run(job_of(model, tmp_path / "plain"), Settings())
    plain, staged = job_of(model, tmp_path / "again"), job_of(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        without = Reads(model, patch)
        for rank in range(8):
            run(plain, Settings(rank, 8))
    holding = staging.Stage(stage, staged.plan.id, staged.plan.source.files, print)  # as another rank would
    with monkeypatch.context() as patch:
        reads = Reads(model, patch)
        for rank in range(8):
            run(staged, Settings(rank, 8, stage_dir=stage))
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "plain")
    assert len(set(reads.found)) == len(reads.found)
    assert all(offset % staging.PIECE == 0 for _, offset, _ in reads.found)
    assert len(reads.found) < len(without.found) / 10
    assert os.listdir(stage)
    holding.close()
    assert os.listdir(stage) == []


def test_processes_share_a_stage(model: Path, tmp_path: Path) -> None:
    run(job_of(model, tmp_path / "plain"), Settings())
    words = (model, "megatron", "-o", tmp_path / "out", "--tp", 4, "--pp", 2, "--megatron-format", "legacy")
    code, _, err = call(*local(2, *words, "--stage-dir", tmp_path / "stage"))
    assert code == 0, err
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "plain")
    assert os.listdir(tmp_path / "stage") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_stage_without_room(
    model: Path, tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The rest is read where it is, and a person is told once."""
    run(job_of(model, tmp_path / "plain"), Settings())
    real, told, written = os.pwrite, [], [0]

    def full(fd: int, data: Any, offset: int) -> int:
        if str(stage) in os.readlink(f"/proc/self/fd/{fd}"):
            written[0] += len(data)
            if written[0] > 300_000:
                raise OSError(number, os.strerror(number))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert run(job_of(model, tmp_path / "out"), Settings(stage_dir=stage, told=told.append)).committed
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "plain")
    assert len(told) == 1
    assert "no room" in told[0]
    assert os.listdir(stage) == []


def test_what_killed_runs_left(model: Path, tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the same plan are used, those of others removed unless someone holds them."""
    job = job_of(model, tmp_path / "out")
    held = staging.Stage(stage, "in-use", [], print)
    (stage / "dconv-stage-left").mkdir()
    (stage / "dconv-stage-left" / "lock").touch()
    (stage / "other").mkdir()
    same = staging.Stage(stage, job.plan.id, job.plan.source.files, print)
    for file, stamp in job.plan.source.files.items():
        fd = os.open(job.plan.source.root / file, os.O_RDONLY)
        same.fd(file, fd, stamp.size, 0, stamp.size)
        os.close(fd)
    os.close(same._lock)  # as SIGKILL does
    with monkeypatch.context() as patch:
        reads = Reads(model, patch)
        assert run(job, Settings(stage_dir=stage)).committed
    assert reads.found == []
    assert sorted(os.listdir(stage)) == [held._folder.name, "other"]
    held.close()
    assert os.listdir(stage) == ["other"]


def test_what_is_left_after_a_power_cut_is_not_read(
    model: Path, tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marks that reached the disk, of bytes that did not."""
    run(job_of(model, tmp_path / "plain"), Settings())
    job = job_of(model, tmp_path / "out")
    before = tmp_path / "boot"
    before.write_text("the start of the machine before\n")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_BOOT", before)
        left = staging.Stage(stage, job.plan.id, job.plan.source.files, print)
    for file, stamp in job.plan.source.files.items():
        fd = os.open(job.plan.source.root / file, os.O_RDONLY)
        data = left.fd(file, fd, stamp.size, 0, stamp.size)
        os.close(fd)
        os.pwrite(data, bytes(stamp.size), 0)
    os.close(left._lock)
    assert run(job, Settings(stage_dir=stage)).committed
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "plain")
    assert os.listdir(stage) == []


def test_a_stage_that_cannot_be(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFault) as caught:
        run(job_of(model, tmp_path / "out"), Settings(stage_dir=tmp_path / "file"))
    assert "cannot stage" in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]
