"""What an earlier run left lying about neither blocks the next one nor is taken for a result."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.errors import UsageError
from dconv.pipeline import Request, prepare, run
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import partial_folder
from tests.models import config_of, tensors, write_random

LLAMA = by_name("llama")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", LLAMA, config_of(LLAMA), shard_size=3_000)


def test_an_old_output_that_was_set_aside_and_never_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = prepare(Request(model, "hf", out))
    run(job, Settings())
    aside = out.with_name(f"out.replaced-{job.plan.id}")
    aside.mkdir()
    (aside / "old").write_text("old")
    assert run(job, Settings(resume=True)).complete
    assert not aside.exists()
    aside.mkdir()
    (aside / "old").write_text("old")
    assert run(job, Settings(overwrite=True)).committed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert tensors(out) == tensors(model)


def test_a_receipt_without_its_weights_is_no_result(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = prepare(Request(model, "hf", out))
    partial = partial_folder(out, job.plan)
    partial.mkdir()
    (partial / "dconv.json").write_text(json.dumps({"plan": job.plan.id}))
    assert run(job, Settings()).committed
    assert tensors(out) == tensors(model)


def test_what_a_network_file_system_leaves_in_the_journal(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = prepare(Request(model, "hf", out))
    folder = partial_folder(out, job.plan) / ".dconv" / "journal"
    folder.mkdir(parents=True)
    (folder / ".nfs000000000012").write_text("done 0 00 00\n")
    assert run(job, Settings()).committed


def test_weights_that_are_links_into_the_output(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCONV_LINKS", "follow")
    out = tmp_path / "out"
    run(prepare(Request(model, "hf", out)), Settings())
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in out.iterdir():
        (linked / path.name).symlink_to(path)
    before = tensors(out)
    with pytest.raises(UsageError, match="its own source"):
        run(prepare(Request(linked, "hf", out, dtype="f32")), Settings(overwrite=True))
    assert tensors(out) == before


def test_more_files_than_a_process_may_usually_hold_open(model: Path, tmp_path: Path) -> None:
    """The soft limit is raised to what is needed and allowed."""
    files = len(list(model.glob("*.safetensors")))
    low = files // 2 + 16
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    words = ["convert", str(model), "hf", "-o", str(tmp_path / "out"), "--shard-size", "3000", "--quiet"]
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({low}, {hard}))\n"
    code += f"from dconv.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert tensors(tmp_path / "out") == tensors(model)
