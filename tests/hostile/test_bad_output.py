"""An output that cannot be: a layout that does not divide, a place that is taken, full, or written to meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dconv.errors import Damaged, StorageFault
from dconv.launch.__main__ import main
from dconv.launch.progress import Board
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import partial_folder
from tests.file_systems import mounted
from tests.hostile.conftest import CONTAINERS, DAMAGED, REFUSED, STORAGE, USAGE, Attempt, check_form
from tests.models import tree_digest

# --------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("megatron --tp 3", "tensor parallel 3"),
        ("megatron --tp 64", "tensor parallel 64"),
        ("megatron --pp 3", "layers"),
        ("megatron --pp 2 --vpp 3", "layers"),
        ("megatron --vpp 2", "pipeline"),
        ("megatron --tp 0", "--tp"),
        ("megatron --pp 2 --first-stage-layers 5", "stage"),
        ("megatron --pp-layout 1|1", "layers"),
        ("megatron --tp 4 --ep 3", "expert"),
        ("gguuf", "gguuf"),
        ("megatron --model-type lama", "llama"),
        ("megatron --dtype f32 --tp 3", "3"),
    ],
)
@pytest.mark.parametrize("container", CONTAINERS)
def test_layout_that_does_not_divide(model: Path, attempt: Attempt, container: str, options: str, word: str) -> None:
    attempt(REFUSED, word, model=model, options=f"{options} --megatron-format {container}")


def test_pipeline_layout_that_contradicts_pp(model: Path, attempt: Attempt) -> None:
    attempt(USAGE, "--pp 3", model=model, options="megatron --pp 3 --pp-layout 2|2")


# -------------------------------------------------------------------------------------------------- OUT and MODEL


@pytest.mark.parametrize("kind", ["receipt", "folder", "empty folder", "file", "dangling link"])
def test_out_exists(model: Path, attempt: Attempt, kind: str) -> None:
    out = model.parent / "out"
    if kind == "receipt":
        convert(Request(model, "megatron", out))
    elif kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.tex").write_text("mine")
    replaceable = kind not in ("folder", "file")
    attempt(USAGE, "exists", *["--overwrite"] * replaceable, model=model, out=out)
    if not replaceable:
        attempt(USAGE, "outputs of dconv only", model=model, out=out, options="megatron --overwrite")
    if kind != "receipt":
        attempt(USAGE, "exists", model=model, out=out, options="megatron --resume")
    if kind in ("folder", "file"):  # nobody's thesis goes, whatever was typed
        attempt(USAGE, "outputs of dconv only", model=model, out=out, options="megatron --overwrite")


def test_finished_output_of_another_plan_is_not_taken_for_this_one(model: Path, attempt: Attempt) -> None:
    out = model.parent / "out"
    convert(Request(model, "megatron", out))
    attempt(USAGE, "exists", model=model, out=out, options="megatron --tp 2 --resume")


def test_finished_output_that_lost_a_file_is_not_taken_for_done(model: Path, attempt: Attempt) -> None:
    out = model.parent / "out"
    convert(Request(model, "megatron", out))
    (out / "release" / "__0_0.distcp").unlink()
    attempt(USAGE, "exists", model=model, out=out, options="megatron --resume")


@pytest.mark.parametrize("where", ["model", "model/.", ".", "model/.."])
def test_output_would_replace_its_source(model: Path, attempt: Attempt, where: str) -> None:
    """Not even ``--overwrite`` removes the source."""
    attempt(USAGE, model=model, out=model.parent / where, options="megatron --overwrite")


@pytest.mark.parametrize("out", ["/", "."])
def test_output_without_a_name(model: Path, attempt: Attempt, out: str) -> None:
    attempt(USAGE, model=model, out=Path(out), options="megatron --overwrite")


def test_no_such_model(tmp_path: Path, attempt: Attempt) -> None:
    attempt(USAGE, "no such checkpoint", model=tmp_path / "nothing")


def test_model_that_is_no_checkpoint(tmp_path: Path, attempt: Attempt) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("hello")
    attempt(REFUSED, "notes.txt", model=tmp_path / "work")
    attempt(REFUSED, "directory", model=tmp_path / "work" / "notes.txt")


def test_output_parent_missing(model: Path, attempt: Attempt) -> None:
    attempt(STORAGE, "mkdir -p", model=model, out=model.parent / "a" / "b" / "out")


def test_output_parent_is_a_file(model: Path, attempt: Attempt) -> None:
    attempt(STORAGE, model=model, out=model / "config.json" / "out")


# -------------------------------------------------------------------------------------------------------- storage


def test_full_disk_is_found_before_the_first_byte(model: Path, attempt: Attempt) -> None:
    with mounted(64 << 10) as small:
        attempt(STORAGE, "not enough room", "nothing was written", "bytes free", model=model, out=small / "out")
        assert list(small.iterdir()) == []


def test_full_disk_as_the_system_reports_it(model: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a mount."""
    real = os.statvfs(model)
    fields = list(real)
    fields[4] = 2  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    attempt(STORAGE, "not enough room", model=model)


