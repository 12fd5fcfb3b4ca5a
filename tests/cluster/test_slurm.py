"""The batch scripts in a real SLURM of two nodes: the same bytes, also after jobs were stopped and requeued."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dconv.pipeline import prepare, run
from dconv.sharding.commit import Settings
from tests.cluster.slurm import Slurm
from tests.launched import OPTIONS, by_one_rank, small_llama
from tests.models import tree_digest
from tests.processes import ROOT, call

TWO_NODES = ("--nodes=2", "--cpus-per-task=1")
PREEMPTED = 75

#: Ranks stop before their third task until they are told to leave, as long as the file that HOLD names is there.
HOOK = """
import os
if "HOLD" in os.environ and "RANK" in os.environ:
    import time
    from dconv.launch.process import Stop
    from dconv.sharding.execute import Worker
    own_told, own_do, told, begun = Stop._told, Worker.do, [], []
    def hear(self, number):
        told.append(number)
        own_told(self, number)
    def do(self, task):
        begun.append(task)
        while len(begun) > 2 and not told and os.path.exists(os.environ["HOLD"]):
            time.sleep(0.02)
        return own_do(self, task)
    Stop._told, Worker.do = hear, do
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, str]:
    """What one rank makes of `model` with `OPTIONS`."""
    return by_one_rank(model)


def litter(folder: Path) -> set[str]:
    """What lies in ``folder`` beside outputs and logs."""
    return {path.name for path in folder.iterdir() if path.suffix != ".log"} - {"out", "hook"}


# ------------------------------------------------------------------------------------------------------ undisturbed


def test_two_nodes(slurm: Slurm, model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Two ranks on each: the bytes of one rank alone, one summary."""
    job = slurm.submit(tmp_path, "convert", model, "megatron", "-o", "out", *OPTIONS,
                       options=("--nodes=2", "--cpus-per-task=2"))  # fmt: skip
    facts, said = slurm.until_ended(job), slurm.log(tmp_path, job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0"), said
    assert tree_digest(tmp_path / "out") == expected
    assert said.count("with 4 ranks, bit-exact") == 1  # torchrun may grumble that the other node has left already
    assert not litter(tmp_path)


def test_array(slurm: Slurm, model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Three models, two at a time; a line's quotes are a shell's, and the options behind FILE are everyone's."""
    names = ["one", "a name with spaces", "three"]
    lines = ["# models", *(f"'{model}' megatron -o '{name}'" for name in names)]
    (tmp_path / "models.txt").write_text("\n\n".join(lines) + "\n")
    job = slurm.submit(tmp_path, "array", "models.txt", *OPTIONS, options=("--array=1-3%2", "--cpus-per-task=1"))
    slurm.until_ended(job)
    said = slurm.log(tmp_path, job)
    for name in names:
        assert tree_digest(tmp_path / name) == expected, said
    assert said.count("wrote ") == 3
    tasks = [slurm.facts(f"{job}_{task}") for task in (1, 2, 3)]
    assert {task["JobState"] for task in tasks} == {"COMPLETED"}
    begun, ended = (sorted(task[name] for task in tasks) for name in ("StartTime", "EndTime"))
    assert begun[2] >= ended[0]  # the third waited for one of the two


def test_gptq_on_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    """Ranks that talk to each other find each other, and choose the codes that one alone chooses."""
    pytest.importorskip("transformers", reason="calibration runs transformers' layers")
    from tests.quant.calibrated import model_of, request_for

    model = model_of("llama", tmp_path / "model")
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 61, (12, 512)))
    request = request_for(model, ids, tmp_path / "one")
    run(prepare(request), Settings())
    job = slurm.submit(tmp_path, "quantise", model, "gptq", "-o", "out", "--calibration", ids, "--quantization-config",
                       request.quantization_config, options=TWO_NODES)  # fmt: skip
    facts, said = slurm.until_ended(job), slurm.log(tmp_path, job)
    assert facts["ExitCode"] == "0:0", said
    one, two = (tree_digest(tmp_path / name)["model.safetensors"] for name in ("one", "out"))
    assert one == two
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["weights"]


# ---------------------------------------------------------------------------------------------------------- stopped


