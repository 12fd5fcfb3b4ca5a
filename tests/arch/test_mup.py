"""``--mup2llama``: what comes out computes what went in, without scalars.

Judges: a short reference model of MiniCPM (transformers lacks it) and transformers' Granite and MiniCPM3 on the way in,
transformers' Llama and Mixtral on the way out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

from safetensors.torch import load_file, save_file  # noqa: E402

from dconv.pipeline import Request, convert  # noqa: E402
from tests.arch.test_minicpm import TOKENS, longrope, write_model  # noqa: E402
from tests.models import tensors  # noqa: E402
from tests.oracles import hf, minicpm  # noqa: E402

MUP_KEYS = {
    "scale_emb", "scale_depth", "dim_model_base", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling",
}  # fmt: skip
BIASED = {"attention_bias": True}
#: name -> (family, config keys, architecture of the result).
MINICPM: dict[str, tuple[str, dict[str, Any], str]] = {
    "untied": ("minicpm", {}, "LlamaForCausalLM"),
    "tied": ("minicpm", {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "biased": ("minicpm", BIASED, "LlamaForCausalLM"),
    "longrope": ("minicpm", {"rope_scaling": longrope(4, 64)}, "LlamaForCausalLM"),
    "longrope, long": ("minicpm", {"rope_scaling": longrope(4, 16)}, "LlamaForCausalLM"),
    "longrope, its stretch said": ("minicpm", {"rope_scaling": {**longrope(4, 16), "factor": 8.0}}, "LlamaForCausalLM"),
    "another base": ("minicpm", {"rope_theta": 500000.0}, "LlamaForCausalLM"),
    "null scalars": ("minicpm", {"scale_depth": None, "dim_model_base": None}, "LlamaForCausalLM"),
    "factors of 1": ("minicpm", {"scale_emb": 1, "scale_depth": 2.0, "dim_model_base": 32}, "LlamaForCausalLM"),
    "experts": ("minicpm_moe", {"tie_word_embeddings": True}, "MixtralForCausalLM"),
    "experts, three of four": ("minicpm_moe", {"num_experts_per_tok": 3}, "MixtralForCausalLM"),
}
#: Families that transformers has.
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "granite": ("granite", {}, "LlamaForCausalLM"),
    "granite, tied": ("granite", {"tie_word_embeddings": True}, "LlamaForCausalLM"),
    "granite, biased": ("granite", {**BIASED, "mlp_bias": True}, "LlamaForCausalLM"),
    "granite, attention biased": ("granite", BIASED, "LlamaForCausalLM"),
    "granite, wide heads": ("granite", {"head_dim": 32}, "LlamaForCausalLM"),
    "granite, longrope": (
        "granite",
        {"rope_parameters": {**longrope(8, 16), "rope_theta": 10000.0, "factor": 4.0}},
        "LlamaForCausalLM",
    ),
    "minicpm3": ("minicpm3", {}, "MiniCPM3ForCausalLM"),
    "minicpm3, tied": ("minicpm3", {"tie_word_embeddings": True}, "MiniCPM3ForCausalLM"),
}


def fold(source: Path, out: Path, format: str = "hf", **options: Any) -> Path:
    convert(Request(source, format, out, mup2llama=True, **options))
    return out


def config_at(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def difference(one: Any, other: Any) -> float:
    """The largest, relative to the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def in_bf16(folder: Path) -> Path:
    """The same model with its weights in bf16."""
    file = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    config = {**config_at(folder), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MINICPM)
def test_minicpm_computes_the_same_as_a_llama(name: str, tmp_path: Path) -> None:
    family, keys, architecture = MINICPM[name]
    source = write_model(tmp_path / "hf", family, **keys)
    out = fold(source, tmp_path / "out")
    config = config_at(out)
    assert config["architectures"] == [architecture]
    assert not config.keys() & {*MUP_KEYS, "auto_map", "sparse_config", "mup_denominator"}
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors(out)
    model = hf.load(out)
    assert type(model).__name__ == architecture
    theirs = minicpm.logits(source, TOKENS)
    assert difference(theirs, hf.logits(model, TOKENS)) <= 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_what_transformers_has_computes_the_same(name: str, tmp_path: Path) -> None:
    family, keys, architecture = OTHERS[name]
    _, model = hf.tiny(family, **keys)
    source = hf.save(model, tmp_path / "hf")
    out = fold(source, tmp_path / "out")
    assert config_at(out)["architectures"] == [architecture]
    assert config_at(out)["tie_word_embeddings"] is False
    assert difference(hf.logits(model, TOKENS), hf.logits(out, TOKENS)) <= 1e-5


def test_blockffn_loses_its_scalars_and_computes_the_same(tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "minicpm_blockffn", tie_word_embeddings=True)
    out = fold(source, tmp_path / "out")
    config = config_at(out)
    assert (config["scale_emb"], config["scale_depth"], config["dim_model_base"]) == (1, 2.0, 32)
    theirs, ours = minicpm.logits(source, TOKENS), minicpm.logits(out, TOKENS)
    assert difference(theirs, ours) <= 1e-5
    plain = {**config_at(source), "scale_emb": 1, "scale_depth": 2.0, "dim_model_base": 32}
    (source / "config.json").write_text(json.dumps(plain))
    assert difference(theirs, minicpm.logits(source, TOKENS)) > 1e-2  # the scalars do something


@pytest.mark.parametrize("name", ["tied", "untied", "experts"])
def test_bf16_chooses_the_same_token(name: str, tmp_path: Path) -> None:
    family, keys, _ = MINICPM[name]
    source = in_bf16(write_model(tmp_path / "hf", family, **keys))
    out = fold(source, tmp_path / "out")
    tokens = torch.randint(0, 60, (8, 64), generator=torch.Generator().manual_seed(11))
    agree = minicpm.logits(source, tokens).argmax(-1) == hf.logits(out, tokens).argmax(-1)
    assert agree.float().mean() >= 0.99


def products(source: Path, dtype: Any) -> dict[str, Any]:
    """What a fold of the tied MiniCPM must write, by numpy and ml_dtypes: fp64 products, rounded once."""
    config = config_at(source)
    residual = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    weights = {name: value.double().numpy() for name, value in load_file(source / "model.safetensors").items()}
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding * (config["dim_model_base"] / config["hidden_size"])
    weights["model.embed_tokens.weight"] = embedding * config["scale_emb"]
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias")):
            weights[name] = weights[name] * residual
    return {name: value.astype(dtype) for name, value in weights.items()}


@pytest.mark.parametrize(("dtype", "kind"), [(None, ml_dtypes.bfloat16), ("f32", np.float32), ("f16", np.float16)])
def test_weights_are_the_products_rounded_once(dtype: str | None, kind: Any, tmp_path: Path) -> None:
    """Of a cast and a scale together, too: an fp32 product of a bf16 weight never was bf16 in between."""
    source = in_bf16(write_model(tmp_path / "hf", "minicpm", tie_word_embeddings=True, scale_depth=1.3, **BIASED))
    out = fold(source, tmp_path / "out", dtype=dtype)
    found = tensors(out)
    expected = products(source, kind)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name][2] == value.tobytes(), name
    assert config_at(out)["torch_dtype"] == {None: "bfloat16", "f32": "float32", "f16": "float16"}[dtype]
