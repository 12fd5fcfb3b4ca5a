"""GPTQ and AWQ that are killed at a call, or whose disk loses power: the next run makes the same weights."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dconv.errors import Preempted
from dconv.pipeline import Job, prepare, run
from dconv.sharding.rank import Settings
from tests.crash.cases import in_step
from tests.crash.disk import Disk, Recorder, ways
from tests.crash.storage import CHANGING, SHORT, Storage
from tests.models import tree_digest
from tests.quant.calibrated import model_of, request_for

#: Say when and how long.
TIMED = {"calibration.json", "calibration.html"}
#: A run takes a second: every so many calls, with --long and without.
STEPS, FEW = 5, 97
#: Of the ways to lose what was not synced: all of it, names without bytes, and by chance.
WAYS = (0, 2, 5)


@pytest.fixture(scope="module", params=["gptq", pytest.param("awq", marks=pytest.mark.long)])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("calibrated")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 61, (12, 512)))
    asked = request_for(model_of("llama", folder / "model"), folder / "ids.npy", folder / "out")
    job = prepare(replace(asked, format=request.param))
    run(job, Settings())
    return job


def weights(out: Path) -> Mapping[str, str]:
    return {name: digest for name, digest in tree_digest(out).items() if name not in TIMED}


def moved(job: Job, out: Path) -> Job:
    return replace(job, request=replace(job.request, out=out))


def ends_well(job: Job, expected: Mapping[str, str]) -> None:
    out = job.request.output
    run(job, Settings(resume=True))
    assert weights(out) == expected
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    shutil.rmtree(out)


def test_killed_at_a_call(
    job: Job, root: Path, request: pytest.FixtureRequest, counted: Callable[[str, int], None]
) -> None:
    expected = weights(job.request.output)
    job = moved(job, root / "out")
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch)
        storage = Storage(patch, root, lambda *_: None, CHANGING)
        run(job, Settings())
    shutil.rmtree(job.request.output)
    killed = 0
    step = STEPS if request.config.getoption("--long") else FEW
    for k in range(1 + step // 2, len(storage.calls) + 1, step):
        child = os.fork()
        if child == 0:
            _dies(job, root, k)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (k, status)
        killed += 1
        if job.request.output.exists():
            assert weights(job.request.output) == expected
        ends_well(job, expected)
    assert killed
    counted("kills at a call", killed)


def _dies(job: Job, root: Path, k: int) -> None:
    """Run in this process, which never returns; of two calls to write one has written a half."""
    try:

        def hook(number: int, name: str) -> object:
            if number == k and k % 2 and name in ("write", "pwrite"):
                return SHORT
            if number >= k:
                os.kill(os.getpid(), signal.SIGKILL)
            return None

        patch = pytest.MonkeyPatch()
        in_step(patch)
        Storage(patch, root, hook)
        run(job, Settings())
    finally:
        os._exit(1)


def test_a_power_cut(job: Job, root: Path, request: pytest.FixtureRequest, counted: Callable[[str, int], None]) -> None:
    expected = weights(job.request.output)
    work = root / "work"
    work.mkdir()
    job = moved(job, work / "out")
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch)
        record = Recorder(patch, work)
        run(job, Settings())
    shutil.rmtree(work)
    step = STEPS if request.config.getoption("--long") else FEW
    disk, states = Disk(record.root), 0
    for number, event in enumerate(record.events, 1):
        disk.do(event)
        if number % step == step // 2:
            for way in WAYS:
                disk.lost(work, *ways(number)[way])
                states += 1
                if (work / "out").exists():
                    assert weights(work / "out") == expected
                ends_well(job, expected)
                shutil.rmtree(work)
    assert states
    counted("states after a power cut", states)


@pytest.mark.parametrize("spoilt", ["flipped", "cut", "gone"])
def test_weights_that_changed_before_the_commit_are_made_again(job: Job, root: Path, spoilt: str) -> None:
    """All layers were done when the run was killed, and nothing is left of what they were made of."""
    expected = weights(job.request.output)
    job = moved(job, root / "out")

    def killed() -> None:
        raise Preempted("killed")

    with pytest.raises(Preempted):
        run(job, Settings(committing=killed))
    (path,) = root.glob("out.partial-*/model.safetensors")
    data = path.read_bytes()
    if spoilt == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1000] if spoilt == "cut" else data[:-1000] + bytes(byte ^ 1 for byte in data[-1000:]))
    ends_well(job, expected)
