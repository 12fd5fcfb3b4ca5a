"""A power cut at any moment of a run: an output under its name is whole, and a later run makes the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.pipeline import Job, run
from dconv.sharding.journal import sync_folder
from tests.crash.cases import ALL, STEP, in_step, job_of, settings_of, whole_or_none
from tests.crash.disk import Disk, Recorder, ways
from tests.models import tree_digest


def recorded(small: Path, work: Path, case: str) -> tuple[Recorder, int, Job]:
    """A run's calls, how many came before it (of the output that it replaces), and what ran."""
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        in_step(patch)
        record = Recorder(patch, work)
        job = job_of(small, case, work / "out")
        sync_folder(work)
        before = len(record.events)
        assert run(job, settings_of(case)).committed
    return record, before, job


#: Of the last calls, among which the rename is, all are tried.
AT_THE_END = 8


@pytest.mark.parametrize("case", ALL)
def test_each_moment(
    small: Path, results: dict[str, dict[str, str]], root: Path, case: str,
    request: pytest.FixtureRequest, counted: Callable[[str, int], None],
) -> None:  # fmt: skip
    """After each call, in seven ways to lose what was not synced; with --long at every call."""
    work = root / "work"
    record, before, job = recorded(small, work, case)
    shutil.rmtree(work)
    step = 1 if request.config.getoption("--long") else STEP
    disk, states, whole = Disk(record.root), 0, 0
    for number, event in enumerate(record.events, 1):
        disk.do(event)
        if number <= before or (number % step and number < len(record.events) - AT_THE_END):
            continue
        for keeps in ways(number):
            disk.lost(work, *keeps)
            states += 1
            whole += whole_or_none(work / "out", case, results)
            run(job, settings_of(case, resume=True))
            assert tree_digest(work / "out") == results[case], (number, event)
            assert [path.name for path in work.iterdir()] == ["out"], (number, event)
            shutil.rmtree(work)
    assert whole
    assert states >= (len(record.events) - before) // step * len(ways(0))
    counted("states after a power cut", states)
