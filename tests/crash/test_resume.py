"""A kill at any moment, then any world size: the same bytes as an undisturbed run, and no litter."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dconv.arch.registry import by_name
from dconv.errors import Preempted, UsageError
from dconv.launch import worker
from dconv.launch.__main__ import main
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding import commit
from dconv.sharding.commit import Outcome, Settings
from dconv.sharding.coords import Parallel
from dconv.sharding.journal import Journal
from dconv.sharding.plan import LEAF_BYTES, Task
from dconv.sharding.receipt import partial_folder
from tests.models import config_of, tree_digest, write_random

CONTAINERS = ("torch_dist", "legacy")
#: A run that takes longer than this hangs.
PATIENCE = 120

#: Loaded by every process of a run: kills it, or slows it down, as the environment says. Product code has no such hook.
HOOK = """
import os, signal, time
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def setting(name):
    return os.environ.get("HOOK_" + name, "")
if setting("LINES"):
    from dconv.sharding.journal import Journal
    real_append, written = Journal._append, 0
    def append(self, lines):
        global written
        for line in lines:
            real_append(self, [line])
            written += 1
            if written == int(setting("LINES")):
                die()
    Journal._append = append
if setting("CALL"):
    module, name, count = setting("CALL").rsplit(":", 2)
    import importlib
    place = importlib.import_module(module)
    real, calls = getattr(place, name), 0
    def called(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(count):
            die()
        return real(*args, **kwargs)
    setattr(place, name, called)
if setting("TORN"):
    from dconv.sharding import commit
    real_write = commit._write_synced
    def write(path, data):
        if path.name == commit.RECEIPT:
            real_write(path, data[: len(data) // 2])
            die()
        real_write(path, data)
    commit._write_synced = write
if setting("SLOW"):
    from dconv.sharding.execute import Worker
    real_do = Worker.do
    def do(self, task):
        time.sleep(float(setting("SLOW")))
        return real_do(self, task)
    Worker.do = do
"""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` takes the process's signals over, which pytest needs back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about 3 MB in two files: some 60 tasks."""
    family = by_name("llama")
    config = config_of(family, hidden_size=128, intermediate_size=384, vocab_size=501, num_hidden_layers=6, head_dim=32)
    return write_random(tmp_path_factory.mktemp("source") / "model", family, config, shard_size=2_000_000)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, dict[str, str]]:
    """What every run must end with, by container."""
    found = {}
    for container in CONTAINERS:
        out = model.parent / container
        assert run(job_of(model, out, container), Settings()).committed
        found[container] = tree_digest(out)
    return found


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """A directory that puts `HOOK` into every Python process that has it on its path."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    return folder


def job_of(model: Path, out: Path, container: str = "torch_dist") -> Job:
    return prepare(
        Request(model, "megatron", out, parallel=Parallel(tp=2, pp=2, etp=2), megatron_format=container, divisor=8)
    )


def options(model: Path, out: Path, container: str) -> list[str]:
    """The same request on a command line."""
    layout = ["--tp", "2", "--pp", "2", "--make-vocab-size-divisible-by", "8", "--max-memory", "1MiB"]
    return [str(model), "megatron", "-o", str(out), "--megatron-format", container, *layout]


class Launch:
    """A real run in processes of its own, in a session of its own so that it can be killed whole."""

    def __init__(self, words: list[str], world: int, hook: Path | None = None, **settings: object) -> None:
        command = (
            ["-m", "dconv.launch", *words] if world == 1 else ["-m", "dconv", "convert", *words, "--nproc", str(world)]
        )
        path = os.pathsep.join(filter(None, [str(hook or ""), str(Path(__file__).parents[2])]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment |= {f"HOOK_{key.upper()}": str(value) for key, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Exit code and everything printed."""
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, out + err

    def kill(self) -> None:
        """SIGKILL to every process of the run."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def journal_lines(out: Path) -> int:
    """Lines that the partial outputs beside ``out`` have in their journals."""
    count = 0
    for path in out.parent.glob(f"{out.name}.partial-*/.dconv/journal/*"):
        try:
            count += path.read_bytes().count(b"\n")
        except FileNotFoundError:  # committed meanwhile
            continue
    return count


def until(condition: Callable[[], bool], run_: Launch) -> None:
    """Poll until it is so, or the run has ended."""
    limit = time.monotonic() + PATIENCE
    while not condition() and run_.process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.002)


def journaled(out: Path) -> list[int]:
    """The tasks that the only journal beside ``out`` calls done, in its order (which is not quite the plan's)."""
    (path,) = (partial_of(out) / ".dconv" / "journal").iterdir()
    return [int(line.split()[1]) for line in path.read_text("utf-8", "replace").split("\n")[:-1]]


def partial_of(out: Path) -> Path:
    (found,) = [path for path in out.parent.glob(f"{out.name}.partial-*") if path.is_dir()]
    return found


def check_result(out: Path, expected: dict[str, str]) -> None:
    """The bytes, the receipt's digests by this test's own arithmetic, and nothing beside the output."""
    assert tree_digest(out) == expected
    beside = {path.name for path in out.parent.iterdir()} - {"hook", out.name}
    assert not beside, beside
    receipt = json.loads((out / "dconv.json").read_text())
    assert receipt["digest"] == "xxh3"
    assert receipt["tensors"]
    width = {"bf16": 2}
    for tensor in receipt["tensors"].values():
        nbytes = width[tensor["dtype"]]
        for n in tensor["shape"]:
            nbytes *= n
        assert nbytes <= LEAF_BYTES
        data = (out / tensor["file"]).read_bytes()[tensor["offset"] : tensor["offset"] + nbytes]
        assert len(data) == nbytes
        leaf = xxhash.xxh3_128(data).digest()
        assert tensor["digest"] == xxhash.xxh3_128(leaf).hexdigest()


def finish(model: Path, out: Path, container: str, world: int, *more: str) -> str:
    """Run to the end with ``world`` ranks; returns what was printed."""
    code, said = Launch([*options(model, out, container), *more], world).end()
    assert code == 0, said
    return said


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
    assert code not in (0, 1, 2, 3, 4, 5), said
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
    assert not out.exists(), said
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
    code, _ = Launch(options(model, out, "torch_dist"), 1, hook, call="dconv.sharding.commit:_hash_task:20").end()
    assert code == -signal.SIGKILL
    assert run(job, Settings()).kept == sum(job.plan.tasks[i].nbytes for i in first)
    check_result(out, undisturbed["torch_dist"])


# ------------------------------------------------------------------------------------------------- spoilt partials


def stop_after(job: Job, tasks: int, **settings: Any) -> None:
    """Run in this process until so many tasks are done."""
    stop = threading.Event()
    seen = 0

    def progress(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen > tasks:
            stop.set()

    with pytest.raises(Preempted):
        run(job, Settings(progress=progress, stop=stop, **settings))


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
        patch.setattr(commit._Run, "commit", lambda _: (_ for _ in ()).throw(Preempted("dies")))
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


# --------------------------------------------------------------------------------------------------------- commit


@pytest.mark.parametrize(
    "moment",
    [
        {"torn": 1},
        {"call": "dconv.sharding.commit:_finish:1"},
        {"call": "dconv.sharding.commit:_rename:1"},
        {"call": "dconv.sharding.commit:_write_synced:2"},
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
    real = commit._hash_task

    def hash_task(*args: Any) -> str:
        nonlocal checked
        checked += 1
        if checked == 5:
            stop.set()
        return real(*args)

    monkeypatch.setattr(commit, "_hash_task", hash_task)
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