def test_read_only_parent(model: Path, attempt: Attempt) -> None:
    with mounted(16 << 20, read_only=True) as folder:
        attempt(STORAGE, "Read-only", model=model, out=folder / "out")


def test_disk_that_fills_up_on_the_way(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file grows: exit 5 with what to do, what is finished is kept, and the next run ends alike."""
    whole = model.parent / "whole"
    convert(Request(model, "megatron", whole))
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    with mounted(2 * size + (1 << 20)) as small:
        filler = small / "filler"
        note = Board.note

        def fill(board: Board, done: int, total: int) -> None:
            note(board, done, total)
            if total > done > total // 3 and not filler.exists():
                journal = board.folder.parent / "journal"
                deadline = time.monotonic() + 20
                while not any(path.stat().st_size for path in journal.iterdir()) and time.monotonic() < deadline:
                    time.sleep(0.01)  # something must be finished for something to be kept
                with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * 4096)

        with monkeypatch.context() as patch:
            patch.setattr(Board, "note", fill)
            assert main([str(model), "megatron", "-o", str(small / "out"), "--max-memory", "64KiB"]) == STORAGE
        text = capsys.readouterr().err
        check_form(text, STORAGE)
        assert "No space left" in text
        assert "--resume" in text
        assert not (small / "out").exists()
        filler.unlink()
        assert main([str(model), "megatron", "-o", str(small / "out"), "--resume"]) == 0
        assert "kept" in capsys.readouterr().out
        assert tree_digest(small / "out") == tree_digest(whole)
        assert [path.name for path in small.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------- the source changes


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def _poke(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"x")


@pytest.mark.parametrize("change", [_touch, _grow, _shrink, _replace, _poke, os.unlink])
@pytest.mark.parametrize("when", [0, -1])
def test_source_that_changes_during_the_run(model: Path, change: Callable[[Path], None], when: int) -> None:
    """Damaged, not committed; and since no plan can go on with it, its partial output goes, too."""
    out = model.parent / "out"
    job = prepare(Request(model, "megatron", out))
    victim = sorted(model.glob("*.safetensors"))[when]
    before = {path.name for path in model.parent.iterdir()}
    changed = False

    def progress(done: int, total: int) -> None:
        nonlocal changed
        if done > total // 2 and not changed:
            changed = True
            change(victim)

    with pytest.raises(Damaged) as caught:
        run(job, Settings(progress=progress, max_memory=64 << 10))
    check_form(str(caught.value), DAMAGED)
    assert victim.name in str(caught.value)
    assert {path.name for path in model.parent.iterdir()} == before


def test_source_that_becomes_unreadable_keeps_what_is_finished(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that fails for longer than is waited is no change of the source: exit 5, and the run can go on."""
    out = model.parent / "out"
    job = prepare(Request(model, "megatron", out))
    real = os.preadv
    reads = 0

    def flaky(fd: int, buffers: list[Any], offset: int, *rest: Any) -> int:
        nonlocal reads
        reads += 1
        if reads >= 20:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", flaky)
        with pytest.raises(StorageFault) as caught:
            run(job, Settings())
    check_form(str(caught.value), STORAGE)
    assert partial_folder(out, job.plan).exists()
    assert run(job, Settings(resume=True)).committed
