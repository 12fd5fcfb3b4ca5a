"""What ``dconv archs`` and the README say of each family, and how far its function was shown equal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from dconv.arch.family import Family

#: How a family's conversion was judged, the strongest first; tests/arch has a test behind each.
LOGITS: Final = "logits: megatron-core 0.16.1 = transformers"
REFERENCE: Final = "logits of a reference model"
TENSORS: Final = "tensors that transformers saves"
LAWS: Final = "round trips"


@dataclass(frozen=True, slots=True)
class About:
    """One line of the table: the models, a remark, and the strongest of the proofs above."""

    models: str
    note: str = ""
    shown: str = TENSORS


_LACKS: Final = "Megatron-LM lacks parts of the function; they travel in the args"
ABOUT: Final[dict[str, About]] = {
    "llama": About("Llama 1, 2, 3, 3.x, Code Llama, MiniCPM5", "RoPE scaling, own head size, biases", LOGITS),
    "mistral": About("Mistral", "sliding window", LOGITS),
    "qwen2": About("Qwen2, Qwen2.5", "QKV bias", LOGITS),
    "qwen3": About("Qwen3", "query and key norms", LOGITS),
    "phi3": About("Phi-3, Phi-4", "fused projections; not with longrope, which Megatron lacks", LOGITS),
    "gemma": About("Gemma 1", _LACKS),
    "gemma2": About("Gemma 2", _LACKS),
    "gemma3_text": About("Gemma 3 (text)", _LACKS),
    "glm": About("GLM-4", "half of each head rotated, fused gate and up", LOGITS),
    "glm4": About("GLM-4 0414", _LACKS),
    "glm4_moe": About("GLM-4.5, 4.6", "experts and token predictor as in DeepSeek-V3", LOGITS),
    "olmo2": About("OLMo 2", _LACKS),
    "granite": About("Granite 3", "its multipliers travel in the args; Megatron-LM lacks them", LOGITS),
    "mixtral": About("Mixtral", "", LOGITS),
    "qwen2_moe": About("Qwen1.5-MoE, Qwen2-MoE", "shared expert and its gate", LOGITS),
    "qwen3_moe": About("Qwen3-MoE", "query and key norms", LOGITS),
    "olmoe": About("OLMoE", "full-width query and key norms, which Megatron-LM lacks"),
    "minimax_m2": About("MiniMax-M2", "full-width query and key norms; block FP8 as released"),
    "gpt_oss": About("gpt-oss", "sinks, biases, alternating gate and up; MXFP4 as released", LOGITS),
    "deepseek": About("DeepSeek-MoE 16B", "dense first layers, shared experts", REFERENCE),
    "deepseek_v2": About("DeepSeek-V2, V2-Lite", "latent attention", LOGITS),
    "deepseek_v3": About("DeepSeek-V3, R1, Moonlight", "token predictor; block FP8 as released", LOGITS),
    "mamba2": About("Mamba-2", "", LOGITS),
    "nemotron_h": About("Nemotron-H", "mixers, attention, feed-forward layers and experts in any pattern", LOGITS),
    "bamba": About("Bamba", "a layer is two of Megatron's: mixer or attention, feed-forward", LOGITS),
    "llava": About("LLaVA", "CLIP tower, projector, a Llama, Mistral or Qwen2 language model", LOGITS),
    "minicpmv": About("MiniCPM-V 2.6", "SigLIP tower and resampler travel beside its Qwen2", REFERENCE),
    "minicpm": About("MiniCPM 1B, 2B, 4, 4.1", "muP scalars, longrope and sparse_config travel in the args", REFERENCE),
    "minicpm_moe": About("MiniCPM-MoE", "muP scalars travel in the args", REFERENCE),
    "minicpm_blockffn": About("MiniCPM with BlockFFN", "block-sparse layers are those that have the tensors", LAWS),
    "blockffn": About("BlockFFN as published", "the same under its own names", LAWS),
    "blockffn_mla": About("BlockFFN as published, with latent attention", "the same", LAWS),
    "minicpm3": About("MiniCPM3", "latent attention; muP scalars travel in the args"),
    "gpt2": About("GPT-2, GPT", "transposed matrices, learned positions; classic checkpoints, too", LOGITS),
    "megatron-bert": About("BERT as Megatron has it", "both heads; classic checkpoints, too", LOGITS),
    "bert": About("BERT as Google has it", "for apply_residual_connection_post_layernorm", REFERENCE),
    "t5": About("T5, T5 1.1, Flan-T5", "one pipeline stage; T5's scaled logits travel in the args", LOGITS),
}  # fmt: skip


def lines(families: Iterable[Family]) -> list[tuple[str, str, str, str, str]]:
    """(family, models, layouts, note, how it was shown) of each, in the order given. All go both ways."""
    return [
        (family.name, about.models, _layouts(family), about.note, about.shown)
        for family in families
        for about in (ABOUT.get(family.name, About(family.config.architecture, "from another package", "")),)
    ]


def _layouts(family: Family) -> str:
    blocks = {row.megatron.split(".layers.")[0] for row in family.rows}
    sizes = "TP" if {"encoder", "decoder"} <= blocks else "TP PP VPP"  # both stacks are in one pipeline stage
    return sizes + (" EP ETP" if any(row.per_expert for row in family.rows) else "")


def markdown(families: Iterable[Family]) -> str:
    """The README's table."""
    head = "| family | `--model-type` | layouts | | shown by |\n|---|---|---|---|---|\n"
    rows = (
        f"| {models} | `{name}` | {sizes} | {note} | {shown} |\n"
        for name, models, sizes, note, shown in lines(families)
    )
    return head + "".join(rows)
