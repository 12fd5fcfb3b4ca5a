"""Calibrated outputs and their configs in transformers itself; other programs are ``scripts/gptq_oracles.py``'s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="calibration computes with torch")
transformers = pytest.importorskip("transformers", reason="calibration runs transformers' layers")

from dconv.arch.rope import for_older_loaders  # noqa: E402
from dconv.pipeline import Request, convert  # noqa: E402

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "rope_parameters": _LLAMA3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE))
    for value in net.parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.3)
    net.half().save_pretrained(folder / "llama")  # compressed-tensors decodes in the dtype of scales, which is fp16
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 61, (8, 64)))
    return folder / "llama"


def logits(folder: Path, **more: Any) -> Any:
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    with torch.no_grad():
        return net(torch.arange(1, 33)[None], use_cache=False).logits


@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_decodes_what_was_calibrated_as_we_do(model: Path, tmp_path: Path, symmetric: bool) -> None:
    settings = {"bits": 4, "group_size": 32, "sym": symmetric, "nsamples": 8, "seqlen": 64}
    told: dict[str, Any] = {"quantization_config": json.dumps(settings), "calibration": str(model.parent / "ids.npy")}
    convert(Request(model, "gptq", tmp_path / "coded", quant="pack-quantized", **told))
    convert(Request(tmp_path / "coded", "hf", tmp_path / "dense", dtype="f16"))
    ours = logits(tmp_path / "dense")
    decoding = transformers.CompressedTensorsConfig(dequantize=True)
    assert torch.equal(logits(tmp_path / "coded", quantization_config=decoding), ours)
    assert not torch.equal(logits(model), ours)


def test_an_output_says_its_rotary_base_to_older_loaders(model: Path, tmp_path: Path) -> None:
    before = json.loads((model / "config.json").read_text())
    assert "rope_theta" not in before and "rope_scaling" not in before
    convert(Request(model, "hf", tmp_path / "out", dtype="f32"))
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {key: value for key, value in _LLAMA3.items() if key != "rope_theta"}
    assert said == {**before, "dtype": "float32", "rope_theta": 500.0, "rope_scaling": scaling}
    assert torch.equal(logits(tmp_path / "out"), logits(model))
    convert(Request(model, "hf", tmp_path / "same"))  # where nothing of it changes, it is the source's own file
    assert (tmp_path / "same" / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500.0}, _LLAMA3], ids=["default", "llama3"])
def test_transformers_makes_one_config_of_both_spellings(kind: str, rope: dict[str, Any]) -> None:
    said = transformers.AutoConfig.for_model(kind, rope_parameters=dict(rope)).to_dict()
    both = for_older_loaders(said)
    assert both["rope_theta"] == 500.0 and "rope_theta" not in said
    assert type(transformers.AutoConfig.for_model(kind)).from_dict(both).to_dict() == said


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}},
        {"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=["none", "older", "by layer", "the older one wins"],
)
def test_other_configs_stay(said: dict[str, Any]) -> None:
    assert for_older_loaders(said) == said


def test_a_config_inside_is_spelt_out_too() -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    inner = {"rope_parameters": rope}
    wanted = {**inner, "rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": None}
    assert for_older_loaders({"text_config": inner}) == {"text_config": wanted}
