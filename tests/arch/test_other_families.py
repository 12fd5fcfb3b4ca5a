"""A config that is read as a family it is not (``--model-type``): what would compute another function is named."""

from __future__ import annotations

import pytest

from dconv.arch.config import LLAMA, MISTRAL, QWEN2
from dconv.arch.decoder import DecoderConfig
from dconv.arch.llama import LLAMA as LLAMA_FAMILY
from dconv.errors import Damaged, Refused
from tests.models import config_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def config(**keys: object) -> dict[str, object]:
    return {**config_of(LLAMA_FAMILY), "architectures": ["OtherForCausalLM"], "model_type": "other", **keys}


@pytest.mark.parametrize(
    "keys",
    [
        {"scale_emb": 12},
        {"scale_depth": 1.4},
        {"dim_model_base": 256},
        {"embedding_multiplier": 12.0},
        {"residual_multiplier": 0.22},
        {"ssm_multipliers": [0.5, 1.0]},
        {"logits_scaling": 8.0},
        {"logit_scale": 0.0625},
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"query_pre_attn_scalar": 224},
        {"clip_qkv": 8.0},
        {"sliding_window": 4096},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_keys_of_another_function_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(Refused) as caught:
        LLAMA.to_args(config(**keys))
    assert next(iter(keys)) in caught.value.found


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        (LLAMA, {"scale_emb": None, "embedding_multiplier": 1.0, "logits_scaling": 1, "final_logit_softcapping": None}),
        (LLAMA, {"sliding_window": 4096, "use_sliding_window": False}),
        (LLAMA, {"sliding_window": None}),
        (LLAMA, {"sliding_window": 4096, "architectures": ["LlamaForCausalLM"]}),
        (LLAMA, {"sliding_window": 4096, "architectures": None, "model_type": "llama"}),
        (MISTRAL, {"sliding_window": 4096}),
        (QWEN2, {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}),
    ],
)
def test_keys_without_effect_are_taken(family: DecoderConfig, keys: dict[str, object]) -> None:
    assert family.unsayable(config(**keys)) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 10**400},
        {"rms_norm_eps": -(10**400)},
        {"hidden_size": 10**5000},  # Python refuses to print it
        {"num_attention_heads": 2**28, "num_key_value_heads": 2**28},
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": -10.0, "factor": 2.718281828459045}},
        {"rope_scaling": {**YARN, "mscale": -1.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN, "truncate": 0}},
        {"rope_scaling": {**YARN, "truncate": "no"}},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_numbers_that_break_arithmetic_are_damage(keys: dict[str, object]) -> None:
    with pytest.raises(Damaged):
        LLAMA.to_args(config(**keys))


def test_heads_are_bounded_where_shapes_begin() -> None:
    with pytest.raises(Damaged, match="heads"):
        LLAMA.facts(config(num_attention_heads=2**28, num_key_value_heads=2**28, head_dim=2))
