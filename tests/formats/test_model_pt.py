"""Megatron's ``model.pt`` with ``metadata.json``, and bare ``mp_rank_*`` files.

What dconv writes is opened by torch itself; what it reads was written by torch in the test.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dconv.arch.registry import by_name
from dconv.errors import Damaged, DconvError, Refused
from dconv.examine import inspect
from dconv.pipeline import Request, convert, describe_model
from dconv.sharding.coords import Parallel
from tests.formats.house import load, refused, same, source
from tests.models import tensors


def bare(folder: Path, model: Path, tp: int, pp: int) -> Path:
    """``mp_rank_*`` directly in a directory with only the model inside, as torch saves it."""
    folder.mkdir(parents=True)
    made = folder.parent / "whole"
    convert(Request(model, "megatron", made, parallel=Parallel(tp=tp, pp=pp, etp=tp), megatron_format="legacy"))
    for path in sorted((made / "release").glob("mp_rank_*")):
        states = torch.load(path / "model_optim_rng.pt", weights_only=False)
        (folder / path.name).mkdir(parents=True)
        torch.save({"model": states["model"]}, folder / path.name / "model_optim_rng.pt")
    return folder


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_bare_mp_rank(tmp_path: Path, tp: int, pp: int) -> None:
    model = source(tmp_path / "model")
    made = bare(tmp_path / "work" / "bare", model, tp, pp)
    error = refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "work" / "out"))
    assert "--hf-config" in error.do
    convert(Request(made, "hf", tmp_path / "a", hf_config=model))
    shutil.copy(model / "config.json", made)
    convert(Request(made, "hf", tmp_path / "b"))
    for out in "ab":
        assert tensors(tmp_path / out) == tensors(model)


def test_a_neighbour_is_not_the_config_of_bare_shards(tmp_path: Path) -> None:
    """``huggingface/`` beside bare shards is anybody's; inside a root it is the iteration's."""
    made = bare(tmp_path / "work" / "bare", source(tmp_path / "model"), 1, 1)
    source(tmp_path / "work" / "huggingface", rope_theta=5e5)
    assert describe_model(tmp_path / "work" / "whole").source.config is not None
    refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "work" / "out"))


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("phi3", False)])
def test_model_pt(tmp_path: Path, family: str, tied: bool, impl: str) -> None:
    """The same tensors as the legacy container's only rank, without what stands around them."""
    model = source(tmp_path / "model", family, tie_word_embeddings=tied)
    common: dict[str, Any] = {"transformer_impl": impl, "divisor": 8}
    convert(Request(model, "megatron", tmp_path / "legacy", megatron_format="legacy", **common))
    convert(Request(model, "megatron", tmp_path / "made", megatron_format="model_pt", **common))
    states = torch.load(tmp_path / "legacy" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    found = torch.load(tmp_path / "made" / "model.pt", weights_only=True)
    assert found.keys() == states["model"].keys()
    assert [n for n, w in found.items() if w is None] == [n for n, w in found.items() if n.endswith("_extra_state")]
    same(load(tmp_path / "made" / "model.pt"), {n: w for n, w in states["model"].items() if w is not None})
    said = json.loads((tmp_path / "made" / "metadata.json").read_text())
    fields = ("model_type", "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    assert [said[key] for key in fields] == [family, 4, 32, 4, 128, 61]
    fields = ("position_embedding_type", "swiglu", "linear_bias", "output_layer")
    assert [said[key] for key in fields] == ["rope", True, False, not tied]
    convert(Request(tmp_path / "made", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").exists()


@pytest.mark.parametrize("parallel", [Parallel(tp=2, etp=2), Parallel(pp=2), Parallel(tp=2, pp=2, etp=2)])
def test_model_pt_is_one_file(tmp_path: Path, parallel: Parallel) -> None:
    model = source(tmp_path / "work" / "model")
    out = tmp_path / "work" / "out"
    refused(
        Refused,
        "whole model in one file",
        Request(model, "megatron", out, parallel=parallel, megatron_format="model_pt"),
    )


def house(folder: Path, model: Path, **fields: Any) -> Path:
    """A ``model.pt`` that torch saved, with the loaders' fields in ``metadata.json``, and nothing else."""
    folder.mkdir(parents=True)
    made = folder.parent / "legacy"
    convert(Request(model, "megatron", made, megatron_format="legacy", divisor=8))
    states = torch.load(made / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    torch.save(states["model"], folder / "model.pt")
    said = {
        "model_type": "GPT", "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4,
        "max_position_embeddings": 128, "vocab_size": 61, "position_embedding_type": "rope", "swiglu": True,
        "linear_bias": False, "output_layer": True, **fields,
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))
    return folder


ENOUGH = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}


def test_house_model_pt_needs_what_it_does_not_say(tmp_path: Path) -> None:
    """The house fields alone leave out epsilon and base, which no tensor shows: asked for, not guessed."""
    model = source(tmp_path / "model")
    made = house(tmp_path / "work" / "house", model)
    error = refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "work" / "out"))
    assert "rms_norm_eps, rope_theta" in error.found
    assert "--hf-config" in error.do
    assert "rms_norm_eps" in inspect(made).refused
    convert(Request(made, "hf", tmp_path / "a", hf_config=model))
    convert(Request(made / "model.pt", "hf", tmp_path / "b", hf_config=model))
    for out in "ab":
        assert tensors(tmp_path / out) == tensors(model)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen2", False)])
def test_metadata_that_says_enough(tmp_path: Path, family: str, tied: bool) -> None:
    """Query groups, head size, feed-forward size, norms and biases are read off the tensors, exactly."""
    model = source(tmp_path / "model", family, tie_word_embeddings=tied, rope_theta=5e5)
    fields = {**ENOUGH, "rope_theta": 5e5, "output_layer": not tied, "max_position_embeddings": 777}
    made = house(tmp_path / "work" / "house", model, **fields)
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    config = by_name(family).config
    assert config.facts(said) == config.facts(json.loads((model / "config.json").read_text()))
    assert (said["rms_norm_eps"], said["rope_theta"], said["max_position_embeddings"]) == (1e-5, 5e5, 777)
    assert said["torch_dtype"] == "bfloat16"


def test_own_metadata_without_its_side_files(tmp_path: Path) -> None:
    """What dconv writes describes the model by itself where the fields can; a scaled rope they cannot say."""
    for name, rope in (("plain", None), ("scaled", {"rope_type": "linear", "factor": 2.0})):
        model = source(tmp_path / name, rope_scaling=rope)
        made = tmp_path / f"{name}-made"
        convert(Request(model, "megatron", made, megatron_format="model_pt"))
        shutil.rmtree(made / "huggingface")
        if rope is None:
            convert(Request(made, "hf", tmp_path / "hf"))
            assert tensors(tmp_path / "hf") == tensors(model)
        else:
            refused(Refused, "nothing says what model this is", Request(made, "hf", tmp_path / "out"))


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"num_layers": 3}, Refused, "in no row of llama"),
        ({"num_layers": 5}, Damaged, "not whole"),
        ({"num_layers": True}, Damaged, "num_layers is True"),
        ({"num_layers": 10**9}, Damaged, "num_layers is 1000000000"),
        ({"num_layers": "absent"}, Refused, "nothing says"),
        ({"hidden_size": 64}, Damaged, "another shape"),
        ({"num_attention_heads": 3}, Damaged, "another model than its tensors"),
        ({"num_attention_heads": 16, "head_dim": 8}, Damaged, "another model than its tensors"),
        ({"intermediate_size": 64}, Damaged, "another model than its tensors"),
        ({"num_key_value_heads": 4}, Damaged, "another model than its tensors"),
        ({"vocab_size": 65}, Damaged, "another model than its tensors"),
        ({"vocab_size": -1}, Damaged, "vocab_size is -1"),
        ({"linear_bias": True}, Damaged, "not whole"),
        ({"linear_bias": "no"}, Damaged, "true or false"),
        ({"output_layer": False}, Damaged, "two shards of the source disagree"),
        ({"position_embedding_type": "learned_absolute"}, Refused, "none of the families"),
        ({"swiglu": False}, Refused, "none of the families"),
        ({"model_type": "minicpm"}, Refused, "nothing says"),
        ({"model_type": "qwen3"}, Refused, "nothing says"),
        ({"rms_norm_eps": "1e-5"}, Damaged, "finite number"),
        ({"rope_theta": None}, Refused, "nothing says"),
        ({"sharded_backend": "zarr"}, Damaged, "another container"),
        ({"sharded_backend": "torch_dist"}, Damaged, "metadata"),
    ],
)
def test_metadata_that_lies(tmp_path: Path, fields: dict[str, Any], kind: type[DconvError], message: str) -> None:
    model = source(tmp_path / "model", vocab_size=61)
    made = house(tmp_path / "work" / "house", model, **{**ENOUGH, **fields})
    refused(kind, message, Request(made, "hf", tmp_path / "work" / "out"))


def test_torch_dist_beside_a_model_pt(tmp_path: Path) -> None:
    """``sharded_backend`` is looked at first: the directory is torch_dist's, whatever else lies in it."""
    model = source(tmp_path / "model")
    convert(Request(model, "megatron", tmp_path / "dist"))
    torch.save({"decoder.final_layernorm.weight": torch.zeros(32)}, tmp_path / "dist" / "release" / "model.pt")
    found = describe_model(tmp_path / "dist")
    assert found.source.format == "megatron torch_dist"
    convert(Request(tmp_path / "dist", "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)


def test_extra_states_of_any_kind(tmp_path: Path) -> None:
    """TransformerEngine keeps a tensor there; it is no weight."""
    model = source(tmp_path / "model")
    made = house(tmp_path / "house", model, **ENOUGH)
    held = torch.load(made / "model.pt")
    held["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.zeros(5, dtype=torch.uint8)
    torch.save(held, made / "model.pt")
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)
