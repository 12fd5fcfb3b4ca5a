"""A kill at any moment, then any world size: the same bytes as an undisturbed run, and no litter."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.errors import Preempted
from dconv.pipeline import Job, run
from dconv.sharding import commit
from dconv.sharding.journal import Journal
from dconv.sharding.plan import Task
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import partial_folder
from tests.crash.conftest import (
    CONTAINERS,
    Launch,
    check_result,
    finish,
    job_of,
    journal_lines,
    journaled,
    options,
    partial_of,
    stop_after,
    until,
)
from tests.models import config_of, tree_digest, write_random

# ------------------------------------------------------------------------------------------------ kill and resume


@pytest.mark.parametrize(
    ("container", "killed", "resumed", "lines", "word"),
    [
        ("torch_dist", 1, 3, 1, "--resume"),
        ("torch_dist", 4, 2, 7, "--resume"),
        ("legacy", 2, 1, 12, "--quiet"),
        ("legacy", 1, 1, 40, "--quiet"),
    ],
)
def test_kill_after_a_journal_line(
    model: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    hook: Path,
    container: str,
    killed: int,
    resumed: int,
    lines: int,
    word: str,
) -> None:
    """Killed when every process has journaled so many lines, resumed by another world, with or without --resume."""
    out = tmp_path / "out"
    launch = Launch(options(model, out, container), killed, hook, lines=lines)
    code, said = launch.end()
    assert code == -signal.SIGKILL, said
    assert journal_lines(out) >= lines
    assert not out.exists()
    finish(model, out, container, resumed, word)
    check_result(out, undisturbed[container])


@pytest.mark.long
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("killed", "resumed"), [(1, 3), (4, 2), (2, 1), (3, 4), (2, 2)])
@pytest.mark.parametrize("lines", [1, 2, 5, 11, 14, 60])
def test_kill_after_any_journal_line(
    model: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    hook: Path,
    container: str,
    killed: int,
    resumed: int,
    lines: int,
) -> None:
    """The longer matrix of the above; a run with fewer lines just ends."""
    out = tmp_path / "out"
    code, said = Launch(options(model, out, container), killed, hook, lines=lines).end()
    if code == 0:
        check_result(out, undisturbed[container])
        return
    assert code in (-signal.SIGKILL, 128 + signal.SIGKILL), said  # rank 0, which is the launcher, or another one
    if out.exists():  # it was done, and a rank that had helped noted its last line
        check_result(out, undisturbed[container])
        return
    finish(model, out, container, resumed, "--resume")
    check_result(out, undisturbed[container])


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 40))])
def test_kills_at_random_moments(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, hook: Path, seed: int
) -> None:
    """Killed up to three times at moments drawn from start-up to commit, each time another world."""
    draw = random.Random(seed)
    container = draw.choice(CONTAINERS)
    out = tmp_path / "out"
    for _ in range(draw.randint(1, 3)):
        lines = draw.randint(0, 60)
        launch = Launch(
            [*options(model, out, container), "--resume"], draw.choice([1, 2, 3]), hook, slow=draw.choice([0, 0.01])
        )
        until(lambda lines=lines: journal_lines(out) >= lines or out.exists(), launch)
        time.sleep(draw.random() * 0.05)
        launch.kill()
    finish(model, out, container, draw.choice([1, 2]), "--resume")
    check_result(out, undisturbed[container])


def test_a_kill_during_the_check_of_an_earlier_run_loses_nothing(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, hook: Path
) -> None:
    """The second run is killed while it reads the first one's bytes back; the third still keeps them all."""
    out = tmp_path / "out"
    job = job_of(model, out)
    Launch(options(model, out, "torch_dist"), 1, hook, lines=30).end()
    first = journaled(out)
    assert len(first) == 30
    code, _ = Launch(options(model, out, "torch_dist"), 1, hook, call="dconv.sharding.rank:hash_task:20").end()
    assert code == -signal.SIGKILL
    assert run(job, Settings()).kept == sum(job.plan.tasks[i].nbytes for i in first)
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_rank_that_commits_tells_what_earlier_runs_did(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, world: int
) -> None:
    """All of it, whoever's share it is in; what two earlier runs did, the second of which kept the first one's."""
    out = tmp_path / "out"
    job = job_of(model, out)
    stop_after(job, 3)
    stop_after(job, 9)
    partial = partial_folder(out, job.plan)
    first = set(Journal(partial / ".dconv" / "journal").read())
    launched = time.time()
    said = [run(job, Settings(rank=rank, world=world, launched=launched)) for rank in range(world)]
    assert [one.committed for one in said] == [False] * (world - 1) + [True]
    assert said[-1].kept == sum(job.plan.tasks[i].nbytes for i in first)
    check_result(out, undisturbed["torch_dist"])


