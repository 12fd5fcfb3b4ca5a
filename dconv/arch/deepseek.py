"""DeepSeek-MoE, V2, V3 and Moonlight: dense first layers, shared experts, latent attention, token predictors."""

from __future__ import annotations

from dataclasses import replace

from dconv.arch import moe_configs as configs
from dconv.arch.family import Row, Twin
from dconv.arch.layouts import columns, copied, rows, rows_or_copied
from dconv.arch.llama import LLAMA
from dconv.arch.moe import DENSE, DENSE_NAMES, ROUTED, shared

_HF, _MEGATRON = "model.layers.*.self_attn", "decoder.layers.*.self_attention"

# fmt: off
LATENT = (
    Row("decoder.layers.*.input_layernorm.weight",              "model.layers.*.input_layernorm.weight",  copied("hidden")),
    Row(f"{_MEGATRON}.linear_q_proj.weight",                    f"{_HF}.q_proj.weight",                   rows("q_rows", "hidden"),            when="q_is_full"),
    Row(f"{_MEGATRON}.linear_q_down_proj.weight",               f"{_HF}.q_a_proj.weight",                 rows_or_copied("q_lora", "hidden"),  when="q_is_low_rank"),
    Row(f"{_MEGATRON}.linear_q_up_proj.layer_norm_weight",      f"{_HF}.q_a_layernorm.weight",            copied("q_lora"),                    when="q_is_low_rank"),
    Row(f"{_MEGATRON}.linear_q_up_proj.weight",                 f"{_HF}.q_b_proj.weight",                 rows("q_rows", "q_lora"),            when="q_is_low_rank"),
    Row(f"{_MEGATRON}.linear_kv_down_proj.weight",              f"{_HF}.kv_a_proj_with_mqa.weight",       rows_or_copied("kv_a_rows", "hidden")),
    Row(f"{_MEGATRON}.linear_kv_up_proj.layer_norm_weight",     f"{_HF}.kv_a_layernorm.weight",           copied("kv_lora")),
    Row(f"{_MEGATRON}.linear_kv_up_proj.weight",                f"{_HF}.kv_b_proj.weight",                rows("kv_b_rows", "kv_lora")),
    Row(f"{_MEGATRON}.linear_proj.weight",                      f"{_HF}.o_proj.weight",                   columns("hidden", "o_columns")),
)
_EXPERTS = DENSE + ROUTED + shared("shared_experts")
ATTENTION_NAMES = tuple(row.megatron for row in LLAMA.rows if ".self_attention." in row.megatron)
EXPERT_BIAS = Row("decoder.layers.*.mlp.router.expert_bias", "model.layers.*.mlp.gate.e_score_correction_bias", copied("experts"), when="expert_bias", keeps=True)


def predictors(inner: tuple[Row, ...]) -> tuple[Row, ...]:
    """Layers after the last that predict tokens further on, each a decoder layer with a way in and out around it."""
    there, here = "mtp.layers.*", "model.layers.*"
    around = (
        Row(f"{there}.enorm.weight",           f"{here}.enorm.weight",             copied("hidden")),
        Row(f"{there}.hnorm.weight",           f"{here}.hnorm.weight",             copied("hidden")),
        Row(f"{there}.eh_proj.weight",         f"{here}.eh_proj.weight",           rows("hidden", "2 hidden")),
        Row(f"{there}.final_layernorm.weight", f"{here}.shared_head.norm.weight",  copied("hidden")),
    )
    layer = tuple(replace(row, megatron=row.megatron.replace("decoder.layers.*", f"{there}.transformer_layer"), when=_when(row)) for row in inner)
    return tuple(replace(row, stack="mtp", after="layers", stage="last") for row in around + layer if row.when != "dense")


def _when(row: Row) -> str:
    """A predictor's layer is as the last of the model: one with experts."""
    return "" if row.when in ("moe", "shared", "expert_bias") else row.when


#: What a predictor has once more in HuggingFace's files.
TWINS = (
    Twin("model.layers.*.embed_tokens.weight",      of="model.embed_tokens.weight", stack="mtp", after="layers"),
    Twin("model.layers.*.shared_head.head.weight",  of="lm_head.weight",            stack="mtp", after="layers"),
)
DEEPSEEK = LLAMA.derive("deepseek", configs.DEEPSEEK, drop=DENSE_NAMES, add=_EXPERTS)
DEEPSEEK_V2 = DEEPSEEK.derive("deepseek_v2", configs.DEEPSEEK_V2, drop=ATTENTION_NAMES, add=LATENT)
DEEPSEEK_V3 = DEEPSEEK_V2.derive("deepseek_v3", configs.DEEPSEEK_V3, add=(EXPERT_BIAS, *predictors((*_EXPERTS, *LATENT, EXPERT_BIAS))), twins=TWINS)
# fmt: on
FAMILIES = (DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3)
