"""One digest over launchers, world sizes and resumed runs: local, torchrun, Ray, SLURM x 1, 2, 3, 4, 8 ranks."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.errors import Preempted
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.slurm import Slurm
from tests.models import config_of, tree_digest, write_random
from tests.processes import call

WORLDS = (1, 2, 3, 4, 8)
#: Run by default.
SAMPLE = {("local", 3, False), ("torchrun", 3, True), ("ray", 3, True), ("slurm", 4, True)}
CASES = [
    pytest.param(
        launcher, world, resumed,
        marks=[pytest.mark.long] * ((launcher, world, resumed) not in SAMPLE),
        id=f"{launcher}-{world}{'-resumed' * resumed}",
    )
    for launcher in ("local", "torchrun", "ray", "slurm")
    for world in WORLDS
    for resumed in (False, True)
]  # fmt: skip
OPTIONS = ("--tp", "2", "--pp", "2", "--make-vocab-size-divisible-by", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = by_name("llama")
    config = config_of(family, hidden_size=64, intermediate_size=192, vocab_size=301, num_hidden_layers=6, head_dim=16)
    return write_random(tmp_path_factory.mktemp("source") / "model", family, config, shard_size=400_000)


def job_of(model: Path, out: Path) -> Job:
    return prepare(Request(model, "megatron", out, parallel=Parallel(tp=2, pp=2, etp=2), divisor=8))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, str]:
    """What one rank makes of `model`, never stopped."""
    run(job_of(model, model.parent / "expected"), Settings())
    return tree_digest(model.parent / "expected")


def half(job: Job) -> None:
    """A run of two ranks that was stopped: each has done half of its share."""
    for rank in range(2):
        stop = threading.Event()

        def progress(done: int, share: int, stop: threading.Event = stop) -> None:
            if done > share / 2:
                stop.set()

        with pytest.raises(Preempted):
            run(job, Settings(rank, 2, stop=stop, progress=progress))


@pytest.fixture
def launched(request: pytest.FixtureRequest) -> Callable[..., tuple[int, str, str]]:
    """Runs a conversion under a launcher: exit code, standard output, standard error."""
    dconv = [sys.executable, "-m", "dconv", "convert"]

    def local(world: int, *words: str) -> tuple[int, str, str]:
        return call(*dconv, *words, "--nproc", str(world))

    def torchrun(world: int, *words: str) -> tuple[int, str, str]:
        return call(*dconv, *words, "--launcher", "torchrun", "--nproc", str(world))

    def ray(world: int, *words: str) -> tuple[int, str, str]:
        cluster: RayCluster = request.getfixturevalue("ray_cluster")
        cluster.hold()
        share = str(min(1.0, 4 / world))  # the cluster has four cores
        return cluster.call(*words, "--nproc", world, "--cpus-per-rank", share)

    def slurm(world: int, *words: str) -> tuple[int, str, str]:
        cluster: Slurm = request.getfixturevalue("slurm")
        nodes = 1 if world % 2 else 2
        folder = request.getfixturevalue("tmp_path")
        wide = ("--nodes", str(nodes), "--nproc", str(world // nodes), "--sbatch=--cpus-per-task=1")
        here = (f"--sbatch=--chdir={folder}", f"--sbatch=--output={folder}/%j.log")
        return call(*dconv, *words, "--launcher", "slurm", *wide, *here, "--wait", **cluster.variables)

    return {"local": local, "torchrun": torchrun, "ray": ray, "slurm": slurm}[request.node.callspec.params["launcher"]]


@pytest.mark.parametrize(("launcher", "world", "resumed"), CASES)
def test_same_digest(
    launched: Callable[..., tuple[int, str, str]], model: Path, expected: dict[str, str], tmp_path: Path,
    launcher: str, world: int, resumed: bool,
) -> None:  # fmt: skip
    """Bytes and the receipt's digests of tensors; what a stopped run had finished is kept, and said."""
    out = tmp_path / "out"
    if resumed:
        half(job_of(model, out))
    code, said, err = launched(world, str(model), "megatron", "-o", str(out), *OPTIONS)
    assert code == 0, said + err
    assert tree_digest(out) == expected
    mine, one = (json.loads((folder / "dconv.json").read_text()) for folder in (out, model.parent / "expected"))
    assert mine["tensors"] == one["tensors"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]
