"""``dconv history``: what was asked and what came of it, by any number of writers, and never at a conversion's cost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dconv.arch import registry
from dconv.cli import main
from dconv.launch import history
from tests.models import config_of, write_random

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "history.sqlite"
    monkeypatch.setenv(history.VARIABLE, str(path))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    family = registry.by_name("llama")
    return write_random(tmp_path / "model", family, config_of(family))


def told(*words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(["history", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_written_down_and_done_again(
    kept: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "model", "megatron", "--tp", "2", "--nproc", "2", "-o", "out", "--quiet"]) == 0
    assert main(["convert", "model", "megatron", "--tp", "2", "-o", "out", "--quiet"]) == 2
    failed, done = told(capsys=capsys)
    assert (done["state"], failed["state"], failed["code"]) == ("done", "failed", 2)
    assert "the output exists" in failed["error"]
    receipt = json.loads((tmp_path / "out" / "dconv.json").read_text())
    assert done["plan"] == receipt["plan"] and done["ranks"] == 2 and done["family"] == "llama"
    assert done["bytes_written"] > 0 and done["rate"] > 0
    monkeypatch.chdir("/")
    assert main(["history", "rerun", str(done["id"])]) == 2
    assert main(["history", "rerun", str(done["id"]), "-o", str(tmp_path / "again")]) == 0
    again = told("show", "4", capsys=capsys)
    assert again["target_digest"] == done["target_digest"] and again["source_digest"] == done["source_digest"]
    assert main(["history"]) == 0
    assert "model -> megatron" in capsys.readouterr().out
    assert main(["history", "show", "2"]) == 0
    assert "the output exists" in capsys.readouterr().out


def test_ranks_of_a_launcher_write_one_run(kept: Path, model: Path, tmp_path: Path) -> None:
    """Rank 0 writes it down. It comes first here and does all; rank 1 finds everything done."""
    words = [sys.executable, "-m", "dconv.launch", str(model), "megatron", "--tp", "2", "-o", str(tmp_path / "out")]
    for rank in (0, 1):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        subprocess.run([*words, "--quiet"], env={**os.environ, **place}, cwd=ROOT, check=True)
        (found,) = history.runs(kept)
        assert found["state"] == "done"
    assert found["words"][-2:] == ["--nproc", "2"]


def test_a_run_that_was_killed_is_lost(kept: Path, model: Path, tmp_path: Path) -> None:
    record = history.Record(kept)
    record.begin(["a", "b"], model, "hf", tmp_path / "out", 1)
    assert history.runs(kept)[0]["state"] == "running"
    code = (
        "import os, signal, sys; from pathlib import Path; from dconv.launch.history import Record\n"
        "Record(Path(sys.argv[1])).begin([], Path('m'), 'hf', Path('o'), 1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(kept)], cwd=ROOT).returncode == -signal.SIGKILL
    assert [run["state"] for run in history.runs(kept)] == ["lost", "running"]
    record.note(error="no room")
    record.end(75)
    assert history.runs(kept, number=1)[0]["state"] == "preempted"


def _write(path: Path, writer: int) -> None:
    for number in range(25):
        record = history.Record(path)
        record.begin([str(writer), str(number)], Path("model"), "hf", Path("out"), 1)
        record.end(3)


def test_many_writers_at_once_lose_nothing(kept: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_write, [kept] * 4, range(4)))
    found = history.runs(kept)
    assert sorted(tuple(map(int, run["words"])) for run in found) == [(w, n) for w in range(4) for n in range(25)]
    assert {run["code"] for run in found} == {3} and len({run["id"] for run in found}) == 100


@pytest.mark.parametrize("wrong", ["a folder", "no database", "in use"])
def test_no_run_fails_because_of_its_history(
    wrong: str, kept: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kept.parent.mkdir()
    held = None
    if wrong == "a folder":
        kept.mkdir()
    elif wrong == "no database":
        kept.write_text("these are no pages of SQLite, and never were" * 40)
    else:
        monkeypatch.setattr(history, "_WAITING", 0.1)
        held = sqlite3.connect(kept)
        held.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    assert main(["convert", str(model), "hf", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert "history: not written" in capsys.readouterr().err
    assert time.monotonic() - began < 60
    if held is not None:
        held.close()


def test_what_there_is_not(kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["history"]) == 0
    assert "no run yet" in capsys.readouterr().out
    assert main(["history", "show", "7"]) == 2
    assert main(["history", "rerun"]) == 2
    assert main(["history", "forget", "7"]) == 2
    monkeypatch.setenv(history.VARIABLE, "off")
    assert main(["history"]) == 2


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE runs SET words = 'no JSON'",
        "UPDATE runs SET words = 7",
        "UPDATE runs SET ended = 'noon'",
        "UPDATE runs SET bytes_written = 'many'",
    ],
)
def test_rows_that_nobody_wrote_so(
    change: str, kept: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model), "hf", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    with sqlite3.connect(kept) as file:
        file.execute(change)
    file.close()
    assert main(["history"]) == 5
    assert "the history cannot be read" in capsys.readouterr().err


def test_its_place(tmp_path: Path) -> None:
    assert history.place({"XDG_STATE_HOME": "/s"}) == Path("/s/dconv/history.sqlite")
    assert history.place({"XDG_STATE_HOME": "relative"}) == Path("~/.local/state/dconv/history.sqlite").expanduser()
    assert history.place({history.VARIABLE: "/h.sqlite", "XDG_STATE_HOME": "/s"}) == Path("/h.sqlite")
    assert history.place({history.VARIABLE: "off"}) is None


def test_a_command_is_shown_as_a_shell_takes_it(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["my model", "gptq", "--quantization-config", '{"bits": 8}']
    history.Record(kept).begin(words, Path("my model"), "gptq", tmp_path / "out", 1)
    assert main(["history", "show", "1"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("command"))
    assert shlex.split(line)[1:] == ["dconv", "convert", *words]
