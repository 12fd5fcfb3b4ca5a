"""One plan id, one output: whatever would change a byte of it, or comes from another place, is another plan."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.errors import Damaged
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding.rank import Settings
from tests.models import config_of, tensors, write_random

LLAMA = by_name("llama")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", LLAMA, config_of(LLAMA), shard_size=30_000)


def job(model: Path, out: Path, format: str = "hf") -> Job:
    return prepare(Request(model, format, out))


@pytest.mark.parametrize("format", ["hf", "megatron"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_another_side_file_is_another_plan(model: Path, tmp_path: Path, format: str, name: str) -> None:
    """Also one of the same size and time; a --resume gives the output that the source has now."""
    out = tmp_path / "out"
    before = job(model, out, format)
    run(before, Settings())
    path = model / name
    if name == "config.json":
        seen = path.stat()
        path.write_text(path.read_text().replace("10000.0", "20000.0"))
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    else:
        path.write_text("{}")
    after = job(model, out, format)
    assert after.plan.id != before.plan.id
    assert run(after, Settings(resume=True, overwrite=True)).committed
    carried = out / name if format == "hf" else out / "huggingface" / name
    assert carried.read_bytes() == path.read_bytes()


def test_a_partial_of_another_source_is_not_continued(model: Path, tmp_path: Path) -> None:
    """Archives and object stores give all files one time: two models of one shape differ in nothing else."""
    other = write_random(tmp_path / "other", LLAMA, config_of(LLAMA), seed=1, shard_size=30_000)
    for folder in (model, other):
        for path in folder.iterdir():
            os.utime(path, (0, 0))
    out = tmp_path / "out"
    run(job(model, out), Settings(rank=0, world=2))
    assert run(job(other, out), Settings()).committed
    assert tensors(out) == tensors(other)


def test_a_link_that_moves_on_is_another_source(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    latest = tmp_path / "latest"
    latest.symlink_to(model)
    before = job(latest, tmp_path / "out").plan.id
    assert job(model, tmp_path / "out").plan.id == before
    latest.unlink()
    latest.symlink_to(other)
    assert job(latest, tmp_path / "out").plan.id != before


def test_side_files_that_cannot_travel_are_found_before_the_first_byte(model: Path, tmp_path: Path) -> None:
    with (model / "tokenizer.model").open("wb") as file:
        file.truncate(20 << 30)
    with pytest.raises(Damaged, match="implausibly large"):
        job(model, tmp_path / "out")
    (model / "tokenizer.model").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"note": "\ud800"}))
    with pytest.raises(Damaged, match=r"config\.json"):
        job(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
