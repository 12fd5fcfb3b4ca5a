"""A Megatron checkpoint that can be read in two ways is refused, and what it holds beside a model is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: legacy files cannot be edited")

from dconv.arch.registry import by_name  # noqa: E402
from dconv.errors import Damaged, DconvError, Refused  # noqa: E402
from dconv.pipeline import Request, convert, prepare  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from tests.models import config_of, tensors, write_random  # noqa: E402

LLAMA = by_name("llama")
FILE = "model_optim_rng.pt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random(tmp_path / "work" / "model", LLAMA, config_of(LLAMA))


@pytest.fixture
def shards(model: Path) -> Path:
    out = model.parent / "shards"
    parallel = Parallel(tp=2, pp=2, etp=2)
    convert(Request(model, "megatron", out, parallel=parallel, megatron_format="legacy", divisor=8))
    return out / "release"


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tree = torch.load(file, weights_only=False)  # our own file
    change(tree)
    torch.save(tree, file)


@pytest.mark.parametrize(
    ("change", "kind", "word"),
    [
        (lambda t: t["model"].update(adapter={"lora_A": torch.ones(2)}), Refused, "adapter"),
        (lambda t: t["model"].update(extra=[torch.ones(2)]), Refused, "extra"),
        (lambda t: t["model"].update({7: torch.ones(2)}), Damaged, "7"),
        (lambda t: t.update(model0=t["model"]), Damaged, "model0"),
        (lambda t: t.update(model1=t["model"]), Damaged, "model1"),
        (lambda t: t["model"].update({f"decoder.layers.{'9' * 5000}.w": torch.ones(2)}), Refused, "in no row"),
        (lambda t: t.update({"model" + "9" * 5000: {}}), Damaged, "no model"),
    ],
)
def test_what_would_be_passed_over_is_refused(
    shards: Path, change: Callable[[dict[str, Any]], object], kind: type[DconvError], word: str
) -> None:
    edit(shards / "mp_rank_00_000" / FILE, change)
    with pytest.raises(kind, match=word):
        prepare(Request(shards, "hf", shards.parent / "out"))


def test_other_trees_are_named(shards: Path, model: Path) -> None:
    edit(shards / "mp_rank_01_001" / FILE, lambda t: t.update(ema={"w": torch.ones(2)}, optimizer={"step": 3}, note=1))
    out = model.parent / "out"
    convert(Request(shards, "hf", out))
    left_out = json.loads((out / "dconv.json").read_text())["left_out"]
    assert left_out["ema"] == "not the model"
    assert left_out["optimizer"] == "not weights"
    assert "note" not in left_out
    assert tensors(out) == tensors(model)


def test_two_directories_of_one_rank(shards: Path) -> None:
    shutil.rmtree(shards / "mp_rank_00_001")
    shutil.rmtree(shards / "mp_rank_01_001")
    shutil.copytree(shards / "mp_rank_00_000", shards / "mp_rank_000_000")
    with pytest.raises(Damaged, match="two directories"):
        prepare(Request(shards, "hf", shards.parent / "out"))


def test_a_number_that_no_cluster_has(shards: Path) -> None:
    (shards / "mp_rank_999999999_000").mkdir()
    with pytest.raises(Damaged, match="are missing"):
        prepare(Request(shards, "hf", shards.parent / "out"))


def test_rows_past_the_vocabulary_are_named(shards: Path, model: Path) -> None:
    out = model.parent / "out"
    convert(Request(shards, "hf", out))
    left_out = json.loads((out / "dconv.json").read_text())["left_out"]
    assert left_out == {
        "embedding.word_embeddings.weight, rows 61 to 63": "padding of the vocabulary",
        "output_layer.weight, rows 61 to 63": "padding of the vocabulary",
    }


def test_files_that_no_index_names_are_named(model: Path) -> None:
    for name in ("adapter_model.safetensors", "training_args.bin"):
        (model / name).write_bytes(b"anything")
    out = model.parent / "out"
    convert(Request(model, "hf", out))
    left_out = json.loads((out / "dconv.json").read_text())["left_out"]
    assert left_out.keys() == {"adapter_model.safetensors", "training_args.bin"}
