"""LLaVA: config.json and Megatron's args say the same model, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from dconv.arch.layouts import check_heads
from dconv.arch.llava import LLAVA
from dconv.arch.registry import detect
from dconv.errors import Damaged, Refused

#: llava-hf/llava-1.5-7b-hf, with what concerns the function.
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000, "model_type": "llava",
    "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip


def test_args_alone_give_the_config_again() -> None:
    args = LLAVA.config.to_args(PUBLISHED)
    assert detect(None, args) is LLAVA
    assert {key: args[key] for key in ("num_layers", "vision_num_layers", "img_h", "patch_dim", "fp16")} == {
        "num_layers": 32, "vision_num_layers": 23, "img_h": 336, "patch_dim": 14, "fp16": True,
    }  # fmt: skip
    back = LLAVA.config.to_hf(args)
    assert LLAVA.config.facts(back) == LLAVA.config.facts(PUBLISHED)
    assert LLAVA.config.to_args(back) == args
    assert LLAVA.config.check_pair(PUBLISHED, args) == []
    assert LLAVA.config.check_pair(PUBLISHED, {**args, "vision_hidden_size": 768}) != []


def changed(part: str, **keys: Any) -> dict[str, Any]:
    return {**PUBLISHED, part: {**PUBLISHED[part], **keys}}


@pytest.mark.parametrize(
    ("hf", "word"),
    [
        (changed("vision_config", model_type="siglip_vision_model"), "siglip_vision_model"),
        (changed("vision_config", hidden_act="gelu"), "hidden_act"),
        (changed("text_config", model_type="mamba2"), "mamba2"),
        (changed("text_config", model_type=["llama"]), "text_config.model_type"),
        (changed("text_config", attention_bias=True), "bias"),
        ({**PUBLISHED, "projector_hidden_act": "silu"}, "projector_hidden_act"),
        ({**PUBLISHED, "vision_feature_select_strategy": "pooled"}, "vision_feature_select_strategy"),
        ({**PUBLISHED, "tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_what_megatron_does_not_compute_is_refused(hf: dict[str, Any], word: str) -> None:
    with pytest.raises(Refused) as caught:
        LLAVA.config.to_args(hf)
    assert word in str(caught.value)


@pytest.mark.parametrize("layer", [[-2, -5], 0, 25, -25, None])
def test_features_of_no_single_layer_are_damaged(layer: object) -> None:
    with pytest.raises(Damaged, match="vision_feature_layer"):
        LLAVA.config.facts({**PUBLISHED, "vision_feature_layer": layer})


def test_heads_of_the_tower_must_divide() -> None:
    facts = LLAVA.config.facts(changed("vision_config", num_attention_heads=4))
    check_heads(facts, 4)
    with pytest.raises(Refused, match="heads do not divide") as caught:
        check_heads(facts, 8)
    assert "of the vision tower" in str(caught.value)
