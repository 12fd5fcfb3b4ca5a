"""A source that is broken or hostile: HuggingFace directories, pickles, Megatron checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dconv.checkpoint.megatron import LATEST
from dconv.launch.__main__ import main
from tests.hostile.conftest import (
    CONTAINERS,
    DAMAGED,
    REFUSED,
    Attempt,
    edit_json,
    megatron_of,
    read_safetensors,
    write_safetensors,
)
from tests.models import tensors

# ---------------------------------------------------------------------------------------------------- HuggingFace


def test_control_the_untouched_model_converts(model: Path) -> None:
    """Without damage the same calls succeed, so that every refusal below is about its damage."""
    assert main([str(model), "megatron", "-o", str(model.parent / "out"), "--tp", "2", "--quiet"]) == 0


def test_missing_shard(model: Path, attempt: Attempt) -> None:
    gone = sorted(model.glob("*.safetensors"))[1]
    gone.unlink()
    attempt(DAMAGED, gone.name, "1 of 3 shards", model=model)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 64), ("vocab_size", 60), ("num_key_value_heads", 4)])
def test_wrong_shape(model: Path, attempt: Attempt, key: str, value: int) -> None:
    """The config says another shape than the tensors have."""
    edit_json(model / "config.json", lambda config: config | {key: value})
    attempt(DAMAGED, "shape", "expected", "found", model=model)


def test_config_with_more_layers_than_there_are(model: Path, attempt: Attempt) -> None:
    edit_json(model / "config.json", lambda config: config | {"num_hidden_layers": 6})
    attempt(DAMAGED, "model.layers.{4..5}", model=model)


@pytest.mark.parametrize("value", [0, -4, "4", None, 4.5, [4], 10**30, True])
def test_nonsense_in_the_config(model: Path, attempt: Attempt, value: object) -> None:
    """A number of layers that is no number of layers."""
    edit_json(model / "config.json", lambda config: config | {"num_hidden_layers": value})
    attempt(DAMAGED, "num_hidden_layers", model=model)


def test_unknown_tensors_are_grouped_and_drop_leaves_them_out(
    model: Path, attempt: Attempt, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with one line for all layers; ``--drop`` works and the receipt says so."""
    add_tensors(model, [f"model.layers.{i}.mlp.surprise.weight" for i in range(4)])
    text = attempt(REFUSED, "model.layers.{0..3}.mlp.surprise.weight", "4 of 43", "--drop", model=model)
    assert text.count("surprise") <= 3  # where, do: not one a tensor
    out = model.parent / "out"
    words = [str(model), "megatron", "-o", str(out), "--drop", "model.layers.*.mlp.surprise.weight", "--json"]
    assert main(words) == 0
    left_out = json.loads((out / "dconv.json").read_text())["left_out"]
    assert {f"model.layers.{i}.mlp.surprise.weight" for i in range(4)} <= left_out.keys()
    assert all("--drop" in left_out[f"model.layers.{i}.mlp.surprise.weight"] for i in range(4))
    assert "model.layers.0.mlp.surprise.weight" in json.loads(capsys.readouterr().out)["left_out"]


@pytest.mark.parametrize(
    "name",
    ["../model-00001-of-00002.safetensors", "/etc/passwd", "a\0b", "..\\x", "C:x", "", ".", "..", "a/b", 7, None],
)
def test_weight_map_that_points_outside(model: Path, attempt: Attempt, name: object) -> None:
    """Every file name of an index must be a plain name, whether or not such a file exists."""
    shutil.copy(sorted(model.glob("*.safetensors"))[0], model.parent / "model-00001-of-00002.safetensors")

    def point(index: dict[str, Any]) -> dict[str, Any]:
        return index | {"weight_map": {**index["weight_map"], "model.norm.weight": name}}

    edit_json(model / "model.safetensors.index.json", point)
    attempt(DAMAGED, "model.safetensors.index.json", model=model)


def test_index_that_disagrees_with_the_files(model: Path, attempt: Attempt) -> None:
    def swap(index: dict[str, Any]) -> dict[str, Any]:
        files = sorted(set(index["weight_map"].values()))
        return index | {"weight_map": {**index["weight_map"], "model.embed_tokens.weight": files[-1]}}

    edit_json(model / "model.safetensors.index.json", swap)
    attempt(DAMAGED, "model.embed_tokens.weight", model=model)


