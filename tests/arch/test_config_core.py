"""The args of dense families, judged by megatron-core: rotary angles, windows, its own config class."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.masking_utils import sliding_window_causal_mask_function

from dconv.arch.config import MISTRAL, QWEN3
from tests.arch.dense_published import (
    LLAMA3_ROPE,
    MISTRAL_V01,
    PUBLISHED,
    QWEN3_06B,
    YARN_ROPE,
    loaded,
    rotary,
)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3_ROPE,
        {**LLAMA3_ROPE, "factor": 32.0},
        YARN_ROPE,
        {**YARN_ROPE, "truncate": False, "beta_fast": 24.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1},
        {**YARN_ROPE, "mscale": 0.7},  # without its partner it counts for nothing
        {**YARN_ROPE, "mscale_all_dim": 0.7},
    ],
    ids=str,
)
def test_megatron_core_rotates_the_same(core, rope):
    """The args, given to megatron-core's rotary classes as gpt_builders.py and argument_utils.py give them."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    hf = {**QWEN3_06B, "max_position_embeddings": 131072, "rope_scaling": rope}
    args, positions = QWEN3.to_args(hf), 50
    inv_freq, factor = rotary(loaded(QWEN3, hf), QWEN3)
    common = {
        "kv_channels": args["kv_channels"],
        "rotary_percent": args["rotary_percent"],
        "rotary_interleaved": args["rotary_interleaved"],
        "seq_len_interpolation_factor": args["rotary_seq_len_interpolation_factor"],
        "rotary_base": args["rotary_base"],
        "use_cpu_initialization": True,
    }
    if args["position_embedding_type"] == "yarn":
        module = YarnRotaryEmbedding(
            **common,
            scaling_factor=args["rotary_scaling_factor"],
            original_max_position_embeddings=args["yarn_original_max_position_embeddings"],
            beta_fast=args["yarn_beta_fast"],
            beta_slow=args["yarn_beta_slow"],
            mscale=args["mscale"],
            mscale_all_dim=args["mscale_all_dim"],
            correction_range_round_to_int=args["yarn_correction_range_round_to_int"],
        )
        angles, concentration = module.get_emb(positions)
        assert concentration == pytest.approx(factor, rel=1e-12)
        angles = angles[:, 0, 0, : inv_freq.numel()]
    else:
        module = RotaryEmbedding(
            **common, rope_scaling=args["use_rope_scaling"], rope_scaling_factor=args["rope_scaling_factor"]
        )
        angles = module.get_freqs_non_repeated(positions)
        assert factor == 1.0
    torch.testing.assert_close(angles, torch.outer(torch.arange(positions).float(), inv_freq), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_megatron_core_masks_the_same_window(core, width):
    from megatron.core.fusions import fused_softmax

    args = MISTRAL.to_args({**MISTRAL_V01, "sliding_window": width})
    blocked = fused_softmax.get_sliding_window_causal_mask(7, 7, args["window_size"])
    sees = sliding_window_causal_mask_function(width)
    for q in range(7):
        for k in range(7):
            assert bool(sees(0, 0, torch.tensor(q), torch.tensor(k))) is not bool(blocked[q, k])


def test_megatron_core_slides_in_the_same_layers(core):
    from megatron.core.transformer.utils import is_layer_window_attention

    hf = {**QWEN3_06B, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20}
    args, kinds = QWEN3.to_args(hf), loaded(QWEN3, hf).layer_types
    found = [
        is_layer_window_attention(tuple(args["window_size"]), args["window_attn_skip_freq"], layer + 1)
        for layer in range(28)
    ]
    assert found == [kind == "sliding_attention" for kind in kinds]
    assert set(found) == {False, True}
    assert QWEN3.to_hf(args)["max_window_layers"] == 20  # transformers before layer_types reads only this
    every_third_full = [is_layer_window_attention((63, 0), 3, layer + 1) for layer in range(28)]
    back = QWEN3.to_hf({**args, "window_attn_skip_freq": 3})["layer_types"]
    assert [kind == "sliding_attention" for kind in back] == every_third_full


@pytest.mark.parametrize("name", PUBLISHED)
def test_megatron_core_takes_the_args(core, name):
    """core_transformer_config_from_args copies the args that TransformerConfig has a field for."""
    from megatron.core.transformer import TransformerConfig

    family, hf = PUBLISHED[name]
    args, facts = family.to_args(hf), family.facts(hf)
    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    config = TransformerConfig(**{k: v for k, v in args.items() if k in fields}, gated_linear_unit=args["swiglu"])
    assert config.num_query_groups == facts["groups"]
    assert config.kv_channels == facts["head_dim"]
    assert config.layernorm_epsilon == hf["rms_norm_eps"]
    assert (config.add_bias_linear or config.add_qkv_bias) is facts["qkv_bias"]
    assert config.qk_layernorm is facts["qk_norm"]
    assert config.ffn_hidden_size == facts["ffn"]
