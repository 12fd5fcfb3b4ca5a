"""The commit is all or nothing: killed in it, told to stop before it, or raced to it by others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from dconv.errors import Preempted, UsageError
from dconv.launch import worker
from dconv.launch.__main__ import main
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding import finish as finish_module
from dconv.sharding import rank
from dconv.sharding.rank import Outcome, Settings
from tests.crash.conftest import (
    CONTAINERS,
    Launch,
    check_result,
    finish,
    job_of,
    journal_lines,
    options,
    partial_of,
    stop_after,
    until,
)
from tests.models import tree_digest
from tests.processes import PATIENCE

# --------------------------------------------------------------------------------------------------------- commit


@pytest.mark.parametrize(
    "moment",
    [
        {"torn": 1},
        {"call": "dconv.sharding.commit:finish:1"},
        {"call": "dconv.sharding.finish:_rename:1"},
        {"call": "dconv.sharding.commit:write_synced:2"},
    ],
    ids=["half a receipt", "receipt", "before the rename", "half of the closing files"],
)
@pytest.mark.parametrize("world", [1, 2])
def test_kill_during_the_commit(
    model: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    hook: Path,
    moment: dict[str, object],
    world: int,
) -> None:
    """The next run finishes what the commit began."""
    out = tmp_path / "out"
    code, said = Launch(options(model, out, "torch_dist"), 1, hook, **moment).end()
    assert code == -signal.SIGKILL, said
    assert not out.exists()
    assert partial_of(out).exists()
    finish(model, out, "torch_dist", world)
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize("renames", [1, 2])
def test_kill_while_an_old_output_is_replaced(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, hook: Path, renames: int
) -> None:
    """Between the old output's rename and the new one's, both are there under some name; the next run finishes."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    (out / "dconv.json").write_text("{}")
    words = [*options(model, out, "legacy"), "--overwrite"]
    code, said = Launch(words, 1, hook, call=f"os:rename:{renames}").end()
    assert code == -signal.SIGKILL, said
    aside = list(tmp_path.glob("out.replaced-*"))
    assert (out if renames == 1 else aside[0]).joinpath("old").read_text() == "old"
    finish(model, out, "legacy", 1, "--overwrite")
    check_result(out, undisturbed["legacy"])


