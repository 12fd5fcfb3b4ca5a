"""Storage that fails for a moment costs a new try of what it hit; what fails for good ends the run with one error."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dconv.errors import StorageFault
from dconv.pipeline import run
from dconv.sharding import transient
from dconv.sharding.rank import Settings
from tests.crash.conftest import check_result, job_of

#: A call of the operating system, and what its descriptors' paths end with.
CALLS = {
    "read": ("preadv", ".safetensors"),
    "write": ("pwrite", ".distcp"),
    "flush": ("fsync", ".distcp"),
    "note": ("fsync", "/journal/"),
}


class Flaky:
    """A call that fails from its ``first`` time on, ``count`` times."""

    def __init__(self, name: str, part: str, first: int, count: int, number: int) -> None:
        self.calls = self.failed = 0
        self._real: Callable[..., Any] = getattr(os, name)
        self._part, self._first, self._count, self._number = part, first, count, number
        self._lock = threading.Lock()

    def __call__(self, fd: int, *rest: Any) -> Any:
        if self._part in os.readlink(f"/proc/self/fd/{fd}"):
            with self._lock:
                self.calls += 1
                fails = self._first <= self.calls < self._first + self._count
                self.failed += fails
            if fails:
                raise OSError(self._number, os.strerror(self._number))
        return self._real(fd, *rest)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("call", CALLS)
def test_a_moment_costs_a_new_try(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str,
    threads: int,
) -> None:  # fmt: skip
    """Three errors one after the other, at the first call and later: the same bytes, and a line for each new try."""
    name, part = CALLS[call]
    for first in (1, 7):
        out = tmp_path / f"out-{first}"
        flaky = Flaky(name, part, first, 3, errno.ETIMEDOUT)
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, name, flaky)
            assert run(job_of(model, out), Settings(told=said.append, threads=threads)).committed
        if flaky.failed:  # flushes come in batches, perhaps fewer than seven
            assert said
            assert all(os.strerror(errno.ETIMEDOUT) in line for line in said)
        assert flaky.failed or (first > 1 and name == "fsync")
        check_result_of(out, undisturbed["torch_dist"])


def check_result_of(out: Path, expected: dict[str, str]) -> None:
    folder = out.parent / f"only-{out.name}"
    folder.mkdir()
    out.rename(folder / out.name)
    check_result(folder / out.name, expected)


@pytest.mark.parametrize("call", CALLS)
def test_what_fails_for_good_ends_with_one_error(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """As many tries as are promised; what is finished is kept, and a later run makes the same bytes."""
    name, part = CALLS[call]
    out = tmp_path / "out"
    job = job_of(model, out)
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, name, Flaky(name, part, 2, 10**9, errno.EIO))
        with pytest.raises(StorageFault) as caught:
            run(job, Settings(told=said.append))
    assert f"after {transient._TRIES} tries" in str(caught.value)
    assert len(said) >= transient._TRIES - 1
    assert not out.exists()
    assert run(job, Settings(resume=True)).committed
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
def test_what_does_not_pass_is_said_at_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        flaky = Flaky("pwrite", ".distcp", 3, 10**9, number)
        patch.setattr(os, "pwrite", flaky)
        with pytest.raises(StorageFault):
            run(job_of(model, tmp_path / "out"), Settings(told=said.append))
    assert said == []
    assert flaky.failed == 1


def test_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """And begin anew once something went well in between."""
    waits: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", waits.append)
    monkeypatch.setattr(transient, "_BACK_OFF", 0.5)
    tries = transient.Tries(lambda _: None, stop)
    fault = StorageFault("cannot read")
    fault.__cause__ = OSError(errno.EIO, "")
    for _ in range(4):
        tries.failed(fault, progress=False)
    tries.failed(fault, progress=True)
    assert waits == [0.5, 1, 2, 4, 0.5]
