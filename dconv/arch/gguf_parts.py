"""What architectures of GGUF have in common, of metadata as a config.json: sizes, heads, experts, windows."""

from __future__ import annotations

from typing import Any, Final

from dconv.arch.gguf_metadata import Metadata
from dconv.arch.gguf_rope import rope
from dconv.sharding.parsed import is_list

Hf = dict[str, Any]

#: Sizes under their two names.
SIZES: Final = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}
#: Granite's scalars under their two names.
SCALES: Final = {
    "embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale", "logits_scaling": "logit_scale",
}  # fmt: skip
#: ``expert_gating_func``.
SOFTMAX, SIGMOID = 1, 2


def decoder(m: Metadata, model_type: str, architecture: str, *, ffn: str = "feed_forward_length") -> Hf:
    """The keys that every decoder has.

    Args:
        m: the metadata.
        model_type: config.json's.
        architecture: its class in transformers.
        ffn: the key of the feed-forward size.

    Raises:
        Refused: a key is missing, or attention is not causal.
        Damaged: a value that is impossible, or more layers than there are tensors.
    """
    heads = m.whole("attention.head_count")
    if not heads:
        raise m.damaged("attention.head_count", "at least 1", heads)
    sizes = {key: m.whole(ours, heads if key == "num_key_value_heads" else None) for key, ours in SIZES.items()}
    m.fixed("attention.causal", True)
    if sizes["num_hidden_layers"] > len(m.shapes):
        most = f"at most one for each of {len(m.shapes)} tensors"
        raise m.damaged("block_count", most, sizes["num_hidden_layers"])
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": m.rows("token_embd.weight"),
        "intermediate_size": m.whole(ffn),
        **sizes,
        "rms_norm_eps": m.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not m.has("output.weight"),
        **{f"{name}_token_id": m.token(ggml) for name, ggml in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    }


def head_dim(m: Metadata, hf: Hf) -> int:
    """Elements of a head: ``attention.key_length``, or hidden_size / heads.

    Raises:
        Refused: a head's values are not as many.
    """
    heads = max(hf["num_attention_heads"], 1)
    found = m.whole("attention.key_length", hf["hidden_size"] // heads)
    m.fixed("attention.value_length", found)
    return found


def whole_heads(m: Metadata, hf: Hf) -> Hf:
    """``head_dim`` and rotation, of architectures that rotate heads as a whole.

    Raises:
        Refused: a part of each head is rotated; see `dconv.arch.gguf_rope.rope` besides.
    """
    head = head_dim(m, hf)
    m.fixed("rope.dimension_count", head)
    return {"head_dim": head, **rope(m)}


def experts(m: Metadata, count: str, width: str = "") -> Hf:
    """How many experts there are, how many a token has, and how wide one is.

    Args:
        m: the metadata.
        count: config.json's key of the first.
        width: and of the last; "" where config.json has none.
    """
    found: Hf = {count: m.whole("expert_count"), "num_experts_per_tok": m.whole("expert_used_count")}
    if width:
        found[width] = expert_width(m)
    return found


def expert_width(m: Metadata) -> int:
    """``expert_feed_forward_length``, or what the tensors show."""
    first = next((name for name in m.shapes if name.endswith(".ffn_down_exps.weight")), "blk.0.ffn_down_exps.weight")
    return m.whole("expert_feed_forward_length", m.rows(first, 2))


def latent(m: Metadata, hf: Hf, key: int) -> Hf:
    """Multi-latent attention's sizes; a head's queries have ``key`` elements, the rotated ones among them."""
    rotated = m.whole("rope.dimension_count")
    low = m.whole("attention.q_lora_rank", 0)
    return {
        "num_key_value_heads": hf["num_attention_heads"],
        "q_lora_rank": low or None,
        "kv_lora_rank": m.whole("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
    }


def dense_layers(m: Metadata, hf: Hf) -> Hf:
    """The layers without a router, as Qwen's classes list them."""
    routed = m.layers_with("ffn_gate_inp.weight", hf["num_hidden_layers"])
    return {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer, here in enumerate(routed) if not here]}


def sliding(m: Metadata, hf: Hf, every: int) -> list[str]:
    """The kind of each layer: all but each ``every``-th slide, or as the metadata say.

    Raises:
        Damaged: a list has not one entry a layer.
    """
    layers = range(hf["num_hidden_layers"])
    said = m.get("attention.sliding_window_pattern")
    slides = said if is_list(said) else [(layer + 1) % every != 0 for layer in layers]
    if type(said) is int and said > 0:
        slides = [(layer + 1) % said != 0 for layer in layers]
    if len(slides) != len(layers):
        raise m.damaged("attention.sliding_window_pattern", "one entry a layer", said)
    return ["sliding_attention" if here else "full_attention" for here in slides]


def late(m: Metadata) -> Hf:
    """Experts in all layers but the first ones, and shared ones, as DeepSeek calls them."""
    return {
        **experts(m, "n_routed_experts", "moe_intermediate_size"),
        "n_shared_experts": m.whole("expert_shared_count") or None,
        "first_k_dense_replace": m.whole("leading_dense_block_count", 0),
        "moe_layer_freq": 1,
        "hidden_act": "silu",
    }
