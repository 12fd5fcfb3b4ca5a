"""Ranks that are done go on with what others have not: the slow, the stopped, the dead. The bytes are the same."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dconv.pipeline import Job, run
from dconv.sharding import stealing
from dconv.sharding.execute import Done, Worker
from dconv.sharding.follow import Follower
from dconv.sharding.journal import Journal
from dconv.sharding.plan import Task
from dconv.sharding.rank import Outcome, Settings
from dconv.sharding.receipt import partial_folder
from dconv.sharding.stealing import Stealing
from dconv.sharding.tuning import Tuner
from tests.crash.conftest import CONTAINERS, Launch, check_result, job_of, journal_lines, options, until


def together(job: Job, worlds: list[Settings]) -> list[Outcome]:
    """Ranks at one time, each in a thread."""
    found: list[Outcome | None] = [None] * len(worlds)

    def one(number: int) -> None:
        found[number] = run(job, replace(worlds[number], steal=True, launched=time.time() - 1))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(worlds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found)
    return [outcome for outcome in found if outcome]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_rank_alone_does_everything(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, world: int, container: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The others never come: one of any world makes the whole output."""
    monkeypatch.setattr(stealing, "_PATIENCE", 0.05)
    out = tmp_path / "out"
    outcome = run(job_of(model, out, container), Settings(rank=world - 1, world=world, steal=True, launched=0.0))
    assert outcome.committed
    check_result(out, undisturbed[container])


