"""Conversions that meet: two into one output, sources that are read-only, outputs on file systems of other kinds."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.errors import DconvError, StorageFault, UsageError
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import RECEIPT, check_output
from tests.crash.cases import CASES, job_of, settings_of
from tests.file_systems import mounted, read_only
from tests.hostile.conftest import check_form
from tests.models import tree_digest

#: Pairs of conversions of one model that are started into one output at once.
PAIRS = (("hf", "torch_dist"), ("legacy", "pt"), ("mlx", "fp8"))


def together(calls: list[Callable[[], None]]) -> list[int]:
    """Calls in processes of their own, at one time; their exit codes."""
    at = time.time() + 0.02
    ranks = []
    for call in calls:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                time.sleep(max(0.0, at - time.time()))
                call()
                code = 0
            except DconvError as error:
                code = error.exit_code
            finally:
                os._exit(code)
        ranks.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


@pytest.mark.parametrize("round_", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 20))])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_conversions_into_one_output(
    small: Path, results: dict[str, dict[str, str]], root: Path, pair: tuple[str, str], round_: int,
    counted: Callable[[str, int], None],
) -> None:  # fmt: skip
    """One is there, whole; the other is told that the output exists, and goes on under another name."""
    out = root / "out"
    jobs = [job_of(small, case, out) for case in pair]
    codes = together([lambda job=job: run(job, Settings()) for job in jobs])  # type: ignore[misc]
    assert sorted(codes) == [0, UsageError.exit_code]
    won = codes.index(0)
    assert (out / RECEIPT).is_file()
    assert tree_digest(out) == results[pair[won]]
    left = [path for path in root.iterdir() if path != out]
    assert all(jobs[1 - won].plan.id in path.name for path in left)
    shutil.rmtree(out)
    run(jobs[1 - won], Settings(resume=True))
    assert tree_digest(out) == results[pair[1 - won]]
    assert list(root.iterdir()) == [out]
    counted("pairs of conversions into one output", 1)


@pytest.mark.parametrize("round_", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 20))])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_conversions_that_replace_one_output(
    small: Path, results: dict[str, dict[str, str]], root: Path, pair: tuple[str, str], round_: int,
    counted: Callable[[str, int], None],
) -> None:  # fmt: skip
    """The last one's is there, whole, and nothing of the other's nor of the old one."""
    out = root / "out"
    run(job_of(small, "bmtrain", out), Settings())
    jobs = [job_of(small, case, out) for case in pair]
    assert together([lambda job=job: run(job, Settings(overwrite=True)) for job in jobs]) == [0, 0]  # type: ignore[misc]
    assert tree_digest(out) in [results[case] for case in pair]
    assert list(root.iterdir()) == [out]
    counted("pairs of conversions into one output", 1)


@pytest.mark.parametrize("case", CASES)
def test_a_source_that_is_read_only(small: Path, results: dict[str, dict[str, str]], root: Path, case: str) -> None:
    """Nothing is written beside what is read."""
    with read_only(small) as source:
        convert(Request(source, out=root / "out", **CASES[case]))
        assert tree_digest(root / "out") == results[case]
        with pytest.raises(StorageFault, match="Read-only") as caught:
            convert(Request(source, out=source / "out", **CASES[case]))
        check_form(str(caught.value), 5)


@pytest.mark.parametrize("case", CASES)
def test_an_output_on_another_file_system(small: Path, results: dict[str, dict[str, str]], case: str) -> None:
    """Also by a link, and with what is read staged on a third."""
    with mounted(16 << 20) as other, mounted(16 << 20) as third:
        (third / "link").symlink_to(other)
        convert(
            Request(small, out=third / "link" / "out", **CASES[case]),
            settings=Settings(stage_dir=third, threads=2),
        )
        assert tree_digest(other / "out") == results[case]
        assert [path.name for path in other.iterdir()] == ["out"]
        assert [path.name for path in third.iterdir()] == ["link"]


def test_an_output_that_is_a_mount_of_its_own(small: Path, root: Path) -> None:
    """It cannot be renamed to; what lies there is as it was."""
    job = job_of(small, "hf", root / "somewhere")
    with mounted(16 << 20) as place:
        for overwrite in (False, True):
            with pytest.raises((UsageError, StorageFault)) as caught:
                convert(Request(small, out=place, **CASES["hf"]), settings=Settings(overwrite=overwrite))
            check_form(str(caught.value), caught.value.exit_code)
            assert list(place.iterdir()) == []
        beside = [path for path in place.parent.iterdir() if path.name.startswith(place.name) and path != place]
        assert all(path.name.startswith(f"{place.name}.partial-") for path in beside)
        for path in beside:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert job.plan.tasks


@pytest.mark.parametrize("case", ["hf", "legacy", "torch_dist"])
def test_a_file_system_without_a_free_inode(
    small: Path, results: dict[str, dict[str, str]], case: str, counted: Callable[[str, int], None]
) -> None:
    """With each number of files left: told before the first byte where that is known, else on the way."""
    plan = prepare(Request(small, out=Path("out"), **CASES[case])).plan
    closing = len(results[case]) + 12
    early = late = tried = 0
    for left in range(1, len(plan.target.files) + closing):
        with mounted(16 << 20, files=left + 1 + 1) as small_one:
            (small_one / "filler").mkdir()
            job = job_of(small, case, small_one / "out")
            tried += 1
            try:
                run(job, Settings())
            except StorageFault as error:
                check_form(str(error), 5)
                assert not (small_one / "out").exists()
                if "nothing was written" in error.what:
                    early += 1
                    assert [path.name for path in small_one.iterdir()] == ["filler"]
                else:
                    late += 1
                    assert "No space left" in error.what
                os.system(f"mount -o remount,nr_inodes=1000 {small_one}")  # noqa: S605 - a test's own directory
                run(job, settings_of(case, resume=True))
            assert tree_digest(small_one / "out") == results[case]
            assert sorted(path.name for path in small_one.iterdir()) == ["filler", "out"]
    assert early
    assert late
    counted("numbers of inodes left", tried)


@pytest.mark.parametrize("then", ["gone", "replaced", "not ours"])
def test_an_output_that_changes_while_it_is_looked_at(
    small: Path, root: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks of an ``--overwrite`` another conversion moves the old output away, and its own there."""
    out, job = root / "out", job_of(small, "hf", root / "out")
    run(job_of(small, "bmtrain", out), Settings())
    look, looks = Path.is_dir, []

    def is_dir(self: Path, **options: bool) -> bool:
        found = look(self, **options)
        if self == out and not looks:
            looks.append(found)
            out.rename(root / "aside")
            if then == "replaced":
                run(job_of(small, "legacy", out), Settings())
            elif then == "not ours":
                out.mkdir()
                (out / "thesis.tex").touch()
        return found

    monkeypatch.setattr(Path, "is_dir", is_dir)
    asked = {"overwrite": True, "resume": False, "launched": float("inf")}
    if then == "not ours":
        with pytest.raises(UsageError, match="outputs of dconv only"):
            check_output(prepare(job.request).plan, out, **asked)
    else:
        assert not check_output(prepare(job.request).plan, out, **asked)
    assert looks == [True]
