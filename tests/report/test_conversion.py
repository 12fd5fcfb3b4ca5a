"""``convert --report``: one page whose numbers are the plan's and the receipt's, wherever the ranks came from."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dconv as public
from dconv.arch.llama import LLAMA
from dconv.errors import Preempted, UsageError, VerifyFailed
from dconv.launch.reporting import reporting_of
from dconv.pipeline import Job, Request, prepare, run
from dconv.report.conversion import Run, conversion_of, facts
from dconv.report.conversion_page import page
from dconv.report.flows import flows_of
from dconv.sharding.coords import Parallel
from dconv.sharding.finish import STATE
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import partial_folder
from tests.cli.conftest import Dconv, dconv
from tests.launched import OPTIONS, by_one_rank, small_llama
from tests.models import config_of, tree_digest, write_random
from tests.processes import call, one_rank
from tests.report.pages import Read

__all__ = ["dconv"]
HEADS = [
    "What was converted", "The plan", "Over time", "Precision before and after", "The source", "The output",
    "Quantisation error by layer", "Verification", "Receipt",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("source"))


def job_of(model: Path, out: Path) -> Job:
    """The job of `OPTIONS`."""
    return prepare(Request(model, "megatron", out, parallel=Parallel(tp=2, etp=2), megatron_format="legacy"))


def test_it_says_what_plan_and_receipt_say(dconv: Dconv, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = dconv("convert", model, "megatron", "-o", out, *OPTIONS, "--report", "--verify", "digest", "--json")
    assert ran.code == 0, ran.err
    file = tmp_path / "out.report.html"
    assert ran.json["report"] == str(file) and sorted(path.name for path in tmp_path.iterdir()) == ["out", file.name]
    assert tree_digest(out) == by_one_rank_once(model)
    read, plan = Read(file.read_text()), job_of(model, tmp_path / "again").plan
    receipt = json.loads((out / "dconv.json").read_bytes())
    assert read.heads[1:] == HEADS and len(read.scripts) == 2
    assert read.facts["plan"] == receipt["plan"] == read.report["plan"] == ran.json["plan"]
    assert (
        f"{receipt['digest']} of {len(receipt['tensors']):,} tensors, {len(receipt['frames'])}" in read.facts["digests"]
    )
    assert read.facts["own digest"] == receipt["own_digest"] and receipt["dconv"] in read.facts["versions"]
    assert read.facts["exact"].startswith(
        f"{len(receipt['tensors'])} of the output's {len(receipt['tensors'])} tensors"
    )
    verified = ran.json["verified"]
    assert read.facts["read back"] == (
        f"{verified['tensors']} tensors in {verified['files']} files, {verified['bytes']:,} bytes"
    )
    to, out_of = read.by_rank()
    assert (sum(to.values()), sum(out_of.values())) == (plan.bytes_read, plan.bytes_written)
    assert (read.report["bytes_read"], read.report["bytes_written"]) == (plan.bytes_read, plan.bytes_written)
    did = read.report["did"][0]
    assert (did["read"], did["written"], did["kept"]) == (plan.bytes_read, plan.bytes_written, 0)
    assert "default-src 'none'" in file.read_text() and "http:" not in file.read_text().lower()


_ONCE: dict[Path, dict[str, str]] = {}


def by_one_rank_once(model: Path) -> dict[str, str]:
    if model not in _ONCE:
        _ONCE[model] = by_one_rank(model)
    return _ONCE[model]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_picture_has_every_byte_of_every_rank(model: Path, tmp_path: Path, world: int) -> None:
    """Bands against sums of tasks and of files' sizes, which the picture does not look at."""
    job = job_of(model, tmp_path / "out")
    flows, plan = flows_of(job, world), job.plan
    for rank, tasks in enumerate(plan.shares(world)):
        written = sum(nbytes for (a, _), nbytes in flows.written.items() if a == f"rank {rank}")
        assert written == sum(task.nbytes for task in tasks)
    for file in plan.target.files:
        into = sum(nbytes for (_, b), nbytes in flows.written.items() if b == file.path)
        held = sum(tensor.spec.nbytes for tensor in plan.target.tensors if tensor.file == file.path)
        assert into == held + sum(len(data) for _, data in file.literals)
    assert {a for a, _ in flows.read} == {path.name for path in model.glob("*.safetensors")}
    assert sum(flows.read.values()) == plan.bytes_read


