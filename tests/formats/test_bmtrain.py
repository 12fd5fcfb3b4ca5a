"""BMTrain's and ModelCenter's files.

What dconv writes is opened by torch itself; what it reads was written by torch in the test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dconv.arch.registry import by_name
from dconv.errors import Damaged, DconvError, Refused
from dconv.examine import inspect
from dconv.pipeline import Request, convert
from tests.formats.house import load, refused, same, source, weights_of
from tests.models import tensors


def bmtrain_name(name: str) -> str:
    """HuggingFace's name as the public BMTrain converters translate it."""
    for theirs, ours in (
        ("model.embed_tokens", "input_embedding"), ("model.norm", "encoder.output_layernorm"),
        ("lm_head", "output_projection"), ("model.layers", "encoder.layers"),
        ("post_attention_layernorm", "ffn.layernorm_before_ffn"),
        ("input_layernorm", "self_att.layernorm_before_attention"),
        ("self_attn.o_proj", "self_att.self_attention.attention_out"), ("mlp.gate_proj", "ffn.ffn.w_in.w_0"),
        ("mlp.up_proj", "ffn.ffn.w_in.w_1"), ("mlp.down_proj", "ffn.ffn.w_out"),
        *((f"self_attn.{x}_proj", f"self_att.self_attention.project_{x}") for x in "qkv"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_bmtrain(tmp_path: Path, tied: bool, biased: bool) -> None:
    sizes = {"tie_word_embeddings": tied, "attention_bias": biased, "mlp_bias": biased, "rope_theta": 5e5}
    model = source(tmp_path / "model", **sizes)
    convert(Request(model, "bmtrain", tmp_path / "bmt"))
    expected = {bmtrain_name(name): weight for name, weight in weights_of(model).items()}
    same(load(tmp_path / "bmt" / "pytorch_model.pt"), expected)
    said = json.loads((tmp_path / "bmt" / "config.json").read_text())
    keys = ("dim_model", "dim_ff", "num_layers", "num_heads", "num_kv_heads", "dim_head")
    assert [said[key] for key in keys] == [32, 48, 4, 4, 2, 8]
    assert (said["vocab_size"], said["eps"], said["base"], said["tie_lm_head"]) == (61, 1e-5, 5e5, tied)
    assert not said.keys() & {"hidden_size", "scale_emb", "scale_depth", "dim_model_base"}
    convert(Request(tmp_path / "bmt", "hf", tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(model)
    family = by_name("llama")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "back"))
    assert family.config.facts(after) == family.config.facts(before)
    assert {key: after[key] for key in ("rms_norm_eps", "rope_theta", "torch_dtype", "max_position_embeddings")} == {
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "torch_dtype": "bfloat16", "max_position_embeddings": 128,
    }  # fmt: skip


def bmtrain_source(folder: Path, model: Path, **config: Any) -> Path:
    """A ModelCenter directory as its own converters write it: four sizes in the config, torch.save."""
    folder.mkdir(parents=True)
    torch.save({bmtrain_name(n): w for n, w in weights_of(model).items()}, folder / "pytorch_model.pt")
    said = {"dim_model": 32, "dim_ff": 48, "num_layers": 4, "num_heads": 4, "dim_head": 8, "norm_eps": 1e-5, **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value != "absent"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_bmtrain_sizes_from_the_tensors(tmp_path: Path) -> None:
    """Query groups, vocabulary and tying are what the tensors show; the rotation's base is ModelCenter's constant."""
    model = source(tmp_path / "model", tie_word_embeddings=True)
    made = bmtrain_source(tmp_path / "bmt", model)
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (said["num_key_value_heads"], said["vocab_size"], said["tie_word_embeddings"]) == (2, 61, True)
    assert said["rope_theta"] == 10000.0


def test_bmtrain_minicpm_is_called_by_its_name(tmp_path: Path) -> None:
    """MiniCPM's scalars make it a MiniCPM, never a Llama without them."""
    model = source(tmp_path / "model", tie_word_embeddings=True)
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
    made = bmtrain_source(tmp_path / "bmt", model, eps=1e-5, tie_lm_head=True, scale=True, **scales)
    found = inspect(made)
    assert found.architecture == "MiniCPMForCausalLM"
    from dconv.arch.registry import families

    if "minicpm" not in families():
        refused(Refused, "no family is called MiniCPMForCausalLM", Request(made, "hf", tmp_path / "out"))
        return
    convert(Request(made, "hf", tmp_path / "hf"))
    assert tensors(tmp_path / "hf") == tensors(model)
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {key: said[key] for key in scales} == scales
    convert(Request(tmp_path / "hf", "bmtrain", tmp_path / "again"))
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: said[key] for key in scales} == scales


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"norm_eps": "absent"}, Damaged, "norm_eps is None"),
        ({"num_heads": "absent"}, Damaged, "num_heads is None"),
        ({"num_heads": 3}, Damaged, "project_q is 32"),
        ({"dim_head": 16}, Damaged, "another shape"),
        ({"dim_ff": 64}, Damaged, "another shape"),
        ({"num_layers": 3}, Refused, "in no row of llama"),
        ({"num_layers": 5}, Damaged, "not whole"),
        ({"num_layers": "4"}, Damaged, "num_layers is '4'"),
        ({"qk_norm": True}, Refused, "neither Llama nor MiniCPM"),
        ({"ffn_activate_fn": "gated_gelu"}, Refused, "neither Llama nor MiniCPM"),
        ({"rope_scaling_type": "longrope"}, Refused, "neither Llama nor MiniCPM"),
        ({"scale_emb": 12}, Refused, "neither Llama nor MiniCPM"),
        ({"att_bias": True}, Damaged, "not whole"),
        ({"tie_lm_head": False}, Damaged, "not whole"),
    ],
)
def test_bmtrain_config_that_lies(tmp_path: Path, config: dict[str, Any], kind: type[DconvError], message: str) -> None:
    model = source(tmp_path / "model", tie_word_embeddings=True)
    made = bmtrain_source(tmp_path / "work" / "bmt", model, **config)
    refused(kind, message, Request(made, "hf", tmp_path / "work" / "out"))
    if kind is Refused or config.get("num_heads") or "norm_eps" in config:  # the true config in its place
        convert(Request(made, "hf", tmp_path / "out", hf_config=model))
        assert tensors(tmp_path / "out") == tensors(model)


def test_bmtrain_under_two_names(tmp_path: Path) -> None:
    model = source(tmp_path / "model", tie_word_embeddings=True)
    made = bmtrain_source(tmp_path / "work" / "bmt", model)
    held = torch.load(made / "pytorch_model.pt")
    torch.save({**held, "model.norm.weight": torch.zeros(32)}, made / "pytorch_model.pt")
    refused(Damaged, "two|at once", Request(made, "hf", tmp_path / "work" / "out"))


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("qwen3", {}, "no place for 8 of"),
        ("qwen2", {}, "cannot say all of this qwen2"),
        ("phi3", {}, "no place for"),
        ("mistral", {"sliding_window": 64}, "cannot say all of this mistral"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "cannot say all of this llama"),
        ("llama", {"hidden_act": "gelu"}, "cannot say all of this llama"),
        ("llama", {"scale_emb": 12}, "cannot say all of this llama"),
    ],
)
def test_what_bmtrain_has_no_place_for(tmp_path: Path, family: str, sizes: dict[str, Any], message: str) -> None:
    model = source(tmp_path / "work" / "model", family, **sizes)
    refused(Refused, message, Request(model, "bmtrain", tmp_path / "work" / "out"))