def test_resume_of_a_finished_output_is_done(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0 and not one byte or time changed; without --resume exit 2."""
    out = tmp_path / "out"
    words = options(model, out, "torch_dist")
    assert main(words) == 0
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    assert "already done" in capsys.readouterr().out
    assert main([*words, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["already_done"] is True
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    assert main(words) == 2
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize("old", ["spoilt", "empty", "link", "receipt"])
def test_overwrite_replaces_only_at_commit(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, old: str
) -> None:
    """Until then the old output is whole, also when the run is stopped; after it nothing of the old is left."""
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("kept")
    if old == "link":
        out.symlink_to(other)
    elif old == "empty":
        out.mkdir()
    elif old == "spoilt":
        shutil.copytree(other, out)
        (out / "dconv.json").write_text("{")
    else:
        run(prepare(Request(model, "megatron", out)), Settings())
    before = tree_digest(out)

    def intact() -> bool:
        return tree_digest(out) == before

    job = job_of(model, out)
    stop_after(job, 20, overwrite=True)
    assert intact()
    seen: list[bool] = []
    assert run(job, Settings(overwrite=True, progress=lambda *_: seen.append(intact()))).committed
    assert len(seen) > 10
    assert all(seen)
    assert not out.is_symlink()
    check_result(out, undisturbed["torch_dist"])
    assert (other / "precious").read_text() == "kept"


def test_output_that_appears_during_the_run_is_not_replaced(model: Path, tmp_path: Path) -> None:
    """Somebody else's directory at OUT, made after this run began: exit 2, theirs is untouched, ours can go on."""
    out = tmp_path / "out"
    job = job_of(model, out)

    def progress(done: int, total: int) -> None:
        if done == total:
            out.mkdir(exist_ok=True)  # an empty directory is what a rename would silently replace

    with pytest.raises(UsageError):
        run(job, Settings(progress=progress))
    assert list(out.iterdir()) == []
    out.rmdir()
    assert run(job, Settings()).kept == job.plan.bytes_written


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_sigterm_ends_with_75_and_can_be_resumed(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, hook: Path, world: int, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    launch = Launch(options(model, out, "torch_dist"), world, hook, slow=0.1)
    until(lambda: journal_lines(out) >= 2, launch)
    launch.process.send_signal(number)
    code, said = launch.end()
    assert code == 75, said
    assert "preempted (75)" in said
    assert "--resume" in said
    done = journal_lines(out)
    assert 2 <= done < len(job_of(model, out).plan.tasks) // 2, "it did not stop, it finished"
    assert not out.exists()
    finish(model, out, "torch_dist", 1, "--resume")
    check_result(out, undisturbed["torch_dist"])


def test_sigterm_during_the_planning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 75 before the first byte, and nothing left behind."""
    real = worker.prepare

    def prepare_and_be_told(request: Request) -> Job:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(request)

    monkeypatch.setattr(worker, "prepare", prepare_and_be_told)
    assert main(options(model, tmp_path / "out", "legacy")) == 75
    assert "preempted (75)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sigterm_while_an_earlier_run_is_checked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading back a terabyte takes long, too."""
    out = tmp_path / "out"
    job = job_of(model, out)
    stop_after(job, 30)
    stop = threading.Event()
    checked = 0
    real = rank.hash_task

    def hash_task(*args: Any) -> str:
        nonlocal checked
        checked += 1
        if checked == 5:
            stop.set()
        return real(*args)

    monkeypatch.setattr(rank, "hash_task", hash_task)
    with pytest.raises(Preempted):
        run(job, Settings(stop=stop))
    assert checked == 5


# ---------------------------------------------------------------------------------------------------- concurrency


@pytest.mark.parametrize("container", CONTAINERS)
def test_two_processes_with_the_same_plan_and_rank(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, hook: Path, container: str
) -> None:
    """Started by mistake: both end well, with one whole output."""
    out = tmp_path / "out"
    words = options(model, out, container)
    first = Launch(words, 1, hook, slow=0.03)
    until(lambda: journal_lines(out) >= 1, first)
    second = Launch(words, 1, hook, slow=0.01)
    ends = [first.end(), second.end()]
    # the second may come after the first's commit, when OUT simply exists
    assert ends[0][0] == 0, ends
    assert ends[1][0] in (0, 2), ends
    assert "Traceback" not in ends[0][1] + ends[1][1]
    check_result(out, undisturbed[container])


def test_a_note_that_comes_while_the_working_state_is_removed(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another process of the same plan, between the listing of the folder and its removal."""
    out = tmp_path / "out"
    inner, late = finish_module.shutil.rmtree, [0, 1]

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.name == ".dconv" and late:
            ranks = path / "ranks"
            ranks.mkdir(exist_ok=True)
            (ranks / f"{late.pop()}.json").write_text("{}")
            return
        inner(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(finish_module.shutil, "rmtree", rmtree)
    assert run(job_of(model, out), Settings()).committed
    assert not late
    monkeypatch.undo()
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize("at", [0, 10, 40])
@pytest.mark.parametrize("worlds", [(1, 1), (2, 1), (1, 2)])
def test_another_process_commits_while_this_one_is_at_work(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, at: int, worlds: tuple[int, int]
) -> None:
    """Deterministic: in the middle of one run another one runs from start to commit. The slower one ends well, too."""
    out = tmp_path / "out"
    job = job_of(model, out)
    slow, fast = worlds
    calls = 0
    inner: list[Outcome] = []

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == min(at, 20 if slow == 2 else at) + 1:
            inner.extend(run(job, Settings(rank=rank, world=fast, launched=0)) for rank in range(fast))

    outcome = run(job, Settings(world=slow, progress=progress))
    assert any(o.committed for o in inner)
    assert outcome.complete
    check_result(out, undisturbed["torch_dist"])


def test_threads_race_through_one_plan(model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """Many ranks of many worlds at once, all of one plan: whatever the order, one output and no error."""
    out = tmp_path / "out"
    failures: list[BaseException] = []

    def work(rank: int, world: int) -> None:
        try:
            run(job_of(model, out), Settings(rank=rank, world=world, launched=0))
        except BaseException as fault:
            failures.append(fault)

    ranks = [(rank, world) for world in (1, 2, 3) for rank in range(world)]
    threads = [threading.Thread(target=work, args=place) for place in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failures, failures
    check_result(out, undisturbed["torch_dist"])
