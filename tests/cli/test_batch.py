"""``dconv batch``: every job of a file is done once, in any order, and what fails passes on its reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dconv.arch import registry
from dconv.cli import main
from dconv.launch import batch
from dconv.launch.options import every_option, parse
from tests.models import config_of, tree_digest, write_random

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    family = registry.by_name("llama")
    return write_random(tmp_path / "model", family, config_of(family))


def jobs(folder: Path, text: str) -> str:
    (folder / "jobs.yaml").write_text(text)
    return str(folder / "jobs.yaml")


def told(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    code = main(["batch", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


THREE = """
format: megatron
tp: 2
make-vocab-size-divisible-by: 16
models:
  - {model: model, out: one}
  - {model: model, out: two, pp: 2, nproc: 2}
  - {model: model, out: three, format: hf, tp: null, make_vocab_size_divisible_by: 128, drop: ["*nothing*"]}
"""


def test_every_job_is_done_as_alone_and_then_found_done(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = told(jobs(tmp_path, THREE), "--workers", "2", "--max-retries", "0", capsys=capsys)
    assert [one["state"] for one in said] == ["done", "done", "failed"]
    assert code == said[2]["code"] == 2 and "nothing" in json.dumps(said[2]["said"])
    alone = ["convert", "model", "megatron", "--tp", "2", "--pp", "2", "--make-vocab-size-divisible-by", "16"]
    assert main([*alone, "-o", "alone", "--quiet"]) == 0
    skipped = ("dconv.json",)
    wanted = {name: one for name, one in tree_digest(tmp_path / "alone").items() if name not in skipped}
    assert {name: one for name, one in tree_digest(tmp_path / "two").items() if name not in skipped} == wanted
    before = (tmp_path / "one" / "dconv.json").stat().st_mtime_ns
    code, said = told(jobs(tmp_path, THREE.replace(', drop: ["*nothing*"]', "")), capsys=capsys)
    assert (code, [one["state"] for one in said]) == (0, ["done"] * 3)
    assert said[0]["said"]["already_done"] and (tmp_path / "one" / "dconv.json").stat().st_mtime_ns == before
    assert main(["batch", str(tmp_path / "jobs.yaml"), "--quiet"]) == 0
    assert "3 done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"pp_layout": "1|2|1"},
        {"pp_layout": "Ett|ttL", "vpp": 1},
        {"format": "onnx", "lengths": "1+16"},
        {"format": "onnx", "lengths": 16},
        {"format": "fp8", "block_size": "32x64", "max_memory": 1.5e9},
        {"launcher": "slurm", "sbatch": ["--gres=gpu:8", "--exclusive"], "time": "4:00:00"},
        {"drop": ["-odd", "b c"], "report": True, "threads": "auto", "dtype": "bfloat16", "digest": "sha256"},
        {"report": "page.html", "quiet": True, "resume": False, "tp": None},
    ],
)
def test_the_line_of_a_job_says_what_its_file_says(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Held against ``--config``, whose values argparse never sees as text."""
    said = {"model": "model", "format": "megatron", "out": "out", **options}
    (tmp_path / "run.json").write_text(json.dumps(said))
    (tmp_path / "jobs.json").write_text(json.dumps({"models": [said]}))
    (job,) = batch.read(tmp_path / "jobs.json")
    line, file = (parse(every_option(), words) for words in (job.words, ["--config", str(tmp_path / "run.json")]))
    assert vars(line) == {**vars(file), "config": None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: []", "nothing to convert"),
        ("format: hf", "nothing to convert"),
        ("models: [model]", "FORMAT is missing"),
        ("format: hf\nmodels: [{out: x}]", "MODEL is missing"),
        ("format: hf\nmodels: [3]", "this is no model"),
        ("format: hf\nmodels: [{model: model, tpp: 2}]", "did you mean tp"),
        ("format: hf\nmodels: [{model: model, nproc: zero}]", "no count"),
        ("format: hf\nmodels: [{model: model, tp: 2}]", "number 1"),
        ("format: hf\nmodels: [{model: model, config: x.yaml}]", "batch's own"),
        ("format: hf\nmodels: [model, {model: model, dtype: f32}]", "one output"),
        ("format: hf\nmodels: [{model: model, source_format: hf, from: hf}]", "given twice"),
        ("report: page.html\nformat: hf\nmodels: [model, {model: model, out: x}]", "have one report"),
        ("- model", "no mapping"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_the_first_job(
    text: str, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", jobs(tmp_path, text)]) == 2
    assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "jobs.yaml"}


def _stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """An interpreter that only counts its calls and then does ``code``."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho x >>"{folder}/calls"\ncalls=$(wc -l <"{folder}/calls")\n{code}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(batch, "_BACK_OFF", 0.01)


@pytest.mark.parametrize(
    ("code", "calls", "state"),
    [
        ("exit 5", 3, "failed"),
        ("kill -9 $$", 3, "failed"),
        ("exit 75", 3, "failed"),
        ("exit 4", 1, "failed"),
        ("exit 3", 1, "failed"),
        ('[ "$calls" -ge 2 ] || exit 5; echo \'{"bytes_written": 8}\'', 2, "done"),
    ],
)
def test_what_may_pass_is_tried_again(
    code: str, calls: int, state: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _stand_in(tmp_path, monkeypatch, code)
    _, (said,) = told(jobs(tmp_path, "format: hf\nmodels: [model]"), "--max-retries", "2", capsys=capsys)
    assert (said["state"], said["attempts"]) == (state, calls)
    assert len((tmp_path / "calls").read_text().split()) == calls


def test_told_to_stop_it_leaves_and_goes_on_later(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "format: hf\nmodels: [{model: model, out: one}, {model: model, out: two}]"
    code = (
        "import sys, subprocess; from dconv.launch import batch\n"
        "real = subprocess.Popen\n"
        "def slow(words, **more):\n"
        "    hang = ['sh', '-c', 'trap \"exit 75\" TERM; sleep 60 >/dev/null 2>&1 & wait']\n"
        "    return real(hang if '--out=two' in words else words, **more)\n"
        "batch.subprocess.Popen = slow\n"
        "from dconv.cli import main; sys.exit(main(['batch', sys.argv[1]]))"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, jobs(tmp_path, text)], cwd=tmp_path, env={**os.environ}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stderr is not None
    for line in run.stderr:
        if "running" in line and "two" in line:
            break
    time.sleep(0.3)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 75 and "1 done, 1 stopped" in out
    code_again, said = told(str(tmp_path / "jobs.yaml"), capsys=capsys)
    assert (code_again, [one["state"] for one in said]) == (0, ["done", "done"])
    assert said[0]["said"]["already_done"]


class _Slow:
    """A conversion that needs a while to leave, and one that never does."""

    def __init__(self, leaves: bool, stop: threading.Event) -> None:
        self.leaves, self.stop_of_all, self.looks, self.killed_at = leaves, stop, 0, 0
        self.told_at = 0

    def stop(self) -> None:
        self.told_at = self.looks

    def kill(self) -> None:
        self.killed_at = self.looks

    def ended(self, seconds: float) -> tuple[int, str, str] | None:
        self.looks += 1
        if self.looks == 3:
            self.stop_of_all.set()
        if self.killed_at:
            return 128 + 9, '{"half of a li', ""
        if self.leaves and self.looks > 6:
            return 75, "", ""
        time.sleep(min(seconds, 0.05))
        return None


@pytest.mark.parametrize("leaves", [True, False])
def test_who_was_told_to_leave_has_time_to_and_is_killed_only_then(
    leaves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time counts from when it was told, however long it had run before; what was killed goes on later."""
    monkeypatch.setattr(batch, "_PATIENCE", 60.0 if leaves else 0.3)
    stop = threading.Event()
    slow = _Slow(leaves, stop)

    class Runner:
        def start(self, job: batch.Job, words: Sequence[str]) -> batch.Attempt:
            return slow

    run = batch.Batch([batch.Job("", (), Path("out"))], 1, 2, stop, lambda one, every: None, Runner())
    assert run.run() == 75 and run.results[0].state == "stopped"
    assert bool(slow.killed_at) == (not leaves) and (leaves or slow.killed_at > slow.told_at)
