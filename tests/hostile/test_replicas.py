"""Tensors that several Megatron ranks hold are compared, every byte of them: nothing is chosen without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.cli import main
from dconv.compare import diff
from dconv.errors import Damaged
from dconv.pipeline import Job, Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.execute import ReadLog
from dconv.sharding.rank import Settings
from tests.models import config_of, tensors, write_random

NORM = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
HEAD = "output_layer.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    family = by_name("llama")
    return write_random(tmp_path / "work" / "model", family, config_of(family, tie_word_embeddings=True))


@pytest.fixture
def shards(model: Path) -> tuple[Path, Job]:
    """The model as legacy shards, tp 2 x pp 2, and the job that made them."""
    parallel = Parallel(tp=2, pp=2, etp=2)
    out = model.parent / "shards"
    job = prepare(Request(model, "megatron", out, parallel=parallel, megatron_format="legacy", divisor=8))
    run(job, Settings())
    return out, job


def spoil(shards: tuple[Path, Job], key: str, at: Callable[[int], int]) -> None:
    """Flip a bit of one tensor of one shard, at byte ``at(its bytes)``; CRCs of zip members are not at stake."""
    folder, job = shards
    tensor = next(t for t in job.plan.target.tensors if t.key == key)
    path = folder / tensor.file
    data = bytearray(path.read_bytes())
    data[tensor.offset + at(tensor.spec.nbytes)] ^= 1
    path.write_bytes(data)


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


CASES = [
    (f"mp_rank_01_000:{NORM}", lambda n: n - 1, "model.layers.0.input_layernorm.weight"),
    (f"mp_rank_01_001:{NORM}", lambda _: 0, "model.layers.2.input_layernorm.weight"),
    (f"mp_rank_00_001:{HEAD}", lambda _: 5, "model.embed_tokens.weight"),
    (f"mp_rank_01_001:{HEAD}", lambda _: 64, "model.embed_tokens.weight"),
    ("mp_rank_00_000:embedding.word_embeddings.weight", lambda _: 5, "model.embed_tokens.weight"),
]


@pytest.mark.parametrize(("key", "at", "name"), CASES)
@pytest.mark.parametrize("options", ["hf", "megatron --tp 2 --pp 4 --megatron-format legacy", "megatron --dtype f32"])
def test_shards_that_disagree_are_refused(
    shards: tuple[Path, Job], capsys: pytest.CaptureFixture[str], key: str, at: Callable[[int], int], name: str,
    options: str,
) -> None:  # fmt: skip
    spoil(shards, key, at)
    work = shards[0].parent
    before = listing(work)
    assert main(["convert", str(shards[0]), *options.split(), "-o", str(work / "out"), "--quiet"]) == Damaged.exit_code
    said = capsys.readouterr().err
    assert name in said
    assert key.partition(":")[0] in said
    assert "--replicas first" in said
    assert listing(work) == before, "something was left behind"


@pytest.mark.parametrize(("key", "at", "name"), CASES)
def test_check_names_them_and_diff_notes_them(
    shards: tuple[Path, Job], model: Path, capsys: pytest.CaptureFixture[str], key: str, at: Callable[[int], int],
    name: str,
) -> None:  # fmt: skip
    spoil(shards, key, at)
    (shards[0] / "dconv.json").unlink()  # as any Megatron run leaves it
    assert main(["check", str(shards[0]), "--no-run"]) == Damaged.exit_code
    assert name in capsys.readouterr().err
    assert name in "\n".join(diff(shards[0], model).notes)


def test_the_first_may_be_taken_and_that_is_said(shards: tuple[Path, Job], model: Path) -> None:
    for key, at, _ in CASES[:4]:
        spoil(shards, key, at)
    out = model.parent / "out"
    convert(Request(shards[0], "hf", out, replicas="first"))
    assert tensors(out) == tensors(model)
    left_out = json.loads((out / "dconv.json").read_text())["left_out"]
    assert "--replicas first" in left_out.values()


def test_equal_shards_are_compared_once_by_whatever_ranks(shards: tuple[Path, Job], model: Path) -> None:
    """The control; and each copy is read once, not once for each shard that is written."""
    folder, made = shards
    replicas = {t.key: t for t in made.plan.target.tensors if t.key.split(":")[1] in (NORM, HEAD)}
    parallel = Parallel(tp=2, pp=4, etp=2)
    job = prepare(Request(folder, "megatron", model.parent / "out", parallel=parallel, megatron_format="legacy"))
    reads: list[tuple[str, int, int]] = []
    log: ReadLog = lambda file, offset, count: reads.append((file, offset, count))  # noqa: E731
    for rank in range(3):
        run(job, Settings(rank=rank, world=3, log=log))
    assert diff(model.parent / "out", model).equal
    for tensor in (replicas[f"mp_rank_01_000:{NORM}"], replicas[f"mp_rank_01_001:{HEAD}"]):
        file, start = tensor.file.removeprefix("release/"), tensor.offset
        inside = sum(n for f, at, n in reads if f == file and start <= at < start + tensor.spec.nbytes)
        unpadded = tensor.spec.nbytes - tensor.padding * 2
        assert inside == unpadded
