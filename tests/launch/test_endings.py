"""How a process ends that is stopped while it plans, whose reader has gone, or that is a world of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.launch import worker
from dconv.launch.__main__ import main
from dconv.launch.place import place
from dconv.launch.process import Stop
from tests.models import config_of, write_random
from tests.processes import call, ended, one_rank, start

#: A rank whose planning takes as long as a download may, and says when it has begun.
PLANNING = """
import concurrent.futures, sys, time
from dconv.errors import Refused
from dconv.launch import worker

def wait(seconds):
    print("planning", flush=True)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.05)

def alone(request):
    wait(60)

def with_threads(request):  # as huggingface_hub downloads: they hear no signal, and are waited for
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(wait, 60).result()

def to_a_refusal(request):
    wait(2)
    raise Refused("not this one")

worker.prepare = globals()[sys.argv.pop(1)]
from dconv.launch.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    family = by_name("llama")
    return write_random(tmp_path / "model", family, config_of(family))


def stopped(tmp_path: Path, planning: str, number: int, **variables: str) -> tuple[int, str, float]:
    """Exit code, standard error, and seconds from the signal to the end."""
    words = [sys.executable, "-c", PLANNING, planning, str(tmp_path), "megatron", "-o", str(tmp_path / "out")]
    rank = start(*words, **variables)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "planning\n"
    began = time.monotonic()
    rank.send_signal(number)
    code, _, err = ended(rank)
    return code, err, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("planning", ["alone", "with_threads"])
def test_a_planning_is_stopped(tmp_path: Path, planning: str, number: int) -> None:
    code, err, seconds = stopped(tmp_path, planning, number)
    assert (code, err.count("preempted (75)")) == (75, 1), err
    assert "Traceback" not in err
    assert seconds < 20
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_stops_the_other_ranks_and_the_refusal_is_said(tmp_path: Path) -> None:
    """Rank 0 of two is stopped because rank 1 refused first; it must come to its own refusal, which it prints."""
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}
    code, err, _ = stopped(tmp_path, "to_a_refusal", signal.SIGTERM, **world)
    assert (code, err.count("refused (3)")) == (3, 1), err
    code, err, seconds = stopped(tmp_path, "alone", signal.SIGINT, **world)  # a person does not wait
    assert code == 75
    assert seconds < 9
    code, err, seconds = stopped(tmp_path, "alone", signal.SIGTERM, **{**world, "LOCAL_RANK": "1", "RANK": "1"})
    assert (code, err) == (75, "")
    assert seconds < 9


@pytest.mark.parametrize("planning", ["alone", "with_threads"])
def test_a_rank_leaves_its_code_when_it_is_stopped(tmp_path: Path, planning: str) -> None:
    """Also where it cannot wait for its own end: a launcher ends with another code than its ranks."""
    codes = tmp_path / "codes"
    codes.mkdir()
    stopped(tmp_path, planning, signal.SIGTERM, DCONV_EXIT_CODES=str(codes), RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert {path.name: path.read_text() for path in codes.iterdir()} == {"1": "75\n"}


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--tp", "3"], 3), (["--no-such-option"], 2), (["--help"], 0)])
def test_a_rank_leaves_its_code(model: Path, tmp_path: Path, words: list[str], code: int) -> None:
    codes = tmp_path / "codes"
    codes.mkdir()
    given = one_rank(model, "megatron", "-o", tmp_path / "out", *words)
    assert call(*given, DCONV_EXIT_CODES=str(codes), SLURM_PROCID="0")[0] == code
    assert {path.name: path.read_text() for path in codes.iterdir()} == {"0": f"{code}\n"}


@pytest.mark.parametrize("fault", [PermissionError(13, "not yours"), MemoryError()])
def test_what_the_planning_meets(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Exception
) -> None:
    def fail(_: object) -> None:
        raise fault

    monkeypatch.setattr(worker, "prepare", fail)
    assert main([str(model), "megatron"]) == 5
    assert "storage (5)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ nobody reads on


@pytest.mark.parametrize("pipe", ["|", "2>&1 |"])
@pytest.mark.parametrize("words", ["convert MODEL hf -o OUT", "convert MODEL hf -o OUT --nproc 2", "inspect MODEL"])
def test_a_reader_that_has_gone(model: Path, tmp_path: Path, words: str, pipe: str) -> None:
    """The exit code is that of the command: what is committed is committed."""
    command = words.replace("MODEL", str(model)).replace("OUT", str(tmp_path / "out"))
    line = f"{sys.executable} -m dconv {command} {pipe} true; exit ${{PIPESTATUS[0]}}"
    code, _, err = call("bash", "-c", line)
    assert code == 0, err
    assert "storage" not in err
    assert "convert" not in words or (tmp_path / "out" / "dconv.json").is_file()
    code, _, err = call("bash", "-c", line.replace(command, f"convert {model} gguf"))
    assert code == 3, err


def test_a_name_that_no_encoding_has(model: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/caf\xe9"  # Latin-1
    command = [sys.executable, "-m", "dconv", "convert", model, "hf", "-o", out]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for code, said in ((0, b"-> "), (2, b"the output exists")):
        ran = subprocess.run(command, env=environment, capture_output=True)
        assert ran.returncode == code, ran.stderr
        assert said in ran.stdout + ran.stderr
        assert rb"caf\udce9" in ran.stdout + ran.stderr


# ------------------------------------------------------------------------------------------------- a world of one


def test_one_rank_has_no_faster_ranks(model: Path, tmp_path: Path) -> None:
    """In a shell that srun started, what an hour-old command made is not of this run."""
    for variables in (
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    ):
        assert place(variables).launched == float("inf")
        words = one_rank(model, "hf", "-o", tmp_path / f"out-{len(variables)}-{next(iter(variables))}")
        assert call(*words, **variables)[0] == 0
        code, _, err = call(*words, **variables)
        assert code == 2, err
        assert "the output exists" in err


def test_a_rank_with_nothing_to_say_lets_the_one_that_reports_get_to_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end makes torchrun stop rank 0, which on a busy machine has hardly started."""
    waited: list[float | None] = []
    monkeypatch.setattr(Stop, "wait", lambda _, timeout=None: waited.append(timeout))
    for rank in range(2):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        assert main([str(model), "megatron", "-o", str(tmp_path / "out"), "--tp", "3"]) == 3
        said = capsys.readouterr().err
        assert ("refused (3)" in said) == (rank == 0)
        assert len(waited) == rank
