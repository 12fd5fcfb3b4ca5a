"""Mamba-2, and Nemotron-H: stacks whose layers are one module each, a mixer, attention, a feed-forward or experts."""

from __future__ import annotations

from typing import Final

from dconv.arch.activation import Activation
from dconv.arch.attention import Biases, Grouped
from dconv.arch.decoder import SIZES, DecoderConfig
from dconv.arch.experts import Experts
from dconv.arch.family import Family, Row
from dconv.arch.hybrid import Mixer, Stack, Unplaced, layers_of
from dconv.arch.layouts import columns, copied, parts_in_one, query_groups, rows, vocab_rows
from dconv.arch.routing import Router

_SCALARS: Final = {"initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False}

_MAMBA2 = DecoderConfig(
    "mamba2", "Mamba2ForCausalLM",
    {
        **_SCALARS, "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64,
        "n_groups": 8, "state_size": 128, "conv_kernel": 4, "expand": 2, "use_conv_bias": True,
        "residual_in_fp32": True, "initializer_range": 0.1,
    },
    attention=Mixer("num_heads", "head_dim", "state_size", "hidden_act", expand="expand", alone=True),
    rope=Unplaced(),
    activation=Stack(),
    norm_eps="layer_norm_epsilon",
    sizes={key: arg for key, arg in SIZES.items() if key in ("num_hidden_layers", "hidden_size")},
)  # fmt: skip
_NEMOTRON_H = DecoderConfig(
    "nemotron_h", "NemotronHForCausalLM",
    {
        **_SCALARS, "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096, "ssm_state_size": 128,
        "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "conv_kernel": 4, "use_conv_bias": True,
        "n_routed_experts": 8, "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688,
        "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "attention_dropout": 0.0, "time_step_min": 0.001,
    },
    Grouped(),
    Biases(mlp="mlp_bias"),
    rope=Unplaced(),
    activation=Activation(("relu2",), {"squared_relu": True}, key="mlp_hidden_act"),
    more=(
        Mixer("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "mamba_hidden_act", least="time_step_min"),
        Stack("M*-E", Experts(
            Router(
                "sigmoid", "norm_topk_prob", "routed_scaling_factor", expert_bias=True, groups_judged_by=2, dtype="fp32"
            ),
            ("n_routed_experts",), shared="moe_shared_expert_intermediate_size",
        )),
    ),
    only={"attention_bias": False, "num_nextn_predict_layers": 0, "mamba_proj_bias": False},
    norm_eps="layer_norm_epsilon",
    filling=lambda said: {"num_hidden_layers": len(layers_of(said))},
)  # fmt: skip

_MIXER, _MLP, _ATTENTION = "decoder.layers.*.mixer", "decoder.layers.*.mlp", "decoder.layers.*.self_attention"
_HF, _NORM = "backbone.layers.*.mixer", "backbone.layers.*.norm.weight"
_SCAN = ("mamba_inner", "mamba_bc", "mamba_bc")

# fmt: off
MAMBA2 = Family("mamba2", _MAMBA2, (
    Row("embedding.word_embeddings.weight",         "backbone.embeddings.weight",       vocab_rows("vocab", "hidden")),
    Row(f"{_MIXER}.in_proj.layer_norm_weight",      _NORM,                              copied("hidden"),                   when="mamba"),
    Row(f"{_MIXER}.in_proj.weight",                 f"{_HF}.in_proj.weight",            parts_in_one(("mamba_inner", *_SCAN, "mamba_heads"), "hidden"), when="mamba", apart=("z", "x", "B", "C", "dt")),
    Row(f"{_MIXER}.conv1d.weight",                  f"{_HF}.conv1d.weight",             parts_in_one(_SCAN, "1", "mamba_conv"), when="mamba", apart=("x", "B", "C")),
    Row(f"{_MIXER}.conv1d.bias",                    f"{_HF}.conv1d.bias",               parts_in_one(_SCAN),                when="conv_bias", apart=("x", "B", "C")),
    Row(f"{_MIXER}.A_log",                          f"{_HF}.A_log",                     rows("mamba_heads"),                when="mamba"),
    Row(f"{_MIXER}.D",                              f"{_HF}.D",                         rows("mamba_heads"),                when="mamba"),
    Row(f"{_MIXER}.dt_bias",                        f"{_HF}.dt_bias",                   rows("mamba_heads"),                when="mamba"),
    Row(f"{_MIXER}.norm.weight",                    f"{_HF}.norm.weight",               rows("mamba_inner"),                when="mamba"),
    Row(f"{_MIXER}.out_proj.weight",                f"{_HF}.out_proj.weight",           columns("hidden", "mamba_inner"),   when="mamba"),
    Row("decoder.final_norm.weight",                "backbone.norm_f.weight",           copied("hidden")),
    Row("output_layer.weight",                      "lm_head.weight",                   vocab_rows("vocab", "hidden"),      when="untied"),
))

NEMOTRON_H = MAMBA2.derive("nemotron_h", _NEMOTRON_H, add=(
    Row(f"{_ATTENTION}.linear_qkv.layer_norm_weight",  _NORM,                           copied("hidden"),                   when="attention"),
    Row(f"{_ATTENTION}.linear_qkv.weight",          f"{_HF}.{{q,k,v}}_proj.weight",     query_groups("hidden"),             when="attention"),
    Row(f"{_ATTENTION}.linear_proj.weight",         f"{_HF}.o_proj.weight",             columns("hidden", "q"),             when="attention"),
    Row(f"{_MLP}.linear_fc1.layer_norm_weight",     _NORM,                              copied("hidden"),                   when="mlp"),
    Row(f"{_MLP}.linear_fc1.weight",                f"{_HF}.up_proj.weight",            rows("ffn", "hidden"),              when="mlp"),
    Row(f"{_MLP}.linear_fc1.bias",                  f"{_HF}.up_proj.bias",              rows("ffn"),                        when="fc_bias"),
    Row(f"{_MLP}.linear_fc2.weight",                f"{_HF}.down_proj.weight",          columns("hidden", "ffn"),           when="mlp"),
    Row(f"{_MLP}.linear_fc2.bias",                  f"{_HF}.down_proj.bias",            copied("hidden"),                   when="fc_bias"),
    Row("decoder.layers.*.pre_mlp_layernorm.weight", _NORM,                             copied("hidden"),                   when="moe"),
    Row(f"{_MLP}.router.weight",                    f"{_HF}.gate.weight",               copied("experts", "hidden"),        when="moe"),
    Row(f"{_MLP}.router.expert_bias",               f"{_HF}.gate.e_score_correction_bias", copied("experts"),               when="moe", keeps=True),
    Row(f"{_MLP}.experts.#.linear_fc1.weight",      f"{_HF}.experts.#.up_proj.weight",  rows("moe_ffn", "moe_in"),          when="moe"),
    Row(f"{_MLP}.experts.#.linear_fc2.weight",      f"{_HF}.experts.#.down_proj.weight", columns("moe_in", "moe_ffn"),      when="moe"),
    Row(f"{_MLP}.shared_experts.linear_fc1.weight", f"{_HF}.shared_experts.up_proj.weight", rows("shared_ffn", "hidden"),   when="moe"),
    Row(f"{_MLP}.shared_experts.linear_fc2.weight", f"{_HF}.shared_experts.down_proj.weight", columns("hidden", "shared_ffn"), when="moe"),
    Row(f"{_MLP}.fc1_latent_proj.weight",           f"{_HF}.fc1_latent_proj.weight",    copied("moe_in", "hidden"),         when="latent"),
    Row(f"{_MLP}.fc2_latent_proj.weight",           f"{_HF}.fc2_latent_proj.weight",    copied("hidden", "moe_in"),         when="latent"),
))
# fmt: on
FAMILIES = (MAMBA2, NEMOTRON_H)
