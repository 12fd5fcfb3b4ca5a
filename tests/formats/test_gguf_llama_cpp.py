"""llama.cpp itself, as the package xllamacpp has it inside, runs what is written: with transformers' probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.rank import Settings
from tests.formats.gguf_models import MODELS, write_model
from tests.formats.gguf_tokenizers import byte_pairs
from tests.formats.test_gguf_export import llama, only

xllamacpp: Any = pytest.importorskip("xllamacpp", reason="no llama.cpp (pip install xllamacpp)")

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
#: Families that transformers has no class for.
WITHOUT_A_CLASS = {"minicpm", "minicpm3", "deepseek"}
#: What llama.cpp takes for granted, or transformers for these sizes: 27 layers (V2-Lite) where queries are not of low
#: rank, norms of keys over all heads, as many heads of keys as there are.
KEYS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_hidden_layers": 27, "num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4},
    "olmoe": {"num_key_value_heads": 4}, "glm4": {"pad_token_id": 0},
}  # fmt: skip


def of_llama_cpp(path: Path, vocabulary: int) -> NDArray[np.float64]:
    """Log-probabilities of what follows `IDS`."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    said = {"prompt": IDS, "max_tokens": 1, "temperature": 0, "logprobs": vocabulary, "ignore_eos": False}
    (choice,) = server.handle_completions(said)["choices"]
    found = np.full(vocabulary, np.nan)
    for token in choice["logprobs"]["content"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    return found


@pytest.mark.parametrize("name", ["deepseek_v2", "olmoe"])
def test_what_it_does_not_load_is_said(tmp_path: Path, name: str) -> None:
    for keys, loads in (({}, False), (KEYS[name], True)):
        before = byte_pairs(write_model(tmp_path / str(loads), name, **keys), small=True)
        job = prepare(Request(before, "gguf", tmp_path / f"{loads}-out", quant="f32"))
        assert any("does not load" in note for note in job.notes) is not loads
        run(job, Settings())
        if not loads:
            with pytest.raises(RuntimeError):
                of_llama_cpp(only(tmp_path / f"{loads}-out"), 61)


def of_transformers(folder: Path) -> NDArray[np.float64]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([IDS])).logits[0, -1].double(), -1).numpy()


@pytest.mark.parametrize("name", sorted(MODELS.keys() - WITHOUT_A_CLASS))
def test_families(tmp_path: Path, name: str) -> None:
    before = byte_pairs(write_model(tmp_path / "before", name, **KEYS.get(name, {})), small=True)
    said = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(
        json.dumps({key: value for key, value in said.items() if key != "head_dim" or value})
    )
    convert(Request(before, "gguf", tmp_path / "out", quant="f32"))
    found = of_llama_cpp(only(tmp_path / "out"), 61)
    # llama.cpp's GELU is a table in fp16; 27 layers add up
    np.testing.assert_allclose(
        found,
        of_transformers(before),
        rtol=0,
        atol={"gemma2": 1e-3, "gemma3_text": 1e-3, "deepseek_v2": 3e-4}.get(name, 1e-4),
    )


@pytest.mark.parametrize(
    "quant", ["bf16", "q8_0", "q4_0", "q5_1", "mxfp4", "tq2_0", "q2_k", "q4_k_m", "q6_k", "iq4_xs"]
)
def test_types(tmp_path: Path, quant: str) -> None:
    """It computes with the values that dconv decodes; where those are in blocks, it rounds what they meet to 8 bits."""
    before = llama(tmp_path / "before", intermediate_size=512, num_hidden_layers=2)
    held = load_file(before / "model.safetensors")
    draw = np.random.default_rng(3)
    for name, value in held.items():
        new = 1.0 + 0 * draw.random(value.shape) if value.ndim == 1 else draw.normal(0, 0.06, value.shape)
        held[name] = new.astype(ml_dtypes.bfloat16)
    save_file(held, before / "model.safetensors")
    convert(Request(before, "gguf", tmp_path / "out", quant=quant))
    convert(Request(only(tmp_path / "out"), "hf", tmp_path / "back", dtype="f32"))
    found, expected = of_llama_cpp(only(tmp_path / "out"), 61), of_transformers(tmp_path / "back")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 if quant == "bf16" else 0.1)
    assert np.abs(expected - expected.mean()).max() > 1
