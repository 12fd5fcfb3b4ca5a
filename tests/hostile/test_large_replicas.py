"""Copies of one tensor that are larger than a tile, or than a leaf, are compared to their last byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dconv import verify
from dconv.arch.registry import by_name
from dconv.cli import main
from dconv.compare import diff
from dconv.errors import Damaged
from dconv.pipeline import Job, Request, convert, prepare, run
from dconv.sharding import plan
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.models import config_of, tensors, write_random

LLAMA = by_name("llama")
HEAD = "output_layer.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
#: Of the source that is compared at a time; `dconv.sharding.execute` and `dconv.sharding.replicas`.
TILE = 1 << 20


def shards_of(folder: Path, **sizes: int) -> tuple[Path, Path, Job]:
    """A tied model, the same as legacy shards of tp 2 x pp 2, and the job that made them."""
    model = write_random(folder / "model", LLAMA, config_of(LLAMA, tie_word_embeddings=True, **sizes))
    out = folder / "shards"
    parallel = Parallel(tp=2, pp=2, etp=2)
    job = prepare(Request(model, "megatron", out, parallel=parallel, megatron_format="legacy", divisor=8))
    run(job, Settings())
    (out / "dconv.json").unlink()  # as any Megatron run leaves it
    return model, out, job


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Job]:
    """Each rank's part of the embedding is two and a half tiles."""
    return shards_of(tmp_path_factory.mktemp("large"), hidden_size=64, vocab_size=40_961, num_hidden_layers=2)


@pytest.fixture
def spoilt(large: tuple[Path, Path, Job], tmp_path: Path) -> Iterator[tuple[Path, Path, Job]]:
    """The same shards, to be spoilt."""
    model, out, job = large
    yield model, Path(shutil.copytree(out, tmp_path / "work" / "shards")), job
    shutil.rmtree(tmp_path / "work")


def flip(folder: Path, job: Job, key: str, back: int) -> None:
    """Flip a bit of a tensor, ``back`` bytes before the end of what is no padding (negative: from its start)."""
    tensor = next(t for t in job.plan.target.tensors if t.key == key)
    size = tensor.spec.nbytes - 2 * tensor.padding
    assert back <= size
    with (folder / tensor.file).open("r+b") as file:
        file.seek(tensor.offset + size - back if back > 0 else tensor.offset - back)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 128]))


LAST, END_OF_TILE, NEXT_TILE = 1, 1 - TILE, -TILE
#: --max-memory makes the tiles of a conversion smaller, --threads divides it.
OPTIONS = (
    "hf",
    "hf --max-memory 1MiB --threads 4",
    "hf --dtype f32",
    "megatron --tp 2 --pp 2 --megatron-format legacy",
    "megatron --tp 4",
)


@pytest.mark.parametrize("back", [LAST, END_OF_TILE, NEXT_TILE])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_difference_past_the_first_tile_is_found_by_convert(
    spoilt: tuple[Path, Path, Job], capsys: pytest.CaptureFixture[str], options: str, back: int
) -> None:
    _, folder, job = spoilt
    flip(folder, job, f"mp_rank_01_001:{HEAD}", back)
    out = folder.parent / "out"
    assert main(["convert", str(folder), *options.split(), "-o", str(out), "--quiet"]) == Damaged.exit_code
    said = capsys.readouterr().err
    assert EMBEDDING in said
    assert "mp_rank_01_001" in said
    assert [path.name for path in folder.parent.iterdir()] == ["shards"], "something was left behind"


@pytest.mark.parametrize("back", [LAST, END_OF_TILE, NEXT_TILE])
@pytest.mark.parametrize("key", [f"mp_rank_00_001:{HEAD}", "mp_rank_01_000:embedding.word_embeddings.weight"])
def test_a_difference_past_the_first_tile_is_found_by_check_and_diff(
    spoilt: tuple[Path, Path, Job], capsys: pytest.CaptureFixture[str], key: str, back: int
) -> None:
    model, folder, job = spoilt
    flip(folder, job, key, back)
    assert main(["check", str(folder), "--no-run"]) == Damaged.exit_code
    assert EMBEDDING in capsys.readouterr().err
    assert EMBEDDING in "\n".join(diff(folder, model).notes)


def test_large_copies_that_agree_are_no_hindrance(large: tuple[Path, Path, Job], tmp_path: Path) -> None:
    model, folder, _ = large
    convert(Request(folder, "hf", tmp_path / "out"))
    assert tensors(tmp_path / "out") == tensors(model)
    assert main(["check", str(folder), "--no-run"]) == 0
    found = diff(folder, model)
    assert found.equal
    assert not found.notes


@pytest.mark.parametrize("leaf", [16, 100, 2048])
@pytest.mark.parametrize("key", [f"mp_rank_01_001:{HEAD}", f"mp_rank_01_000:{NORM}"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("world", [1, 3])
def test_a_difference_in_any_leaf_is_found_by_whichever_rank_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaf: int, key: str, where: str, world: int
) -> None:
    monkeypatch.setattr(plan, "LEAF_BYTES", leaf)
    monkeypatch.setattr(verify, "LEAF_BYTES", leaf)
    model, folder, made = shards_of(tmp_path / "work")
    target = next(t for t in made.plan.target.tensors if t.key == key)
    size = target.spec.nbytes - 2 * target.padding
    flip(folder, made, key, {"first": size, "middle": size // 2, "last": 1}[where])
    job = prepare(Request(folder, "hf", folder.parent / "out"))
    name = EMBEDDING if HEAD in key else "model.layers.1.post_attention_layernorm.weight"
    with pytest.raises(Damaged, match=name):
        for rank in range(world):
            run(job, Settings(rank=rank, world=world))
    assert not job.request.output.exists()
    assert name in "\n".join(diff(folder, model).notes)
    assert main(["check", str(folder), "--no-run"]) == Damaged.exit_code
