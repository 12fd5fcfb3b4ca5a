"""Real runs that are killed or slowed down at a chosen moment, and what every run must end with."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dconv.arch.registry import by_name
from dconv.errors import Preempted
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.plan import LEAF_BYTES
from dconv.sharding.rank import Settings
from tests import processes
from tests.crash import cases
from tests.models import config_of, tree_digest, write_random
from tests.processes import PATIENCE

CONTAINERS = ("torch_dist", "legacy")

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
    real_write = commit.write_synced
    def write(path, data):
        if path.name == commit.RECEIPT:
            real_write(path, data[: len(data) // 2])
            die()
        real_write(path, data)
    commit.write_synced = write
if setting("SLOW"):
    from dconv.sharding.execute import Worker
    real_do = Worker.do
    def do(self, task):
        time.sleep(float(setting("SLOW")))
        return real_do(self, task)
    Worker.do = do
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about 3 MB in two files: some 60 tasks."""
    family = by_name("llama")
    config = config_of(family, hidden_size=128, intermediate_size=384, vocab_size=501, num_hidden_layers=6, head_dim=32)
    return write_random(tmp_path_factory.mktemp("source") / "model", family, config, shard_size=2_000_000)


@pytest.fixture(scope="session")
def undisturbed(model: Path) -> dict[str, dict[str, str]]:
    """What every run must end with, by container."""
    found = {}
    for container in CONTAINERS:
        out = model.parent / container
        assert run(job_of(model, out, container), Settings()).committed
        found[container] = tree_digest(out)
    return found


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tests.crash.cases`."""
    return cases.model_in(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def results(small: Path) -> dict[str, dict[str, str]]:
    """What every run must end with, by case."""
    found = {}
    for case in cases.ALL:
        out = small.parent / "done" / case.replace(" ", "-")
        out.parent.mkdir(exist_ok=True)
        assert run(cases.job_of(small, case, out), cases.settings_of(case)).committed
        found[case] = tree_digest(out)
    return found


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """An empty folder, in memory where that is to be had: the matrices flush hundreds of thousands of times."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def root() -> Iterator[Path]:
    with in_memory() as folder:
        yield folder


@pytest.fixture(scope="module")
def root_of_sources() -> Iterator[Path]:
    with in_memory() as folder:
        yield folder


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
    """A real run in processes of its own; ``settings`` are those of `HOOK`."""

    def __init__(self, words: list[str], world: int, hook: Path | None = None, **settings: object) -> None:
        command = processes.one_rank(*words) if world == 1 else processes.local(world, *words)
        variables = {f"HOOK_{key.upper()}": str(value) for key, value in settings.items()}
        if hook is not None:
            variables["PYTHONPATH"] = os.pathsep.join([str(hook), str(processes.ROOT)])
        self.process = processes.start(*command, **variables)

    def end(self) -> tuple[int, str]:
        """Exit code and everything printed."""
        code, out, err = processes.ended(self.process)
        return code, out + err

    def kill(self) -> None:
        """SIGKILL to every process of the run."""
        processes.kill(self.process)


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
