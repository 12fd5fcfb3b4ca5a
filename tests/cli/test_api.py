"""The public functions take the command line's options, and refuse what it would refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

import dconv
from dconv.arch.llama import LLAMA
from dconv.errors import Refused, UsageError
from tests.models import config_of, tensors, write_random


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", LLAMA, config_of(LLAMA))


def test_there_and_back(model: Path, tmp_path: Path) -> None:
    outcome = dconv.convert(model, "megatron", tmp_path / "m", tp=2, pp=2, megatron_format="legacy", max_memory="1MiB")
    assert outcome.committed
    dconv.convert(tmp_path / "m", "hf", tmp_path / "back", verify="digest")
    assert tensors(tmp_path / "back") == tensors(model)
    assert dconv.diff(str(model), tmp_path / "m").equal
    assert dconv.inspect(str(model)).family == "llama"
    assert dconv.check(str(tmp_path / "m"), run=False)


def test_plan_writes_nothing(model: Path, tmp_path: Path) -> None:
    job = dconv.plan(model, "megatron", tmp_path / "m", tp=2)
    assert job.plan.bytes_written > 0
    assert not (tmp_path / "m").exists()
    with pytest.raises(Refused):
        dconv.plan(model, "megatron", tp=3)


def test_options_that_are_not_known(model: Path) -> None:
    with pytest.raises(UsageError, match="is no option") as caught:
        dconv.plan(model, "megatron", tensor_parallel=2)
    assert "tensor_parallel" in caught.value.what
    with pytest.raises(UsageError):
        dconv.plan(model, "megatron", megatron_format="zarr")


def test_sizes_as_the_command_line_has_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def run(*words: object) -> tuple[None, str]:
        given.append(words[-1])
        return None, "not run"

    monkeypatch.setattr("dconv.checking._run", run)
    for size in ("1MB", 10**6, "1000000"):
        dconv.check(model, max_memory=size)
    dconv.check(model)
    assert given == [10**6, 10**6, 10**6, None]
    for wrong in ("much", 0, "-1MB"):
        with pytest.raises(UsageError, match="max_memory"):
            dconv.check(model, max_memory=wrong)