def test_one_file_beside_an_index_that_does_not_name_it(model: Path, attempt: Attempt) -> None:
    """Of the two transformers takes the one file, which may hold the newer weights."""
    shard = next(model.glob("model-*.safetensors"))
    (model / "model.safetensors").write_bytes(shard.read_bytes())
    attempt(DAMAGED, "two models", "model.safetensors.index.json", "model.safetensors is not among", model=model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "\xff", "[" * 100_000])
def test_rubbish_for_an_index(model: Path, attempt: Attempt, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text, "latin-1")
    attempt(DAMAGED, "model.safetensors.index.json", model=model)


def test_quantised_config(model: Path, attempt: Attempt) -> None:
    edit_json(model / "config.json", lambda config: config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    attempt(REFUSED, "quantis", model=model)


@pytest.mark.parametrize(
    ("architecture", "nearest"), [("LlamaForCausalLM2", "llama"), ("Qwen3ForCausalLM2", "qwen3"), ("", "")]
)
def test_unknown_architecture(model: Path, attempt: Attempt, architecture: str, nearest: str) -> None:
    edit_json(
        model / "config.json",
        lambda config: config | {"architectures": [architecture], "model_type": "mystery"},
    )
    attempt(REFUSED, architecture or "mystery", f"--model-type {nearest}", model=model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "nul\0"])
def test_rubbish_for_a_config(model: Path, attempt: Attempt, text: str) -> None:
    (model / "config.json").write_text(text)
    attempt(DAMAGED, "config.json", model=model)


def test_no_config(model: Path, attempt: Attempt) -> None:
    (model / "config.json").unlink()
    attempt(REFUSED, "--hf-config", model=model)


def add_tensors(model: Path, names: list[str]) -> None:
    """Append small tensors to a model's last file and to its index."""
    shard = sorted(model.glob("*.safetensors"))[-1]
    header, body = read_safetensors(shard)
    for name in names:
        header[name] = {"dtype": "BF16", "shape": [4], "data_offsets": [len(body), len(body) + 8]}
        body += bytes(8)
    write_safetensors(shard, json.dumps(header).encode(), body)
    index = model / "model.safetensors.index.json"
    edit_json(index, lambda old: old | {"weight_map": old["weight_map"] | dict.fromkeys(names, shard.name)})


# -------------------------------------------------------------------------------------------------------- pickles


class Foreign:
    """Unpickling it would make a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._canary),))


def torch_state(model: Path) -> dict[str, object]:
    return {
        name: torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
        for name, (_, shape, data) in tensors(model).items()
    }


def as_bin(model: Path, state: dict[str, object], *, legacy_zip: bool = True) -> None:
    """Make a model a ``pytorch_model.bin`` one."""
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=legacy_zip)


def test_the_canary_sings(tmp_path: Path) -> None:
    """Control: unpickling `Foreign` freely does make the file."""
    pickle.loads(pickle.dumps(Foreign(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("key", ["extra", "model.norm.weight"])
def test_foreign_global_in_a_bin(model: Path, attempt: Attempt, tmp_path: Path, key: str) -> None:
    as_bin(model, torch_state(model) | {key: Foreign(tmp_path / "canary")})
    attempt(DAMAGED, "mkdir", "pytorch_model.bin", model=model)
    assert not (tmp_path / "canary").exists()


def test_bin_in_the_old_form(model: Path, attempt: Attempt, tmp_path: Path) -> None:
    """Torch's form before zip is never run either."""
    canary = tmp_path / "canary"
    as_bin(model, torch_state(model) | {"extra": Foreign(canary)}, legacy_zip=False)
    attempt(DAMAGED, "mkdir", "pytorch_model.bin", model=model)
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 10, 3000, -1, -100])
def test_truncated_bin(model: Path, attempt: Attempt, keep: int) -> None:
    as_bin(model, torch_state(model))
    path = model / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, "pytorch_model.bin", model=model)


@pytest.mark.parametrize("where", ["args", "model", "tensor"])
def test_foreign_global_in_a_legacy_shard(model: Path, attempt: Attempt, tmp_path: Path, where: str) -> None:
    source = megatron_of(model, "legacy")
    path = source / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    tree = torch.load(path, weights_only=False)
    foreign = Foreign(tmp_path / "canary")
    if where == "tensor":
        tree["model"]["decoder.final_layernorm.weight"] = foreign
    else:
        tree[where] = foreign
    torch.save(tree, path)
    attempt(DAMAGED, "mkdir", "mp_rank_01_001", model=source, options="hf")
    assert not (tmp_path / "canary").exists()


