"""GGUF's architectures: what of a config.json their metadata say, and how their tensors differ from HuggingFace's.

A key that llama.cpp leaves to its code is what that code computes. What neither says is refused by name, and so is a
key of the architecture that is not known here: ``--hf-config`` settles both. Sources, llama.cpp of 2026-11 (as vendored
by llama-cpp-python 0.3.36): ``set_gguf_parameters`` and ``modify_tensors`` in ``conversion/*.py``,
``load_arch_hparams`` and the graphs in ``src/models/*.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final

from dconv.arch.gguf_metadata import Metadata, inverse
from dconv.arch.gguf_parts import (
    SCALES,
    SIGMOID,
    SOFTMAX,
    Hf,
    decoder,
    dense_layers,
    experts,
    head_dim,
    late,
    latent,
    sliding,
    whole_heads,
)
from dconv.arch.gguf_rope import longrope, rope
from dconv.errors import Damaged, Refused


@dataclass(frozen=True)
class Arch:
    """One of GGUF's architectures.

    Attributes:
        config: its config.json.
        families: those that it is written for (`dconv.arch.gguf_written`).
        neighbours: whether the rows of queries and keys are in another order: llama.cpp rotates neighbours, not halves.
        raised: whether norms are stored 1 higher.
        absorbed: whether kv_b of latent attention is parted into what attention absorbs.
    """

    config: Callable[[Metadata], Hf]
    families: tuple[str, ...]
    neighbours: bool = False
    raised: bool = False
    absorbed: bool = False


def _llama(m: Metadata) -> Hf:
    routed = m.whole("expert_count", 0)
    hf = decoder(m, *(("mixtral", "MixtralForCausalLM") if routed else ("llama", "LlamaForCausalLM")))
    hf |= {"hidden_act": "silu", **whole_heads(m, hf)}
    if routed:
        m.fixed("expert_feed_forward_length", hf["intermediate_size"])
        m.fixed("expert_gating_func", SOFTMAX)
        return {**hf, **experts(m, "num_local_experts"), "sliding_window": None}
    m.fixed("expert_used_count", 0)
    return {**hf, "attention_bias": m.has("blk.0.attn_q.bias"), "mlp_bias": m.has("blk.0.ffn_gate.bias")}


def _granite(m: Metadata) -> Hf:
    hf = decoder(m, "granite", "GraniteForCausalLM")
    return {
        **hf, **whole_heads(m, hf), "hidden_act": "silu", **{ours: m.real(key) for ours, key in SCALES.items()},
        "attention_bias": m.has("blk.0.attn_q.bias"), "mlp_bias": m.has("blk.0.ffn_gate.bias"),
    }  # fmt: skip


def _minicpm(m: Metadata) -> Hf:
    hf = decoder(m, "minicpm", "MiniCPMForCausalLM")
    m.fixed("expert_count", 0)
    deep, wide = sqrt(hf["num_hidden_layers"] or 1), hf["hidden_size"]
    residual, logit = m.real("residual_scale"), m.real("logit_scale") or 1.0
    base = inverse(logit, lambda base: wide / base if base else 0, wide / logit)
    m.fixed("rope.dimension_count", wide // max(hf["num_attention_heads"], 1))
    return {
        **hf,
        **longrope(m, hf["max_position_embeddings"]),
        "hidden_act": "silu",
        "scale_emb": m.real("embedding_scale"),
        "scale_depth": inverse(residual, lambda depth: depth / deep, residual * deep),
        "dim_model_base": int(base) if base.is_integer() else base,
    }


def _minicpm3(m: Metadata) -> Hf:
    hf = decoder(m, "minicpm3", "MiniCPM3ForCausalLM")
    return {
        **hf,
        **longrope(m, hf["max_position_embeddings"]),
        **latent(m, hf, m.whole("attention.key_length")),
        "v_head_dim": m.rows("blk.0.attn_output.weight", 1) // max(hf["num_attention_heads"], 1),
        "hidden_act": "silu",
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,  # constants of its graph
    }


def _qwen2(m: Metadata) -> Hf:
    hf = decoder(m, "qwen2", "Qwen2ForCausalLM")
    head = whole_heads(m, hf)
    if head["head_dim"] * hf["num_attention_heads"] != hf["hidden_size"]:
        raise m.refused("qwen2.attention.key_length", "embedding_length / head_count", str(head["head_dim"]))
    del head["head_dim"]  # its class has no such key
    return {**hf, **head, "hidden_act": "silu", "use_sliding_window": False, "sliding_window": None}


def _qwen3(m: Metadata) -> Hf:
    hf = decoder(m, "qwen3", "Qwen3ForCausalLM")
    return {**hf, **whole_heads(m, hf), **_QWEN_PLAIN}


_QWEN_PLAIN: Final = {
    "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip


def _qwen2_moe(m: Metadata) -> Hf:
    hf = decoder(m, "qwen2_moe", "Qwen2MoeForCausalLM")
    m.fixed("expert_gating_func", SOFTMAX)
    m.fixed("rope.dimension_count", head_dim(m, hf))
    shared = m.rows("blk.0.ffn_down_shexp.weight", 1)
    return {
        **hf, **rope(m), **experts(m, "num_experts", "moe_intermediate_size"), **dense_layers(m, hf),
        "shared_expert_intermediate_size": m.whole("expert_shared_feed_forward_length", shared),
        "norm_topk_prob": False, "hidden_act": "silu", "qkv_bias": m.has("blk.0.attn_q.bias"),
        "use_sliding_window": False, "sliding_window": None,
    }  # fmt: skip


def _qwen3_moe(m: Metadata) -> Hf:
    hf = decoder(m, "qwen3_moe", "Qwen3MoeForCausalLM")
    m.fixed("expert_gating_func", SOFTMAX)
    return {
        **hf, **whole_heads(m, hf), **experts(m, "num_experts", "moe_intermediate_size"), **dense_layers(m, hf),
        **_QWEN_PLAIN, "norm_topk_prob": True,
    }  # fmt: skip


def _olmo2(m: Metadata) -> Hf:
    hf = decoder(m, "olmo2", "Olmo2ForCausalLM")
    head = whole_heads(m, hf)
    return {**hf, **head, "hidden_act": "silu", "attention_bias": False}


def _olmoe(m: Metadata) -> Hf:
    hf = decoder(m, "olmoe", "OlmoeForCausalLM")
    m.fixed("expert_feed_forward_length", hf["intermediate_size"])
    m.fixed("expert_gating_func", SOFTMAX)
    head = whole_heads(m, hf)
    del head["head_dim"]
    return {
        **hf, **head, **experts(m, "num_experts"), "norm_topk_prob": False, "hidden_act": "silu",
        "attention_bias": False, "clip_qkv": None,
    }  # fmt: skip


def _minimax_m2(m: Metadata) -> Hf:
    hf = decoder(m, "minimax_m2", "MiniMaxM2ForCausalLM", ffn="expert_feed_forward_length")
    m.fixed("feed_forward_length", hf["intermediate_size"])
    if m.get("expert_gating_func") != SIGMOID:
        raise m.refused("minimax-m2.expert_gating_func", "2, sigmoid", repr(m.get("expert_gating_func")))
    return {
        **hf, **rope(m), **experts(m, "num_local_experts"), "head_dim": head_dim(m, hf),
        "rotary_dim": m.whole("rope.dimension_count"), "hidden_act": "silu", "use_qk_norm": True,
        "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_routing_bias": True,
        "shared_intermediate_size": 0,
    }  # fmt: skip


def _gpt_oss(m: Metadata) -> Hf:
    hf = decoder(m, "gpt_oss", "GptOssForCausalLM", ffn="expert_feed_forward_length")
    m.get("feed_forward_length")  # an expert's too, or 0
    m.fixed("expert_gating_func", SOFTMAX)
    head = whole_heads(m, hf)
    if isinstance(scaling := head["rope_scaling"], dict) and scaling["rope_type"] == "yarn":
        scaling["truncate"] = False  # as all that were released; no key says so
    return {
        **hf, **head, **experts(m, "num_local_experts"), "hidden_act": "silu", "attention_bias": True,
        "sliding_window": m.whole("attention.sliding_window"), "swiglu_limit": 7.0,
        "layer_types": sliding(m, hf, 2),
    }  # fmt: skip


def _gemma(m: Metadata) -> Hf:
    hf = decoder(m, "gemma", "GemmaForCausalLM")
    return {**hf, **whole_heads(m, hf), "hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def _gemma_scaled(m: Metadata, hf: Hf, largest: int, window: int | None = None) -> Hf:
    """What scores are scaled by: the width of a head, but hidden_size / heads in the model of 27 B.

    That one is told by its layers alone.
    """
    head = whole_heads(m, hf)
    wide = hf["hidden_size"] // max(hf["num_attention_heads"], 1)
    return {
        **head,
        "query_pre_attn_scalar": wide if hf["num_hidden_layers"] == largest else head["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": m.whole("attention.sliding_window", window),
    }


def _gemma2(m: Metadata) -> Hf:
    hf = decoder(m, "gemma2", "Gemma2ForCausalLM")
    return {
        **hf, **_gemma_scaled(m, hf, 46, 4096), "layer_types": sliding(m, hf, 2),
        "attn_logit_softcapping": m.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": m.real("final_logit_softcapping", 30.0),
    }  # fmt: skip


def _gemma3(m: Metadata) -> Hf:
    hf = decoder(m, "gemma3_text", "Gemma3ForCausalLM")
    return {
        **hf, **_gemma_scaled(m, hf, 62), "layer_types": sliding(m, hf, 6),
        "rope_local_base_freq": m.real("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": m.real("final_logit_softcapping", 0.0) or None,
    }  # fmt: skip


def _glm4(m: Metadata) -> Hf:
    hf = decoder(m, "glm4", "Glm4ForCausalLM")
    head = head_dim(m, hf)
    return {
        **hf, **rope(m), "head_dim": head, "hidden_act": "silu", "attention_bias": m.has("blk.0.attn_q.bias"),
        "partial_rotary_factor": m.whole("rope.dimension_count") / max(head, 1),
    }  # fmt: skip


def _phi3(m: Metadata) -> Hf:
    hf = decoder(m, "phi3", "Phi3ForCausalLM")
    head, window = head_dim(m, hf), m.whole("attention.sliding_window", 0)
    rotated = m.whole("rope.dimension_count", head)
    part = {} if rotated == head else {"partial_rotary_factor": rotated / max(head, 1)}
    return {**hf, **longrope(m, hf["max_position_embeddings"]), **part, "hidden_act": "silu",
            "sliding_window": window or None}  # fmt: skip


def _deepseek(m: Metadata) -> Hf:
    hf = decoder(m, "deepseek", "DeepseekForCausalLM")
    m.fixed("expert_weights_scale", 1.0)
    m.fixed("expert_weights_norm", False)
    m.fixed("expert_gating_func", SOFTMAX)
    head = whole_heads(m, hf)
    del head["head_dim"]
    return {**hf, **head, **late(m), "norm_topk_prob": False, "scoring_func": "softmax"}


def _deepseek2(m: Metadata) -> Hf:
    sigmoid = m.whole("expert_gating_func", SOFTMAX) == SIGMOID
    m.fixed("expert_gating_func", SOFTMAX, SIGMOID)
    named = ("deepseek_v3", "DeepseekV3ForCausalLM") if sigmoid else ("deepseek_v2", "DeepseekV2ForCausalLM")
    hf = decoder(m, *named)
    absorbed = m.get("attention.key_length_mla") is not None  # else as it was before attention absorbed kv_b
    value, key = m.whole("attention.value_length"), m.whole("attention.key_length")
    hf |= latent(m, hf, m.whole("attention.key_length_mla") if absorbed else key)
    groups, chosen = m.whole("expert_group_count"), m.whole("expert_group_used_count")
    hf |= {
        **rope(m),
        **late(m),
        "v_head_dim": m.whole("attention.value_length_mla") if absorbed else value,
        "n_group": groups,
        "topk_group": chosen,
        "routed_scaling_factor": m.real("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": m.flag("expert_weights_norm"),
        "attention_bias": False,
    }
    if sigmoid:
        return {**hf, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
    m.fixed("expert_weights_norm", False)
    method = "group_limited_greedy" if groups != chosen else "greedy"
    return {**hf, "scoring_func": "softmax", "topk_method": method}


ARCHS: Final[dict[str, Arch]] = {
    "llama": Arch(_llama, ("llama", "mistral", "mixtral"), neighbours=True),
    "granite": Arch(_granite, ("granite",), neighbours=True),
    "minicpm": Arch(_minicpm, ("minicpm",), neighbours=True),
    "minicpm3": Arch(_minicpm3, ("minicpm3",)),
    "qwen2": Arch(_qwen2, ("qwen2",)),
    "qwen3": Arch(_qwen3, ("qwen3",)),
    "qwen2moe": Arch(_qwen2_moe, ("qwen2_moe",)),
    "qwen3moe": Arch(_qwen3_moe, ("qwen3_moe",)),
    "olmo2": Arch(_olmo2, ("olmo2",)),
    "olmoe": Arch(_olmoe, ("olmoe",)),
    "minimax-m2": Arch(_minimax_m2, ("minimax_m2",)),
    "gpt-oss": Arch(_gpt_oss, ("gpt_oss",)),
    "gemma": Arch(_gemma, ("gemma",), raised=True),
    "gemma2": Arch(_gemma2, ("gemma2",), raised=True),
    "gemma3": Arch(_gemma3, ("gemma3_text",), raised=True),
    "glm4": Arch(_glm4, ("glm4",)),
    "phi3": Arch(_phi3, ("phi3",)),
    "deepseek": Arch(_deepseek, ("deepseek",), neighbours=True),
    "deepseek2": Arch(_deepseek2, ("deepseek_v2", "deepseek_v3"), absorbed=True),
}


def arch_of(values: Mapping[str, Any], where: str) -> str:
    """``general.architecture``.

    Raises:
        Refused: it is none of `ARCHS`, or no model's.
        Damaged: it is no name.
    """
    kind, arch = values.get("general.type", "model"), values.get("general.architecture")
    if kind != "model":
        raise Refused(f"a GGUF of a {kind!r:.40} and no model's, nothing was written", where=where, expected="a model")
    if not isinstance(arch, str | None) or (arch is not None and not re.fullmatch(r"[\w.-]{1,80}", arch)):
        raise Damaged(
            "a GGUF's architecture is no name", where=f"general.architecture in {where}", found=f"{arch!r:.80}"
        )
    if arch is None or arch not in ARCHS:
        raise Refused(
            "a GGUF of an architecture that this version does not read, nothing was written",
            where=f"general.architecture in {where}",
            expected="one of " + ", ".join(ARCHS),
            found=f"{arch!r:.80}",
        )
    return arch


def config_of(metadata: Metadata) -> Hf:
    """config.json for a file's metadata, without a dtype.

    Raises:
        Refused: a value that it needs and the metadata lack, or a key that is not known.
        Damaged: a value that none is.
    """
    hf = ARCHS[metadata.arch].config(metadata)
    metadata.check_all_read()
    return hf