def test_a_slow_rank_is_helped(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank takes far longer for each task: the other does most of its share, and few tasks are done twice."""
    out = tmp_path / "out"
    job = job_of(model, out)
    done: list[tuple[str, int]] = []
    real = Worker.do

    def do(self: Worker, task: Task) -> Done:
        name = threading.current_thread().name
        if name == "slow":
            time.sleep(0.05)
        done.append((name, task.index))
        return real(self, task)

    monkeypatch.setattr(Worker, "do", do)
    monkeypatch.setattr(stealing, "_LOOK", 0.02)
    slow = threading.Thread(
        target=run, args=(job, Settings(0, 2, steal=True, launched=time.time() - 1)), name="slow"
    )  # fmt: skip
    slow.start()
    run(job, Settings(1, 2, steal=True, launched=time.time() - 1))
    slow.join()
    share = {task.index for task in job.plan.share(0, 2)}
    helped = {index for name, index in done if name != "slow" and index in share}
    assert len(helped) > len(share) / 2
    doubled = len(done) - len({index for _, index in done})
    assert doubled <= 2 * stealing._TAKE, done
    check_result(out, undisturbed["torch_dist"])


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.long] * (seed > 3)) for seed in range(24)])
def test_ranks_of_any_speed(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Random worlds, threads and delays, with no patience at all: much is done twice, and all is right."""
    chance = random.Random(seed)
    monkeypatch.setattr(stealing, "_PATIENCE", chance.choice([0.0, 0.01]))
    monkeypatch.setattr(stealing, "_SLOWEST", 0)
    monkeypatch.setattr(stealing, "_LOOK", 0.01)
    real = Worker.do

    def do(self: Worker, task: Task) -> Done:
        time.sleep(chance.choice([0, 0, 0.001, 0.01]))
        return real(self, task)

    monkeypatch.setattr(Worker, "do", do)
    out, world = tmp_path / "out", chance.choice([2, 3, 5])
    container = chance.choice(CONTAINERS)
    ranks = [Settings(rank, world, threads=chance.choice([1, 1, 3])) for rank in range(world)]
    outcomes = together(job_of(model, out, container), ranks)
    assert sum(outcome.committed for outcome in outcomes) == 1
    assert all(outcome.complete for outcome in outcomes)
    check_result(out, undisturbed[container])


@pytest.mark.parametrize("victim", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_killed_rank(
    model: Path, undisturbed: dict[str, dict[str, str]], tmp_path: Path, hook: Path, victim: int
) -> None:
    """SIGKILL to one process of three in the midst: the others do its part, and the run ends well."""
    out = tmp_path / "out"
    launch = Launch(options(model, out, "torch_dist"), 3, hook, slow=0.05)
    until(lambda: journal_lines(out) >= 6, launch)
    child = children(launch.process.pid)[victim - 1]
    child()
    code, said = launch.end()
    assert code == 0, said
    assert f"rank {victim} was killed" in said
    assert said.count("wrote ") == 1
    check_result(out, undisturbed["torch_dist"])


def children(pid: int) -> list[Callable[[], None]]:
    """What kills the children of a process, by the rank that each is."""
    import os
    import signal

    found: dict[int, int] = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        words = dict(
            word.partition("=")[::2] for word in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in word
        )
        found[int(words["RANK"])] = child
    return [lambda child=child: os.kill(child, signal.SIGKILL) for _, child in sorted(found.items())]


# ------------------------------------------------------------------------------------------------- what is taken


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def held(model: Path, tmp_path: Path) -> tuple[Job, Path]:
    job = job_of(model, tmp_path / "out")
    state = partial_folder(tmp_path / "out", job.plan) / ".dconv"
    (state / "journal").mkdir(parents=True)
    return job, state


def test_what_is_under_way_is_left_alone(held: tuple[Job, Path]) -> None:
    """From the end of another's share; never its next tasks, nor what a third is at, until nothing is heard of them."""
    job, state = held
    mine, other, third = (Journal(state / "journal") for _ in range(3))
    clock = Clock()
    ours = Stealing(job.plan, state, mine.name, 0.0, 0, 2, Tuner(1, 1), clock)
    share = job.plan.share(1, 2)
    mine.append([Done(task, "x", 0) for task in job.plan.share(0, 2)])
    ours.end_of_share()
    first = ours.next()
    assert first
    assert first == list(share[-len(first) :])
    third.claim(share[-12:])
    clock.now += 0.1
    second = ours.next()
    assert second
    assert not {t.index for t in second} & {t.index for t in share[-12:]}
    assert share[0] not in second
    other.append([Done(task, "x", 0) for task in share[:-12]])
    clock.now += 0.1
    assert ours.next() == []  # what is left is the third's
    clock.now += stealing._PATIENCE
    assert ours.next()  # which is not heard of
    other.append([Done(task, "x", 0) for task in share[-12:]])
    assert ours.next() is None


def test_who_follows_the_journals_sees_what_who_reads_them_sees(held: tuple[Job, Path]) -> None:
    """Tasks that were done, that were kept and done no more, and that were taken back."""
    job, state = held
    earlier, later = (Journal(state / "journal") for _ in range(2))
    follower = Follower(state / "journal", later.name, 0.0)
    tasks = job.plan.tasks[:4]
    earlier.append([Done(task, "x", 0) for task in tasks[:3]])
    later.keep(tasks[:2], later.read())
    Journal(state / "journal").retract(tasks[1:3])  # also of what was kept
    later.append([Done(tasks[3], "x", 0)])
    follower.look()
    assert follower.done == set(later.read()) == {tasks[0].index, tasks[3].index}


def test_an_owner_leaves_out_what_was_taken(held: tuple[Job, Path]) -> None:
    job, state = held
    mine, other = Journal(state / "journal"), Journal(state / "journal")
    clock = Clock()
    owner = Stealing(job.plan, state, mine.name, 0.0, 0, 2, Tuner(1, 1), clock)
    share = job.plan.share(0, 2)
    assert not any(map(owner.is_taken, share))
    other.claim(share[-3:])
    (state / "stealing").touch()
    clock.now += stealing._LOOK
    assert [owner.is_taken(task) for task in share[-4:]] == [False, True, True, True]


def test_claims_of_an_earlier_run_are_none(held: tuple[Job, Path]) -> None:
    job, state = held
    earlier = Journal(state / "journal")
    earlier.claim(job.plan.share(0, 2))
    mine = Journal(state / "journal")
    (state / "stealing").touch()
    owner = Stealing(job.plan, state, mine.name, time.time() + 1, 0, 2, Tuner(1, 1), Clock())
    assert not any(map(owner.is_taken, job.plan.share(0, 2)))


def test_a_committed_folder_leaves_nothing(held: tuple[Job, Path]) -> None:
    job, state = held
    mine = Journal(state / "journal")
    ours = Stealing(job.plan, state, mine.name, 0.0, 0, 2, Tuner(1, 1))
    ours.end_of_share()
    state.rename(state.with_name("gone"))
    assert ours.next() is None
    ours.end_of_share()


def test_who_is_done_reads_no_journal(held: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the others have had no more time than it had, and not when all say that they are done."""
    job, state = held
    journals = [Journal(state / "journal") for _ in range(2)]
    clock = Clock()
    ranks = [
        Stealing(job.plan, state, journals[rank].name, 0.0, rank, 2, Tuner(1, 1), clock) for rank in range(2)
    ]  # fmt: skip
    monkeypatch.setattr(Follower, "look", lambda _: pytest.fail("it looked"))
    clock.now += 10
    ranks[0].end_of_share()
    assert ranks[0].next() == []
    clock.now += 0.9
    assert ranks[0].next() == []
    ranks[1].end_of_share()
    assert ranks[0].next() is None
    assert ranks[1].next() is None


def test_few_of_many_help(held: tuple[Job, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 ranks one is not done: eight look at the journals. All do when nothing comes of it for long."""
    job, state = held
    clock, world, lost = Clock(), 200, 77
    ranks: dict[int, Stealing] = {}
    for rank in set(range(world)) - {lost}:
        name = Journal(state / "journal").name
        ranks[rank] = Stealing(job.plan, state, name, 0.0, rank, world, Tuner(1, 1), clock)
    looked: list[int] = []
    for rank in ranks.values():
        rank.end_of_share()
    monkeypatch.setattr(Follower, "look", lambda _: looked.append(1))
    for rank in ranks.values():
        rank.next()
    assert len(looked) == stealing._HELPERS
    clock.now += stealing._LONG * stealing._PATIENCE
    for rank in ranks.values():
        rank.next()
    assert len(looked) >= world - 1