# ------------------------------------------------------------------------------------------------- spoilt partials


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))


def spoil_byte(partial: Path, job: Job, task: Task) -> None:
    offset = task.offset + task.nbytes // 2
    if task.tensor < 0:
        offset, data = job.plan.target.files[task.file].literals[-1]
        offset += len(data) - 1
    flip(partial / job.plan.target.files[task.file].path, offset)


def spoil_length(partial: Path, job: Job, task: Task) -> None:
    os.truncate(partial / job.plan.target.files[task.file].path, task.offset + task.nbytes // 2)


def spoil_whole(partial: Path, job: Job, task: Task) -> None:
    (partial / job.plan.target.files[task.file].path).unlink()


@pytest.mark.parametrize("spoil", [spoil_byte, spoil_length, spoil_whole])
@pytest.mark.parametrize("framing", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_spoilt_bytes_are_found_and_redone(
    model: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    container: str,
    framing: bool,
    spoil: Callable[[Path, Job, Task], None],
) -> None:
    """A journaled task whose bytes changed between kill and resume is done again; the others are kept."""
    out = tmp_path / "out"
    job = job_of(model, out, container)
    stop_after(job, 24)
    partial = partial_folder(out, job.plan)
    finished = [job.plan.tasks[i] for i in journaled(out)]
    assert 20 < len(finished) < len(job.plan.tasks)
    task = next(task for task in reversed(finished) if (task.tensor < 0) == framing)
    spoil(partial, job, task)
    outcome = run(job, Settings())
    kept = sum(t.nbytes for t in finished)
    assert outcome.kept <= kept - task.nbytes
    if spoil is spoil_byte:
        assert outcome.kept == kept - task.nbytes
    check_result(out, undisturbed[container])


def test_a_spoilt_task_is_not_done_until_it_is_redone(model: Path, tmp_path: Path) -> None:
    """Other processes see at once that its line no longer counts; the lines of intact tasks go on counting."""
    out = tmp_path / "out"
    job = job_of(model, out)
    stop_after(job, 24)
    partial = partial_folder(out, job.plan)
    finished = journaled(out)
    spoil_byte(partial, job, job.plan.tasks[finished[5]])
    seen: list[set[int]] = []

    def progress(done: int, total: int) -> None:
        if not seen:  # after the check, before the first task
            seen.append(set(Journal(partial / ".dconv" / "journal").read()))

    run(job, Settings(progress=progress))
    assert seen == [set(finished) - {finished[5]}]


@pytest.mark.parametrize("launcher", [True, False])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_spoilt_bytes_in_another_ranks_share(
    model: Path,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, int],
    launcher: bool,
) -> None:
    """Everything was journaled when the earlier run died: the first rank of the new run may commit, but not unseen."""
    out = tmp_path / "out"
    job = job_of(model, out)
    with monkeypatch.context() as patch:
        patch.setattr(commit, "commit", lambda _: (_ for _ in ()).throw(Preempted("dies")))
        with pytest.raises(Preempted):
            run(job, Settings())
    assert journal_lines(out) == len(job.plan.tasks)
    for task in (job.plan.tasks[2], job.plan.tasks[-2]):
        spoil_byte(partial_folder(out, job.plan), job, task)
    # ranks that know when their launcher began, or ranks that were started one by one
    launched = time.time() if launcher else math.inf
    outcomes = [run(job, Settings(rank=order[0], world=2, launched=launched))]
    if not out.exists():
        outcomes.append(run(job, Settings(rank=order[1], world=2, launched=launched)))
    assert [o.committed for o in outcomes].count(True) == 1
    check_result(out, undisturbed["torch_dist"])


def test_real_ranks_see_spoilt_bytes(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, hook: Path
) -> None:
    """The same with processes: two ranks go on where one died just before its receipt."""
    out = tmp_path / "out"
    job = job_of(model, out)
    Launch(options(model, out, "torch_dist"), 1, hook, call="dconv.sharding.commit:_source_fault:1").end()
    assert journal_lines(out) == len(job.plan.tasks)
    for task in (job.plan.tasks[1], job.plan.tasks[-2]):
        spoil_byte(partial_of(out), job, task)
    finish(model, out, "torch_dist", 2, "--resume")
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_torn_last_line_is_ignored(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, cut: int
) -> None:
    """A line that was cut off, or is followed by rubbish, counts as absent: its task is done again."""
    out = tmp_path / "out"
    job = job_of(model, out)
    stop_after(job, 20)
    (path,) = (partial_folder(out, job.plan) / ".dconv" / "journal").iterdir()
    intact = journaled(out)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    if cut > 1:  # a line that lacks only its end is whole
        intact.pop()
    assert run(job, Settings()).kept == sum(job.plan.tasks[i].nbytes for i in intact)
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize(
    "junk", [b"done 40 ", b"done 40 00\n", b"\x00" * 50, b"\xff\xfe\n", b"retract x 3 0\n", b"done -1 x y\n"]
)
def test_rubbish_in_a_journal_is_ignored(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, junk: bytes
) -> None:
    out = tmp_path / "out"
    job = job_of(model, out)
    stop_after(job, 20)
    (path,) = (partial_folder(out, job.plan) / ".dconv" / "journal").iterdir()
    intact = journaled(out)
    with open(path, "ab") as file:
        file.write(junk)
    assert run(job, Settings()).kept == sum(job.plan.tasks[i].nbytes for i in intact)
    check_result(out, undisturbed["torch_dist"])


def test_another_digest_algorithm_on_resume(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """A resume with another --digest takes nothing over, so that the receipt is of one kind."""
    out = tmp_path / "out"
    job = job_of(model, out)
    stop_after(job, 20, algorithm="sha256")
    assert run(job, Settings()).kept == 0
    check_result(out, undisturbed["torch_dist"])


def test_spoilt_holes_are_holes_again(tmp_path: Path) -> None:
    """What is a hole in the source must be zero in the output, whatever a killed run's file holds there."""
    family = by_name("llama")
    source = write_random(
        tmp_path / "model", family, config_of(family, hidden_size=256, intermediate_size=512, head_dim=64)
    )
    shard = source / "model.safetensors"
    size = shard.stat().st_size
    header = shard.read_bytes()[: 8 + int.from_bytes(shard.read_bytes()[:8], "little")]
    shard.write_bytes(header)
    os.truncate(shard, size)
    whole, out = tmp_path / "whole", tmp_path / "work" / "out"
    out.parent.mkdir()
    run(job_of(source, whole), Settings())
    job = job_of(source, out)
    stop_after(job, 10)
    spoilt = [task for task in job.plan.tasks if task.tensor >= 0]
    # one that was journaled, and one of the same file that was not
    for task in (spoilt[1], [task for task in spoilt if task.file == spoilt[1].file][-1]):
        spoil_byte(partial_folder(out, job.plan), job, task)
    run(job, Settings())
    check_result(out, tree_digest(whole))