class Held:
    """A conversion by two nodes whose ranks are each held up when two tasks are done."""

    def __init__(self, slurm: Slurm, folder: Path, model: Path, *options: str) -> None:
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)
        self.slurm, self.folder, self._hold = slurm, folder, folder / "hook" / "hold"
        self._hold.touch()
        self.job = slurm.submit(folder, "convert", model, "megatron", "-o", "out", *OPTIONS,
                                options=(*TWO_NODES, *options), HOLD=str(self._hold),
                                PYTHONPATH=f"{folder / 'hook'}:{ROOT}")  # fmt: skip
        slurm.until(lambda: self.journaled() == [2, 2], self.job)

    def journaled(self) -> list[int]:
        """Finished tasks of each rank."""
        paths = sorted(self.folder.glob("out.partial-*/.dconv/journal/*"))
        return [path.read_text().count("done ") for path in paths]

    def said(self) -> str:
        return self.slurm.log(self.folder, self.job)

    def ended_with(self) -> list[int]:
        """The exit codes of the job's batch shells, as the nodes' daemons saw them."""
        seen = "".join(path.read_text() for path in sorted((self.slurm.top / "log").glob("slurmd.*.log")))
        return [
            int(line.rpartition("exit code ")[2].rstrip("."))
            for line in seen.splitlines()
            if f"[{self.job}.batch] task 0" in line and "exited with exit code" in line
        ]

    def goes_on(self) -> dict[str, str]:
        """Wait until it is in the queue again, and let it run without being held up; its end."""
        self.slurm.until(lambda: self.slurm.facts(self.job)["Restarts"] == "1", self.job)
        self._hold.unlink()
        return self.slurm.until_ended(self.job)


def has_resumed(held: Held, facts: dict[str, str], expected: dict[str, str]) -> None:
    """The same bytes, of which each rank found what it had done before."""
    said = held.said()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert tree_digest(held.folder / "out") == expected
    assert said.count("with 2 ranks, bit-exact") == 1
    assert "of an earlier run (checked)" in said.partition("with 2 ranks, bit-exact")[2], said
    assert not litter(held.folder)


def test_preempted(slurm: Slurm, model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """USR1 to the batch shell, as before the time limit: ranks leave, the job requeues itself with 75 and goes on."""
    held = Held(slurm, tmp_path, model)
    slurm.call("scancel", "--batch", "--signal=USR1", held.job)
    facts = held.goes_on()
    assert held.ended_with() == [PREEMPTED, 0]
    assert "tasks finished: requeued" in held.said()
    has_resumed(held, facts, expected)


@pytest.mark.long
@pytest.mark.parametrize("how", ["requeue", "by another job", "by another job, with grace", "time limit"])
def test_stopped_by_slurm(slurm: Slurm, model: Path, expected: dict[str, str], tmp_path: Path, how: str) -> None:
    """An operator's requeue, a partition that goes first (TERM to the ranks, or USR1 to the batch shell), and time."""
    options = {"by another job, with grace": ["--partition=grace"], "time limit": ["--time=4"]}
    held = Held(slurm, tmp_path, model, *options.get(how, []), "--exclusive")
    if how == "requeue":
        slurm.call("scontrol", "requeue", held.job)
    elif how != "time limit":
        slurm.call("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    has_resumed(held, held.goes_on(), expected)


@pytest.mark.long
def test_cancelled(slurm: Slurm, model: Path, tmp_path: Path) -> None:
    """What a person ends stays ended; what is finished is kept."""
    held = Held(slurm, tmp_path, model)
    slurm.call("scancel", held.job)
    facts = slurm.until_ended(held.job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0"), held.said()
    assert len(held.journaled()) == 2
    assert not [name for name in litter(tmp_path) if not name.startswith("out.partial-")]


def test_refused_is_not_requeued(slurm: Slurm, model: Path, tmp_path: Path) -> None:
    """The conversion's own exit code, not torchrun's."""
    job = slurm.submit(tmp_path, "convert", model, "megatron", "-o", "out", "--tp", 3, options=("--cpus-per-task=1",))
    facts = slurm.until_ended(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "3:0", "0")
    assert "refused (3)" in slurm.log(tmp_path, job)
    assert not litter(tmp_path)


# ---------------------------------------------------------------------------------------------------------- submitted


def test_launcher(slurm: Slurm, model: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """``--launcher slurm --wait``: returns when the output is there."""
    command = [sys.executable, "-m", "dconv", "convert", model, "megatron", "-o", tmp_path / "out", *OPTIONS]
    code, out, err = call(
        *map(str, command), "--launcher", "slurm", "--nproc", "2", f"--sbatch=--output={tmp_path}/%j.log", "--wait",
        **slurm.variables,
    )  # fmt: skip
    assert code == 0, err
    (log,) = tmp_path.glob("*.log")
    assert f"done: job {log.stem}   log {log}" in out
    assert f"job {log.stem}: running" in err
    assert "with 2 ranks" in log.read_text()
    assert tree_digest(tmp_path / "out") == expected
    assert slurm.facts(log.stem)["JobState"] == "COMPLETED"
