"""A run that ends, or meets a fault, at each call that it makes: what is there is whole or no result, and goes on.

The matrices are over every k; a part of them runs by default, all of them with --long.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.errors import DconvError, StorageFault
from dconv.pipeline import Job, run
from tests.crash.cases import ALL, each, goes_on, in_step, job_of, settings_of, whole_or_none
from tests.crash.storage import CHANGING, LOOKING, SHORT, Storage

Count = Callable[[str, int], None]


def count_of(job: Job, case: str, root: Path, names: tuple[str, ...]) -> int:
    """How many calls an undisturbed run makes; its output is removed."""
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch)
        storage = Storage(patch, root, lambda *_: None, names)
        run(job, settings_of(case))
    shutil.rmtree(job.request.output)
    return len(storage.calls)


@pytest.mark.parametrize("way", ["killed", "torn", "one of two"])
@pytest.mark.parametrize("case", ALL)
def test_killed_at_each_call(
    small: Path, results: dict[str, dict[str, str]], root: Path, case: str, way: str,
    request: pytest.FixtureRequest, counted: Count,
) -> None:  # fmt: skip
    """SIGKILL before the k-th call, or (torn) after half of it: nothing that looks like a result, unless it is one.

    Of two ranks the other one does its share after that; which changes nothing.
    """
    out = root / "out"
    killed = 0
    for k in each(request, count_of(job_of(small, case, out), case, root, CHANGING), ALL.index(case)):
        job = job_of(small, case, out)
        child = os.fork()
        if child == 0:
            _dies(job, case, root, k, way)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (k, status)
        killed += os.WIFSIGNALED(status)
        done = whole_or_none(out, case, results)
        if way == "one of two" and not done:
            run(job, settings_of(case, rank=1, world=2))
            whole_or_none(out, case, results)
        goes_on(job, case, k, results[case])
    assert killed
    counted("kills at a call", killed)


def _dies(job: Job, case: str, root: Path, k: int, way: str) -> None:
    """Run in this process, which never returns."""
    code = 1
    try:

        def hook(number: int, name: str) -> object:
            if way == "torn" and number == k and name in ("write", "pwrite"):
                return SHORT
            if number >= k + (way == "torn"):
                os.kill(os.getpid(), signal.SIGKILL)
            return None

        patch = pytest.MonkeyPatch()
        in_step(patch)
        Storage(patch, root, hook)
        run(job, settings_of(case, world=2 if way == "one of two" else 1))
        code = 0
    finally:
        os._exit(code)


#: A fault, and the calls that can meet it.
FAULTS = {
    "ENOSPC": (errno.ENOSPC, CHANGING),
    "EDQUOT": (errno.EDQUOT, CHANGING),
    "EIO": (errno.EIO, (*CHANGING, *LOOKING)),
    "EINTR": (errno.EINTR, ("pwrite", "write", "fsync", "ftruncate", "pread", "preadv", "flock")),
    "EXDEV": (errno.EXDEV, ("rename", "replace")),
    "short": (0, ("pwrite", "write", "pread", "preadv")),
}


@pytest.mark.parametrize("once", [True, False], ids=["once", "for good"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", ALL)
def test_each_call_meets_a_fault(
    small: Path, results: dict[str, dict[str, str]], root: Path, case: str, fault: str, once: bool,
    request: pytest.FixtureRequest, counted: Count,
) -> None:  # fmt: skip
    """The k-th call fails, or it and all later ones: the run ends well or with error 5, and a later one ends well."""
    number, names = FAULTS[fault]
    out = root / "out"
    tried = failed = 0
    first = ALL.index(case) + 5 * list(FAULTS).index(fault)
    for k in each(request, count_of(job_of(small, case, out), case, root, names), first):

        def hook(call: int, _: str, k: int = k) -> object:
            if call == k or (call > k and not once):
                if not number:
                    return SHORT
                raise OSError(number, os.strerror(number))
            return None

        job = job_of(small, case, out)
        tried += 1
        with pytest.MonkeyPatch.context() as patch:
            in_step(patch)
            Storage(patch, root, hook, names)
            try:
                run(job, settings_of(case))
            except (DconvError, OSError) as error:
                assert isinstance(error, StorageFault), (k, error)
                assert error.exit_code == 5
                failed += 1
        whole_or_none(out, case, results)
        goes_on(job, case, k, results[case])
    if not number:
        assert not failed  # the rest is asked for again
    elif not once:
        assert failed
    counted("faults at a call", tried)
