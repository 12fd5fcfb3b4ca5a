"""``--launcher slurm``: what is submitted, what is refused before, and what becomes of whoever waits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dconv.arch.registry import by_name
from dconv.cli import main
from dconv.errors import ToolMissing
from dconv.launch import slurm
from dconv.pipeline import Request, prepare, run
from dconv.sharding.commit import Settings
from dconv.sharding.coords import Parallel
from tests.launch import slurm_stubs
from tests.launch.slurm_stubs import calls
from tests.models import config_of, write_random
from tests.processes import PATIENCE, ROOT, ended, start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    family = by_name("llama")
    return write_random(
        tmp_path / "model", family, config_of(family, hidden_size=64, intermediate_size=96, head_dim=16)
    )


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = slurm_stubs.write(tmp_path / "stubs", facts=f"JobId=7 JobState=PENDING StdOut={tmp_path}/7.log")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    for name in ("TORCHRUN", "GPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(slurm, "_POLL", 0.02)
    return folder


def submit(model: Path, *words: object, format: str = "megatron") -> int:
    return main(["convert", str(model), format, "-o", str(model.parent / "out"), "--launcher", "slurm",
                 *map(str, words)])  # fmt: skip


# ------------------------------------------------------------------------------------------------------- submitting


def test_what_is_submitted(stubs: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The launcher's options are sbatch's, all others the conversion's."""
    asked = ["--nodes", 4, "--nproc", 8, "--threads", 2, "--partition", "long", "--account", "us", "--time", "1-0",
             "--sbatch=--exclusive", "--sbatch=--qos=low", "--tp", 2, "--json"]  # fmt: skip
    assert submit(model, *asked) == 0
    (call,) = calls(stubs, "sbatch")
    options, _, words = call.partition(f" {ROOT}/slurm/convert.sbatch ")
    assert options.split() == [
        "--parsable", "--export=ALL", "--nodes=4", "--partition=long", "--account=us", "--time=1-0",
        "--cpus-per-task=16", "--exclusive", "--qos=low",
    ]  # fmt: skip
    assert words == f"{model} megatron -o {model.parent}/out --threads 2 --tp 2 --json"
    environment = (stubs / "environment").read_text().splitlines()
    assert "NPROC=8" in environment
    assert f"DCONV_SLURM={ROOT}/slurm" in environment
    assert f"TORCHRUN={Path(sys.executable).with_name('torchrun')}" in environment
    result = json.loads(capsys.readouterr().out)
    assert (result["job"], result["log"]) == ("7", f"{model.parent}/7.log")
    wanted = Request(model, "megatron", model.parent / "out", parallel=Parallel(tp=2, etp=2))
    assert result["plan"] == prepare(wanted).plan.id


def test_calibration_has_its_own_script(
    stubs: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="calibration runs transformers' layers")
    np.save(tmp_path / "ids.npy", np.zeros((2, 64), np.int64))
    words = ["--calibration", tmp_path / "ids.npy", "--quantization-config",
             '{"bits": 4, "group_size": 32, "nsamples": 2, "seqlen": 64}']  # fmt: skip
    assert submit(model, *words, format="gptq") == 0
    monkeypatch.setenv("GPUS", "8")
    assert submit(model, *words, format="gptq") == 0
    first, second = calls(stubs, "sbatch")
    assert f"{ROOT}/slurm/quantise.sbatch {model} gptq" in first
    assert ("--gpus-per-node" in first, "--gpus-per-node=8" in second) == (False, True)


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--tp", 3], 3), (["--model-type", "lama"], 3), (["-o", "exists"], 2), (["--dtype", "f7"], 2)],
)
def test_refused_before_there_is_a_job(stubs: Path, model: Path, options: list[object], code: int) -> None:
    (model.parent / "exists").mkdir()
    (model.parent / "exists" / "file").touch()
    assert submit(model, *(model.parent / "exists" if word == "exists" else word for word in options)) == code
    assert not calls(stubs, "sbatch")


