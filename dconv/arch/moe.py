"""Families with experts: Mixtral, Qwen-MoE, OLMoE, MiniMax-M2, gpt-oss. A layer is dense, or has a router and experts."""

from __future__ import annotations

from dataclasses import replace

from dconv.arch import moe_configs as configs
from dconv.arch.family import Row
from dconv.arch.layouts import columns, copied, expert_of, gate_up, gate_up_pairs, rows
from dconv.arch.llama import LLAMA

_MLP, _HF = "decoder.layers.*.mlp", "model.layers.*.mlp"
_NORM = "post_attention_layernorm.weight"

# fmt: off
#: What a dense layer among others has, and the norm before experts, which is no linear layer's.
DENSE = tuple(replace(row, when="dense") for row in LLAMA.rows if row.megatron.startswith(_MLP) and not row.when)
ROUTED = (
    Row("decoder.layers.*.pre_mlp_layernorm.weight",  f"model.layers.*.{_NORM}",                  copied("hidden"),               when="moe"),
    Row(f"{_MLP}.router.weight",                      f"{_HF}.gate.weight",                       copied("experts", "hidden"),    when="moe"),
    Row(f"{_MLP}.experts.#.linear_fc1.weight",        f"{_HF}.experts.#.{{gate,up}}_proj.weight", gate_up("moe_ffn", "hidden"),   when="moe"),
    Row(f"{_MLP}.experts.#.linear_fc2.weight",        f"{_HF}.experts.#.down_proj.weight",        columns("hidden", "moe_ffn"),   when="moe"),
)
#: What a family without dense layers drops of Llama's.
DENSE_NAMES = tuple(row.megatron for row in LLAMA.rows if row.megatron.startswith(_MLP))


def shared(name: str) -> tuple[Row, ...]:
    """The expert that every token passes, called ``name`` by HuggingFace. Cut by tensor parallelism as a dense layer is."""
    return (
        Row(f"{_MLP}.shared_experts.linear_fc1.weight", f"{_HF}.{name}.{{gate,up}}_proj.weight",  gate_up("shared_ffn", "hidden"), when="shared"),
        Row(f"{_MLP}.shared_experts.linear_fc2.weight", f"{_HF}.{name}.down_proj.weight",         columns("hidden", "shared_ffn"), when="shared"),
    )


def _block_sparse(bias: bool) -> tuple[Row, ...]:
    """Mixtral's names of the same."""
    here = "model.layers.*.block_sparse_moe"
    return (
        ROUTED[0],
        replace(ROUTED[1], hf=f"{here}.gate.weight"),
        replace(ROUTED[2], hf=f"{here}.experts.#.w{{1,3}}.weight"),
        replace(ROUTED[3], hf=f"{here}.experts.#.w2.weight"),
        *((Row(f"{_MLP}.router.expert_bias", f"{here}.e_score_correction_bias", copied("experts"), keeps=True),) if bias else ()),
    )


def head_norms(width_q: str, width_k: str) -> tuple[Row, ...]:
    """Norms of queries and keys: over each head, or over all heads together, which tensor parallelism cuts."""
    cut = copied if width_q == width_k else rows
    return (
        Row("decoder.layers.*.self_attention.q_layernorm.weight", "model.layers.*.self_attn.q_norm.weight", cut(width_q)),
        Row("decoder.layers.*.self_attention.k_layernorm.weight", "model.layers.*.self_attn.k_norm.weight", cut(width_k)),
    )


MIXTRAL = LLAMA.derive("mixtral", configs.MIXTRAL, drop=DENSE_NAMES, add=_block_sparse(False))
QWEN2_MOE = LLAMA.derive("qwen2_moe", configs.QWEN2_MOE, drop=DENSE_NAMES, add=DENSE + ROUTED + shared("shared_expert") + (
    Row(f"{_MLP}.shared_experts.gate_weight",         f"{_HF}.shared_expert_gate.weight",         copied("1", "hidden"),          when="shared_gate"),
))
QWEN3_MOE = LLAMA.derive("qwen3_moe", configs.QWEN3_MOE, drop=DENSE_NAMES, add=DENSE + ROUTED + head_norms("head_dim", "head_dim"))
OLMOE = LLAMA.derive("olmoe", configs.OLMOE, drop=DENSE_NAMES, add=ROUTED + head_norms("q", "kv"))
MINIMAX_M2 = LLAMA.derive("minimax_m2", configs.MINIMAX_M2, drop=DENSE_NAMES, add=_block_sparse(True) + head_norms("q", "kv"))
GPT_OSS = LLAMA.derive("gpt_oss", configs.GPT_OSS, drop=DENSE_NAMES, add=(
    Row("decoder.layers.*.self_attention.core_attention.softmax_offset", "model.layers.*.self_attn.sinks", rows("heads")),
    ROUTED[0],
    Row(f"{_MLP}.router.weight",                      f"{_HF}.router.weight",                     copied("experts", "hidden")),
    Row(f"{_MLP}.router.bias",                        f"{_HF}.router.bias",                       copied("experts")),
    Row(f"{_MLP}.experts.#.linear_fc1.weight",        f"{_HF}.experts.gate_up_proj",              gate_up_pairs("moe_ffn", "hidden")),
    Row(f"{_MLP}.experts.#.linear_fc1.bias",          f"{_HF}.experts.gate_up_proj_bias",         gate_up_pairs("moe_ffn")),
    Row(f"{_MLP}.experts.#.linear_fc2.weight",        f"{_HF}.experts.down_proj",                 expert_of("hidden", "moe_ffn", axis=1)),
    Row(f"{_MLP}.experts.#.linear_fc2.bias",          f"{_HF}.experts.down_proj_bias",            expert_of("hidden", axis=0, parallel=False)),
))
# fmt: on
FAMILIES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, MINIMAX_M2, GPT_OSS)
