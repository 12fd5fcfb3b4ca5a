"""Meta's params.json, judged by the published config.json of the same models."""

from __future__ import annotations

import pytest

from dconv.arch.config import LLAMA
from dconv.arch.meta import hf_config_from_meta
from dconv.errors import Damaged, Refused
from tests.arch.dense_published import (
    LLAMA3_ROPE,
    LLAMA_32_1B,
    assert_same_function,
)


def meta(dim, layers, heads, groups=None, step=256, stretch=None, theta=None, vocab=-1, scaled=False):
    """params.json as Meta writes it: keys that a generation did not have are left out."""
    said = {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "norm_eps": 1e-05,
        "multiple_of": step,
        "vocab_size": vocab,
    }
    later = {
        "n_kv_heads": groups,
        "ffn_dim_multiplier": stretch,
        "rope_theta": theta,
        "use_scaled_rope": scaled or None,
    }
    return said | {key: value for key, value in later.items() if value is not None}


#: Published params.json and the feed-forward size of the same model's config.json.
META = {
    "Llama-2-7b": (meta(4096, 32, 32), 11008),
    "Llama-2-13b": (meta(5120, 40, 40), 13824),
    "Llama-2-70b": (meta(8192, 80, 64, 8, 4096, 1.3), 28672),
    "CodeLlama-34b": (meta(8192, 48, 64, 8, 256, 1.0, 1000000), 22016),
    "Llama-3-8B": (meta(4096, 32, 32, 8, 1024, 1.3, 500000.0, 128256), 14336),
    "Llama-3.2-1B": (meta(2048, 16, 32, 8, 256, 1.5, 500000.0, 128256, scaled=True), 8192),
    "Llama-3.1-405B": (meta(16384, 126, 128, 8, 4096, 1.2, 500000.0, 128256, scaled=True), 53248),
}


@pytest.mark.parametrize("name", META)
def test_meta(name):
    params, ffn = META[name]
    hf = hf_config_from_meta(params, 32000)
    assert hf["intermediate_size"] == ffn
    assert hf["vocab_size"] == (128256 if name.startswith("Llama-3") else 32000)
    assert_same_function(LLAMA, {**hf, "torch_dtype": "float32"}, LLAMA.to_hf(LLAMA.to_args(hf)))
    assert hf_config_from_meta({"model": params}, 32000) == hf


def test_meta_rope_and_length():
    said = {name: hf_config_from_meta(params, 32016) for name, (params, _) in META.items()}
    assert_same_function(LLAMA, {**said["Llama-3.2-1B"], "torch_dtype": "bfloat16"}, LLAMA_32_1B)
    assert said["Llama-3.1-405B"]["rope_scaling"] == LLAMA3_ROPE
    assert said["Llama-3.1-405B"]["tie_word_embeddings"] is False
    assert said["Llama-3-8B"]["rope_scaling"] is None
    assert [said[name]["max_position_embeddings"] for name in META] == [4096, 4096, 4096, 16384, 8192, 131072, 131072]
    assert said["Llama-2-7b"]["rope_theta"] == 10000.0
    assert said["CodeLlama-34b"]["rope_theta"] == 1e6
    assert said["CodeLlama-34b"]["vocab_size"] == 32016
    stated = {**META["Llama-3.2-1B"][0], "rope_scaling_factor": 16}
    assert hf_config_from_meta(stated, None)["rope_scaling"]["factor"] == 16.0


def test_meta_refusals():
    params = META["Llama-2-7b"][0]
    with pytest.raises(Damaged):
        hf_config_from_meta({**params, "vocab_size": -1}, None)
    with pytest.raises(Damaged):
        hf_config_from_meta({**params, "n_layers": None}, 32000)
    for foreign in ("hidden_dim", "quantization_args", "vision_chunk_size", "moe"):
        with pytest.raises(Refused) as refusal:
            hf_config_from_meta({**params, foreign: 1}, 32000)
        assert refusal.value.found == foreign
