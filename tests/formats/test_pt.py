"""``pt``: one plain state dict, or one a tensor-parallel rank.

What dconv writes is opened by torch itself; what it reads was written by torch in the test.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dconv.errors import Damaged, Refused
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from tests.formats.house import FAMILIES, load, refused, same, source, weights_of
from tests.models import tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pt_is_a_plain_state_dict(tmp_path: Path, family: str, tied: bool) -> None:
    model = source(tmp_path / "model", family, tie_word_embeddings=tied)
    convert(Request(model, "pt", tmp_path / "pt"))
    same(load(tmp_path / "pt" / "pytorch_model.bin"), weights_of(model))
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "pt" / name).read_bytes() == (model / name).read_bytes()
    convert(Request(tmp_path / "pt", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
def test_pt_cut_into_ranks(tmp_path: Path, family: str, tied: bool, tp: int) -> None:
    """Each file has torch's own chunk of rows or columns, and the files together are the model again."""
    model = source(tmp_path / "model", family, tie_word_embeddings=tied, num_key_value_heads=4, vocab_size=64)
    convert(Request(model, "pt", tmp_path / "pt", parallel=Parallel(tp=tp, etp=tp)))
    whole = weights_of(model)
    for rank in range(tp):
        expected = {}
        for name, weight in whole.items():
            axis = None if "norm" in name else int(name.endswith(("o_proj.weight", "down_proj.weight")))
            expected[name] = weight if axis is None else weight.chunk(tp, axis)[rank]
        same(load(tmp_path / "pt" / f"pytorch_model.tp{rank}.bin"), expected)
    assert not (tmp_path / "pt" / f"pytorch_model.tp{tp}.bin").exists()
    convert(Request(tmp_path / "pt", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)


def test_pt_with_dtype(tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    convert(Request(model, "pt", tmp_path / "pt", dtype="f32"))
    assert {weight.dtype for weight in load(tmp_path / "pt" / "pytorch_model.bin").values()} == {torch.float32}
    assert json.loads((tmp_path / "pt" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("family", "sizes", "tp", "message"),
    [
        ("llama", {"vocab_size": 64}, 4, "q_proj.weight does not divide over 4"),  # two query groups
        ("llama", {}, 2, "does not divide over tensor parallel 2"),  # 61 words
        ("llama", {"vocab_size": 64, "intermediate_size": 45}, 2, "does not divide"),
        ("phi3", {"vocab_size": 64}, 2, "qkv_proj.weight does not divide over 2"),
    ],
)
def test_pt_that_does_not_divide(tmp_path: Path, family: str, sizes: dict[str, Any], tp: int, message: str) -> None:
    model = source(tmp_path / "work" / "model", family, **sizes)
    request = Request(model, "pt", tmp_path / "work" / "out", parallel=Parallel(tp=tp, etp=tp))
    refused(Refused, message, request)


def test_ranks_of_fused_projections_are_not_put_together(tmp_path: Path) -> None:
    model = source(tmp_path / "work" / "model", "phi3", vocab_size=64)
    weights = weights_of(model)
    (model / "model.safetensors").unlink()
    for rank in range(2):
        cut = {n: w if "norm" in n else w.chunk(2, int("o_proj" in n or "down" in n))[rank] for n, w in weights.items()}
        torch.save(cut, model / f"pytorch_model.tp{rank}.bin")
    refused(Refused, "fused projections", Request(model, "hf", tmp_path / "work" / "out"))


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pth", "pytorch_model.bin", "anything.bin"])
@pytest.mark.parametrize("old_form", [False, True])
def test_a_file_by_name_and_its_directory(tmp_path: Path, name: str, old_form: bool) -> None:
    """Read with the config beside it, or with another's, or as the directory's only state dict."""
    model = source(tmp_path / "model")
    bare = tmp_path / "bare"
    bare.mkdir()
    torch.save(weights_of(model), bare / name, _use_new_zipfile_serialization=not old_form)
    convert(Request(bare / name, "hf", tmp_path / "a", hf_config=model))
    shutil.copy(model / "config.json", bare)
    torch.save({"step": 1}, bare / "training_args.bin")  # a trainer's, no weights
    convert(Request(bare / name, "hf", tmp_path / "b"))
    convert(Request(bare, "hf", tmp_path / "c"))
    for out in "abc":
        assert tensors(tmp_path / out) == tensors(model)


def test_a_bare_file_without_a_config(tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    bare = tmp_path / "bare"
    bare.mkdir()
    torch.save(weights_of(model), bare / "model.pt")
    error = refused(Refused, "nothing says what model this is", Request(bare / "model.pt", "hf", bare / "out"))
    assert "--hf-config" in error.do


def test_two_state_dicts_are_not_guessed_between(tmp_path: Path) -> None:
    model = source(tmp_path / "work" / "model")
    weights = weights_of(model)
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "a.pt")
    torch.save(weights, model / "b.pt")
    refused(Damaged, "no weights that can be told apart", Request(model, "hf", tmp_path / "work" / "out"))
    refused(Damaged, "no state dict that can be told apart",
            Request(model, "hf", tmp_path / "work" / "out", source_format="pt"))  # fmt: skip
    convert(Request(model / "b.pt", "hf", tmp_path / "out"))
    assert weights_of(tmp_path / "out").keys() == weights.keys()


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_truncated(tmp_path: Path, keep: int) -> None:
    work = tmp_path / "work"
    work.mkdir()
    convert(Request(source(tmp_path / "model"), "pt", work / "pt"))
    path = work / "pt" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    refused(Damaged, "", Request(path, "hf", work / "out"))


class Evil:
    """Pickled as a call of ``os.system``."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("names", ["pt", "bmtrain", "model_pt"])
def test_a_pickle_that_is_code(tmp_path: Path, names: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    made = {
        "pt": "model.norm.weight",
        "bmtrain": "input_embedding.weight",
        "model_pt": "decoder.final_layernorm.weight",
    }
    torch.save({made[names]: torch.ones(4), "x": Evil(tmp_path / "executed")}, work / "model.pt")
    (work / "metadata.json").write_text('{"model_type": "GPT"}')
    for path in (work, work / "model.pt"):
        refused(Damaged, "foreign global", Request(path, "hf", work / "out"))
    assert not (tmp_path / "executed").exists()
    torch.load(work / "model.pt", weights_only=False)
    assert (tmp_path / "executed").exists(), "the pickle was not hostile at all"


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", "fifo.pt"])
def test_other_files(tmp_path: Path, name: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    if name == "fifo.pt":
        os.mkfifo(work / name)
        with pytest.raises(Refused, match="a checkpoint is a directory"):
            prepare(Request(work / name, "hf", work / "out"))
        return
    (work / name).write_bytes(b"PK")
    refused(Refused, "a checkpoint is a directory", Request(work / name, "hf", work / "out"))


@pytest.mark.parametrize("container", ["pt", "bmtrain", "model_pt"])
def test_a_file_of_another_kind_is_no_state_dict(tmp_path: Path, container: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(Damaged, match="no state dict that can be told apart") as caught:
        prepare(Request(tmp_path / "model.gguf", "hf", tmp_path / "out", source_format=container))
    assert caught.value.found == "model.gguf"