def test_many_files_and_ranks_are_grouped(tmp_path: Path) -> None:
    """64 ranks, 33 source and 60 target files: 24 nodes a column, and not a byte less."""
    config = config_of(LLAMA, num_hidden_layers=32)
    model = write_random(tmp_path / "model", LLAMA, config, shard_size=20_000)
    job = prepare(Request(model, "hf", tmp_path / "out", shard_size=12_000))
    since = time.time()
    for rank in range(64):
        reporting = reporting_of(job, True, rank, 64, since)
        if run(job, reporting.settings(Settings(rank=rank, world=64, launched=since))).committed:
            reporting.ended(lambda: None)
    text = (tmp_path / "out.report.html").read_text()
    read, plan = Read(text), job.plan
    to, out_of = read.by_rank()
    assert len(to) <= 24 and len(out_of) == 24
    assert (sum(to.values()), sum(out_of.values())) == (plan.bytes_read, plan.bytes_written)
    assert f"… and {len(plan.target.files) - 23} more files" in read.words and "… and 41 more ranks" in read.words
    assert len(text) < 1_000_000
    assert sum(rank["written"] for rank in read.report["did"]) == plan.bytes_written
    assert [rank["written"] for rank in read.report["did"]] == [rank["written"] for rank in read.report["ranks"]]


def test_torchrun_writes_one(model: Path, tmp_path: Path) -> None:
    words = one_rank(model, "megatron", "-o", tmp_path / "out", *OPTIONS, "--report", tmp_path / "page.html")
    code, out, err = call(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", *words[1:]
    )
    assert code == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "page.html"]
    assert tree_digest(tmp_path / "out") == by_one_rank_once(model)
    assert (out + err).count(f"report {tmp_path / 'page.html'}") == 1
    read = Read((tmp_path / "page.html").read_text())
    assert len(read.report["ranks"]) == 3
    # whoever commits finds what all have done; what two did at one time counts for both
    assert sum(rank["written"] for rank in read.report["did"]) >= read.report["bytes_written"]
    assert sum(rank["read"] for rank in read.report["did"]) >= read.report["bytes_read"]


def stopped(job: Job, after: int, report: bool) -> None:
    """A run that is told to stop once so many bytes are done."""
    stop = threading.Event()
    reporting = reporting_of(job, report, 0, 1, time.time())

    def progress(done: int, _: int) -> None:
        if done >= after:
            stop.set()

    with pytest.raises(Preempted):
        run(job, reporting.settings(Settings(stop=stop, progress=progress)))


