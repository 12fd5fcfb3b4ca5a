"""How a batch script of ``slurm/`` ends: requeued, or with the conversion's own exit code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from tests.launch import slurm_stubs
from tests.launch.slurm_stubs import calls
from tests.processes import LAUNCHERS, ROOT

SCRIPTS = ROOT / "slurm"


def batch(
    folder: Path, *words: object, script: Path = SCRIPTS / "convert.sbatch", job: bool = True, **variables: str
) -> tuple[int, str]:
    """Run a script in ``folder`` as SLURM does, with two ranks on one node; its exit code and what it wrote."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith((*LAUNCHERS, "SBATCH_", "DCONV_"))}
    in_job = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_CPUS_PER_TASK": "2",
        "SLURM_SUBMIT_DIR": str(folder), "NPROC": "2", "CODE": "0", "RANKS": "",
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
    } if job else {}  # fmt: skip
    path = f"{folder / 'stubs'}:{os.environ['PATH']}"
    ran = subprocess.run(["bash", script, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120,
                         env={**kept, "PATH": path, "PYTHONPATH": str(ROOT), **in_job, **variables})  # fmt: skip
    return ran.returncode, ran.stdout + ran.stderr


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    return slurm_stubs.write(tmp_path / "stubs")


WORDS = ("model", "megatron", "-o", "out")


@pytest.mark.parametrize(
    ("ranks", "code", "ended", "requeued"),
    [
        ("0 0", "0", 0, False),
        ("0 0", "1", 0, False),  # torchrun failed when its ranks had not
        ("3 75", "1", 3, False),  # torchrun told the other one to leave
        ("75 4", "1", 4, False),
        ("75 75", "1", 75, True),
        ("0 75", "1", 75, True),
        ("75", "1", 1, False),  # the other one was killed
        ("", "137", 137, False),
    ],
)
def test_the_ranks_codes_decide(stubs: Path, tmp_path: Path, ranks: str, code: str, ended: int, requeued: bool) -> None:
    got, said = batch(tmp_path, *WORDS, RANKS=ranks, CODE=code)
    assert got == ended, said
    assert [call for call in calls(stubs, "scontrol") if call.startswith("requeue")] == ["requeue 7"] * requeued
    assert (tmp_path / ".dconv-job-7").exists() is requeued


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_signal_is_passed_on_to_the_step(stubs: Path, tmp_path: Path, number: str) -> None:
    """And ranks that were killed before they could say a word are not held to have failed."""
    got, said = batch(tmp_path, *WORDS, SIGNAL=number, CODE="1", RANKS="75")
    assert got == 75, said
    assert calls(stubs, "scancel") == ["--signal=TERM 7.0"]
    assert len(calls(stubs, "squeue")) == 2  # not before there was one: scancel says nothing then
    assert "requeue 7" in calls(stubs, "scontrol")


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_what_slurm_ends_itself_is_not_requeued(tmp_path: Path, state: str) -> None:
    stubs = slurm_stubs.write(tmp_path / "stubs", facts=f"JobId=7 JobState={state} Reason=None")
    got, said = batch(tmp_path, *WORDS, RANKS="75 75", CODE="1")
    assert got == 75, said
    assert not [call for call in calls(stubs, "scontrol") if call.startswith("requeue")]
    assert not (tmp_path / ".dconv-job-7").exists()


def test_no_endless_requeues(stubs: Path, tmp_path: Path) -> None:
    """One in a row that finishes nothing, as was asked here; one that finishes a task begins the count anew."""
    journal = tmp_path / "out.partial-abc" / ".dconv" / "journal"
    journal.mkdir(parents=True)

    def stopped(restarts: int) -> str:
        code, said = batch(tmp_path, *WORDS, RANKS="75 75", CODE="1", SLURM_RESTART_COUNT=str(restarts),
                           IDLE_REQUEUES="1")  # fmt: skip
        assert code == 75
        return said

    assert "stopped with 0 tasks finished: requeued" in stopped(0)
    for number, tasks in ((1, [0, 1]), (2, [1])):  # the second noted again what it found whole
        lines = [f"done {task} {task:032x}" for task in tasks]
        checked = [f"{line} {xxhash.xxh3_64_hexdigest(line.encode())}\n" for line in lines]
        (journal / f"{number}-1-a").write_text("".join(checked) + "done 5 torn")
    assert "stopped with 2 tasks finished: requeued" in stopped(1)
    assert "stopped with 2 tasks finished: requeued" in stopped(2)
    assert "not requeued" in stopped(3)
    assert len([call for call in calls(stubs, "scontrol") if call.startswith("requeue")]) == 3
    assert not (tmp_path / ".dconv-job-7").exists()


def test_a_task_of_an_array_is_requeued_alone(stubs: Path, tmp_path: Path) -> None:
    """The last task of an array has the array's own number: SLURM would requeue all of them."""
    (tmp_path / "models").write_text("# first\n\na megatron -o 'b c'\n$(touch here) gguf\n")
    batch(tmp_path, "models", "--quiet", script=SCRIPTS / "array.sbatch", RANKS="75 75", CODE="1",
          SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")  # fmt: skip
    assert "requeue 7_1" in calls(stubs, "scontrol")
    assert calls(stubs, "srun")[0].endswith("node.sh a megatron -o b c --quiet")
    batch(tmp_path, "models", script=SCRIPTS / "array.sbatch", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert calls(stubs, "srun")[1].endswith("node.sh $(touch here) gguf")
    code, said = batch(tmp_path, "models", script=SCRIPTS / "array.sbatch", SLURM_ARRAY_JOB_ID="7",
                       SLURM_ARRAY_TASK_ID="3")  # fmt: skip
    assert (code, "has no line 3" in said) == (2, True)


def test_a_second_start_resumes(stubs: Path, tmp_path: Path) -> None:
    batch(tmp_path, *WORDS)
    batch(tmp_path, *WORDS, SLURM_RESTART_COUNT="1")
    assert [call.partition("node.sh ")[2] for call in calls(stubs, "srun")] == [
        "model megatron -o out", "model megatron -o out --resume",
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["Command", "DCONV_SLURM", "SLURM_SUBMIT_DIR"])
def test_a_copy_in_the_spool_finds_the_others(tmp_path: Path, how: str) -> None:
    facts = f"JobId=7 JobState=RUNNING Command={SCRIPTS}/convert.sbatch model megatron WorkDir=/"
    slurm_stubs.write(tmp_path / "stubs", facts=facts if how == "Command" else "")
    spooled = tmp_path / "spool" / "slurm_script"
    spooled.parent.mkdir()
    shutil.copy(SCRIPTS / "convert.sbatch", spooled)
    place = {"DCONV_SLURM": {"DCONV_SLURM": str(SCRIPTS)}, "SLURM_SUBMIT_DIR": {"SLURM_SUBMIT_DIR": str(ROOT)}}
    code, said = batch(tmp_path, *WORDS, script=spooled, DCONV_STATE=str(tmp_path), **place.get(how, {}))
    assert code == 0, said


@pytest.mark.parametrize("gpus", ["", "8"])
def test_outside_of_a_job_a_script_submits_itself(stubs: Path, tmp_path: Path, gpus: str) -> None:
    code, said = batch(tmp_path, *WORDS, script=SCRIPTS / "quantise.sbatch", job=False, GPUS=gpus)
    assert (code, said) == (0, "7\n")
    asked = "--gpus-per-node=8 " if gpus else ""
    assert calls(stubs, "sbatch") == [f"{asked}{SCRIPTS}/quantise.sbatch model megatron -o out"]


def test_gpus_of_a_job_are_ranks(stubs: Path, tmp_path: Path) -> None:
    """One rank each; without any, one rank with all cores."""
    for variables in ({"SLURM_GPUS_ON_NODE": "4", "RANKS": "0 0 0 0"}, {"RANKS": "0"}):
        code, said = batch(tmp_path, *WORDS, script=SCRIPTS / "quantise.sbatch", SLURM_CPUS_PER_TASK="8", NPROC="",
                           CODE="1", **variables)  # fmt: skip
        assert code == 0, said  # as many as expected came to their end
    with_gpus, without = calls(stubs, "srun")
    assert "node.sh --threads 2 model" in with_gpus
    assert "node.sh --threads 8 model" in without


@pytest.mark.parametrize(("nodes", "number", "host"), [(1, 0, ""), (2, 0, "is_host=true"), (2, 1, "is_host=false")])
def test_a_node_starts_torchrun(tmp_path: Path, nodes: int, number: int, host: str) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)
    variables = {
        "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_NODEID": str(number), "SLURM_JOB_ID": "7", "HEAD_ADDR": "n0",
        "RDZV_PORT": "10007", "NPROC": "3", "TORCHRUN": str(torchrun), "PATH": os.environ["PATH"],
    }  # fmt: skip
    ran = subprocess.run(["bash", SCRIPTS / "node.sh", *WORDS], env=variables, capture_output=True, text=True)
    words = ran.stdout.splitlines()
    where = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "n0:10007", "--rdzv-id", "dconv-7-0",
             "--rdzv-conf", host]  # fmt: skip
    assert words == [*(where if host else ["--standalone"]), "--max-restarts", "0", "--nproc-per-node", "3", "-m",
                     "dconv.launch", *WORDS]  # fmt: skip