def test_foreign_global_in_dcp_metadata(model: Path, attempt: Attempt, tmp_path: Path) -> None:
    source = megatron_of(model, "torch_dist")
    (source / "release" / ".metadata").write_bytes(pickle.dumps({"x": Foreign(tmp_path / "canary")}))
    attempt(DAMAGED, "mkdir", ".metadata", model=source, options="hf")
    assert not (tmp_path / "canary").exists()


# ------------------------------------------------------------------------------------------------------- Megatron


@pytest.mark.parametrize("whole_folder", [True, False])
def test_missing_mp_rank(model: Path, attempt: Attempt, whole_folder: bool) -> None:
    source = megatron_of(model, "legacy")
    gone = source / "release" / "mp_rank_01_000"
    if whole_folder:
        shutil.rmtree(gone)
    else:
        (gone / "model_optim_rng.pt").unlink()
    attempt(DAMAGED, "mp_rank_01_000", "missing", model=source, options="hf")


def test_missing_last_stage(model: Path, attempt: Attempt) -> None:
    """All shards of the last stage gone looks like a smaller layout; the layers do not add up."""
    source = megatron_of(model, "legacy", tp=1, pp=2)
    shutil.rmtree(source / "release" / "mp_rank_00_001")
    attempt(DAMAGED, "model.layers.{2..3}", model=source, options="hf")


@pytest.mark.parametrize("keep", [0, 100, -1, -2000])
def test_truncated_legacy_shard(model: Path, attempt: Attempt, keep: int) -> None:
    source = megatron_of(model, "legacy")
    path = source / "release" / "mp_rank_01_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, "mp_rank_01_000", model=source, options="hf")


def test_missing_distcp(model: Path, attempt: Attempt) -> None:
    source = megatron_of(model, "torch_dist")
    (source / "release" / "__1_0.distcp").unlink()
    attempt(DAMAGED, "__1_0.distcp", "missing", model=source, options="hf")


@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
def test_truncated_distcp(model: Path, attempt: Attempt, keep: int) -> None:
    source = megatron_of(model, "torch_dist")
    path = source / "release" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, "__1_0.distcp", model=source, options="hf")


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -1000])
def test_truncated_metadata(model: Path, attempt: Attempt, keep: int) -> None:
    source = megatron_of(model, "torch_dist")
    path = source / "release" / ".metadata"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, ".metadata", model=source, options="hf")


def test_missing_metadata(model: Path, attempt: Attempt) -> None:
    source = megatron_of(model, "torch_dist")
    (source / "release" / ".metadata").unlink()
    attempt(DAMAGED, ".metadata", model=source, options="hf")


def test_unfinished_torch_dist(model: Path, attempt: Attempt) -> None:
    """Megatron writes metadata.json last: without it the save was cut off."""
    source = megatron_of(model, "torch_dist")
    (source / "release" / "metadata.json").unlink()
    attempt(DAMAGED, "metadata.json", model=source, options="hf")


@pytest.mark.parametrize("text", ["", "x", "../release", "99", "9" * 400, "-1", "1.5", "release\nx", "٣", "\0", "\xff"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_tracker_with_rubbish(model: Path, attempt: Attempt, container: str, text: str) -> None:
    source = megatron_of(model, container)
    (source / LATEST).write_bytes(text.encode("utf-8", "replace"))
    attempt(DAMAGED, LATEST, model=source, options="hf")


@pytest.mark.parametrize("container", CONTAINERS)
def test_config_with_fewer_tokens_than_the_checkpoint(
    model: Path, attempt: Attempt, tmp_path: Path, container: str
) -> None:
    """What was trained must not be left out as if it were padding."""
    source = megatron_of(model, container)
    tokens = json.loads((model / "config.json").read_text())["vocab_size"]
    edit_json(model / "config.json", lambda config: config | {"vocab_size": tokens - 1})
    attempt(REFUSED, "fewer tokens", str(tokens), model=source, options=f"hf --hf-config {model}")
    edit_json(model / "config.json", lambda config: config | {"vocab_size": tokens})
    assert main([str(source), "hf", "--hf-config", str(model), "-o", str(tmp_path / "out"), "--quiet"]) == 0


def test_config_of_another_model_inside(model: Path, attempt: Attempt) -> None:
    source = megatron_of(model, "legacy")
    edit_json(source / "huggingface" / "config.json", lambda config: config | {"intermediate_size": 96})
    attempt(REFUSED, "intermediate_size 96", model=source, options="hf")


def test_from_megatron_takes_nothing_else(model: Path, attempt: Attempt) -> None:
    attempt(REFUSED, "not a Megatron checkpoint", "huggingface", model=model, options="hf --from megatron")