@pytest.mark.parametrize("noted", [True, False])
def test_a_resumed_run_says_what_was_kept(dconv: Dconv, model: Path, tmp_path: Path, noted: bool) -> None:
    """Also where the earlier run was without a report."""
    job = job_of(model, tmp_path / "out")
    stopped(job, job.plan.bytes_written // 3, noted)
    time.sleep(0.2)  # what began before is of another run
    ran = dconv("convert", model, "megatron", "-o", tmp_path / "out", *OPTIONS, "--resume", "--report", "--json")
    assert ran.code == 0, ran.err
    assert tree_digest(tmp_path / "out") == by_one_rank_once(model)
    read = Read((tmp_path / "out.report.html").read_text())
    did, kept = read.report["did"][0], read.report["kept"]
    assert kept >= job.plan.bytes_written // 3 and did["kept"] == kept
    assert did["written"] + kept == job.plan.bytes_written
    assert ("Earlier runs of this plan" in read.heads) == noted
    again = dconv("convert", model, "megatron", "-o", tmp_path / "out", *OPTIONS, "--resume", "--report")
    assert again.code == 0 and "already done" in again.out
    read = Read((tmp_path / "out.report.html").read_text())
    assert read.report["already_done"] and "It was there already" in read.words


def test_nothing_is_noted_without_it(model: Path, tmp_path: Path) -> None:
    for asked, expected in ((None, False), (True, True)):
        job = job_of(model, tmp_path / f"out-{asked}")
        state, seen = partial_folder(job.request.output, job.plan) / STATE, []
        settings = Settings(committing=lambda state=state, seen=seen: seen.extend(state.iterdir()))
        run(job, reporting_of(job, asked, 0, 1, time.time()).settings(settings))
        assert ("tracks" in {path.name for path in seen}) == expected
        assert tree_digest(job.request.output) == by_one_rank_once(model)


def taken(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    return path


@pytest.mark.parametrize(
    ("place", "code"),
    [
        (lambda folder: folder / "nowhere" / "page.html", 5),
        (lambda _: Path("/proc/page.html"), 5),
        (taken, 2),
        (lambda folder: folder, 2),
        (lambda folder: folder / "out" / "page.html", 2),
        (lambda folder: folder / "out", 2),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_a_byte(
    dconv: Dconv, model: Path, tmp_path: Path, place: Callable[[Path], Path], code: int
) -> None:
    path = place(tmp_path)
    before = tree(tmp_path)
    ran = dconv("convert", model, "megatron", "-o", tmp_path / "out", *OPTIONS, "--report", path)
    assert ran.code == code and "nothing was written" in ran.err and "--report" in ran.err
    assert tree(tmp_path) == before


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refusal_writes_none(dconv: Dconv, model: Path, tmp_path: Path) -> None:
    ran = dconv("convert", model, "megatron", "-o", tmp_path / "out", "--tp", 3, "--report")
    assert ran.code == 3 and list(tmp_path.iterdir()) == []
    for out in (".", "/"):
        ran = dconv("convert", model, "megatron", "-o", out, "--report")
        assert ran.code == 2 and "a name of its own" in ran.err
    ran = dconv("convert", model, "rk", "-o", tmp_path / "out", "--report")
    assert ran.code == 2 and "has no report" in ran.err and list(tmp_path.iterdir()) == []


def test_a_report_is_replaced(dconv: Dconv, model: Path, tmp_path: Path) -> None:
    words = ("convert", model, "megatron", "-o", tmp_path / "out", *OPTIONS, "--report")
    assert dconv(*words).code == 0
    page_file = tmp_path / "out.report.html"
    page_file.write_text(page_file.read_text().replace("</html>", "old</html>"))
    assert dconv(*words).code == 2 and "old</html>" in page_file.read_text()  # the output is there
    assert dconv(*words, "--overwrite").code == 0 and "old</html>" not in page_file.read_text()


def test_verification_that_fails_is_in_it(
    dconv: Dconv, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*_: object) -> dict[str, object]:
        raise VerifyFailed("3 tensors <b>changed</b>", where="a & b")

    monkeypatch.setattr("dconv.verify.told", told)
    words = ("convert", model, "megatron", "-o", tmp_path / "out", *OPTIONS, "--report", "--verify", "digest")
    assert dconv(*words).code == 6
    read = Read((tmp_path / "out.report.html").read_text())
    assert "Verification failed, exit code 6" in read.words and "3 tensors <b>changed</b>" in read.words
    assert read.report["failure"]["exit_code"] == 6


def test_by_config_and_by_keyword(dconv: Dconv, model: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": str(model), "format": "megatron", "tp": 2, "megatron-format": "legacy"}
    for report, name in ((True, "a.report.html"), (str(tmp_path / "b.html"), "b.html")):
        out = tmp_path / name[0]
        config = tmp_path / "run.yaml"
        config.write_text(json.dumps({**values, "out": str(out), "report": report}))
        assert dconv("convert", "--config", config).code == 0
        assert Read((tmp_path / name).read_text()).heads[1:] == HEADS
    config.write_text(json.dumps({**values, "out": str(tmp_path / "c"), "report": False}))
    assert dconv("convert", "--config", config).code == 0
    public.convert(model, "megatron", tmp_path / "d", tp=2, megatron_format="legacy", report=True)
    public.convert(model, "megatron", tmp_path / "e", tp=2, megatron_format="legacy", report=tmp_path / "f.html")
    with pytest.raises(UsageError):
        public.convert(model, "megatron", tmp_path / "g", report=tmp_path / "run.yaml")
    pages = sorted(path.name for path in tmp_path.glob("*.html"))
    assert pages == ["a.report.html", "b.html", "d.report.html", "f.html"] and not (tmp_path / "g").exists()


HOSTILE = [
    "</script><script>alert(1)<",
    '"><img src=x onerror=alert(1)>',
    "a' onfocus='alert(1)",
    "{{json}}",
    "\u202etxt",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(tmp_path: Path, name: str) -> None:
    """Of directories, files and machines: `Read` would see a tag or an attribute of theirs."""
    plain = write_random(tmp_path / "plain", LLAMA, config_of(LLAMA), shard_size=20_000)
    safe = name.replace("/", "|")
    model = plain.rename(tmp_path / safe)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    for i, file in enumerate(sorted(model.glob("*.safetensors"))):
        file.rename(model / f"{i}{safe}.safetensors")
        index["weight_map"] = {
            key: f"{i}{safe}.safetensors" if value == file.name else value for key, value in index["weight_map"].items()
        }
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    job = prepare(Request(model, "hf", tmp_path / f"out{safe}"))
    run(job, Settings())
    failure = VerifyFailed(name, where=name, do=name)
    read = Read(page(conversion_of(job, Run(2, 1.0, failure=failure))))
    assert len(read.scripts) == 2 and f"0{safe}.safetensors" in read.words
    assert read.heads[0] == f"{safe.replace(chr(0x202E), '?')} to hf"


@pytest.mark.parametrize("alone", [True, False])
def test_of_a_student_and_its_teacher_each_side_is_the_same_model(tmp_path: Path, alone: bool) -> None:
    """The teacher where that alone is written; the receipt names what was read."""
    student, teacher = (small_llama(tmp_path / name, num_hidden_layers=n) for name, n in (("s", 4), ("t", 2)))
    job = prepare(Request(student, "megatron", tmp_path / "out", teacher=teacher, teacher_only=alone, divisor=8))
    run(job, Settings())
    told = conversion_of(job, Run(1))
    layers = 2 if alone else 4
    for side in (told.before, told.after):
        assert side.precision is not None, side.why_not
        assert {cell.layer for cell in side.precision.cells} == {-1, *range(layers)}
    source = json.loads((tmp_path / "out" / "dconv.json").read_text())["source"]
    expected = (str(teacher), None) if alone else (str(student), str(teacher))
    assert (source["path"], source.get("teacher")) == expected
    assert str(teacher) in dict(facts(told))["from"]


def test_of_a_graph_it_says_how_its_tensors_are_stored(tmp_path: Path) -> None:
    """What it holds is no checkpoint to be described; that is no failure of this run."""
    pytest.importorskip("transformers", reason="a graph is traced from its model")
    job = prepare(Request(small_llama(tmp_path / "model", num_hidden_layers=1), "torch_export", tmp_path / "out"))
    run(job, Settings())
    told = conversion_of(job, Run(1))
    assert told.after.why_not.endswith(f"its tensors: {len(job.plan.target.tensors)} bf16")
    words = Read(page(told)).words
    assert "refused" not in words and "nothing was written" not in words