def test_done_already(stubs: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(prepare(Request(model, "megatron", model.parent / "out")), Settings())
    assert submit(model, "--resume") == 0
    assert capsys.readouterr().out == f"already done: {model.parent}/out\n"
    assert not calls(stubs, "sbatch")


def test_no_slurm_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(model) == 7
    said = capsys.readouterr().err
    assert said.startswith("tool (7)  there is no sbatch")
    assert "--launcher torchrun" in said


def test_slurm_does_not_take_it(stubs: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stubs / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: none' >&2; exit 1\n")
    assert submit(model, "--partition", "none") == 7
    assert "invalid partition specified: none" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- waiting

LOG = """[rank 1] storage (5)  an error of another run
refused (3)  one thing
  where      here
refused (3)  another thing
  where      there
  expected   words
torchrun's own table
"""


@pytest.mark.parametrize(
    ("facts", "code", "words"),
    [
        ("JobState=FAILED ExitCode=3:0", 3, ["refused (3)  another thing", "where      there", "expected   words"]),
        ("JobState=FAILED ExitCode=75:0", 75, ["preempted (75)", "--resume"]),
        ("JobState=TIMEOUT ExitCode=0:15", 75, ["preempted (75)", "TIMEOUT", "--resume"]),
        ("JobState=CANCELLED ExitCode=0:15", 75, ["CANCELLED"]),
        ("JobState=FAILED ExitCode=137:0", 7, ["exit code 137:0"]),
        ("", 7, ["SLURM has forgotten it"]),
    ],
)
def test_a_failure_is_told(
    stubs: Path, model: Path, capsys: pytest.CaptureFixture[str], facts: str, code: int, words: list[str]
) -> None:
    """With the conversion's exit code, its own words and the log, also where SLURM has requeued the job meanwhile."""
    log = model.parent / "log of 7.txt"
    log.write_text(LOG)
    # What scontrol says at the submission, and then at the end.
    (stubs / "scontrol").write_text(
        f"#!/usr/bin/env bash\n[[ -e {stubs}/asked ]] || {{ touch {stubs}/asked; echo '   StdOut={log}'; exit; }}\n"
        f'[[ "{facts}" ]] && echo "JobId=7 {facts}"\n'
    )
    (stubs / "states").write_text("PENDING (Priority)\nRUNNING n0\nPENDING (BeginTime)\nRUNNING n1\ngone\n")
    assert submit(model, "--wait") == code
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert str(log) in said
    assert "one thing" not in said.replace("another thing", "")
    assert [line for line in said.splitlines() if line.startswith("job 7: ")] == [
        "job 7: pending (Priority)", "job 7: running n0", "job 7: pending (BeginTime)", "job 7: running n1",
    ]  # fmt: skip


def test_a_receipt_speaks_where_slurm_has_forgotten(stubs: Path, model: Path, tmp_path: Path) -> None:
    """An output of this job, not of one before it."""
    (stubs / "facts").write_text("")
    run(prepare(Request(model, "megatron", tmp_path / "out")), Settings())
    assert submit(model, "--wait", "--quiet", "--overwrite") == 0
    receipt = json.loads((tmp_path / "out" / "dconv.json").read_text())
    (tmp_path / "out" / "dconv.json").write_text(json.dumps({**receipt, "finished": time.time() - 3600}))
    assert submit(model, "--wait", "--quiet", "--overwrite") == 7


def test_an_answer_that_does_not_come_is_asked_for_again(stubs: Path, model: Path) -> None:
    """A controller that restarts knows the job afterwards."""
    (stubs / "squeue").write_text(
        f"#!/usr/bin/env bash\n[[ -e {stubs}/asked ]] && exit\ntouch {stubs}/asked\n"
        "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1\n"
    )
    (stubs / "facts").write_text("JobId=7 JobState=COMPLETED ExitCode=0:0\n")
    assert submit(model, "--wait", "--quiet") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_waits_may_leave(stubs: Path, model: Path, number: signal.Signals) -> None:
    (stubs / "states").write_text("RUNNING n0\n")
    waiting = start(sys.executable, "-m", "dconv", "convert", str(model), "megatron", "-o", str(model.parent / "out"),
                    "--launcher", "slurm", "--wait")  # fmt: skip
    limit = time.monotonic() + PATIENCE
    while not calls(stubs, "squeue") and waiting.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.02)
    waiting.send_signal(number)
    code, _, err = ended(waiting)
    assert code == 75, err
    assert "the job goes on" in err
    assert "scancel 7" in err
    assert not calls(stubs, "scancel")


# ------------------------------------------------------------------------------------------------------- the scripts


def test_scripts_of_a_wheel(tmp_path: Path) -> None:
    """A wheel brings them along; installed, they lie under the environment's share, and are found there."""
    source = tmp_path / "source"
    for name in ("dconv", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "unpacked")
    (data,) = (tmp_path / "unpacked").glob("*.data/data")
    package = tmp_path / "unpacked" / "dconv"
    found = slurm.scripts(package, str(data))
    assert found == data / "share" / "dconv" / "slurm"
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        path.name: path.read_bytes() for path in (ROOT / "slurm").iterdir()
    }
    with pytest.raises(ToolMissing, match="scripts for SLURM"):
        slurm.scripts(package, str(tmp_path))
