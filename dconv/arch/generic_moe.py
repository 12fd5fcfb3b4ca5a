"""A mixture of experts that no family here is called by, taken for what its config.json says: Llama with experts.

Names of tensors are DeepSeek-MoE's (and Qwen's), the router is a softmax over all experts. Nothing is guessed: how
many experts a token has and whether their weights sum to 1 has to be said, and a key that is not known here is refused:
it could change what is computed. It is in no list of families, being none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from dconv.arch import moe_configs
from dconv.arch.deepseek import DEEPSEEK
from dconv.arch.experts import Experts
from dconv.arch.routing import Router
from dconv.arch.translate import CONFIG
from dconv.errors import Refused
from dconv.sharding.parsed import is_list

NAME: Final = "generic_moe"
_EXPERTS: Final = ("n_routed_experts", "num_local_experts", "num_experts")
#: What others call ``num_experts_per_tok``.
_CHOSEN: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "num_selected_experts")
#: Each with the keys of which one has to be there.
_NEEDED: Final[Mapping[str, tuple[str, ...]]] = {
    "the experts": _EXPERTS,
    "the experts of a token": _CHOSEN,
    "whether the weights of a token's experts sum to 1": ("norm_topk_prob",),
    "the width of an expert": ("moe_intermediate_size", "intermediate_size"),
    "the base of the rotation": ("rope_theta", "rope_parameters"),
    **{key: (key,) for key in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "hidden_act",
        "max_position_embeddings",
    )},
}  # fmt: skip
#: Keys that may be absent, or of a run and of training, which change nothing that is computed.
_FREE: Final = frozenset({
    "num_key_value_heads", "head_dim", "tie_word_embeddings", "first_k_dense_replace", "n_shared_experts",
    "rope_scaling", "architectures", "model_type", "auto_map", "dtype", "torch_dtype", "transformers_version",
    "_name_or_path", "use_cache", "pretraining_tp", "ep_size", "quantization_config", "attn_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "aux_loss_alpha",
    "seq_aux", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "output_router_logits",
})  # fmt: skip
_KNOWN: Final = _FREE.union(*_NEEDED.values())
#: Keys that change something with another value.
_IDLE: Final[Mapping[str, object]] = {
    **moe_configs.DEEPSEEK.only, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    "decoder_sparse_step": 1, "partial_rotary_factor": 1.0,
}  # fmt: skip


def has_experts(config: Mapping[str, object]) -> bool:
    """Whether a config.json says that there are experts."""
    return any(config.get(key) for key in _EXPERTS)


def _filled(said: Mapping[str, object]) -> dict[str, object]:
    """The same keys under DeepSeek's names.

    Raises:
        Refused: a key is missing, or is not known.
    """
    there = {key for key, value in said.items() if value is not None}
    missing = [f"{what}: {' or '.join(keys)}" for what, keys in _NEEDED.items() if there.isdisjoint(keys)]
    strange = [f"{key} {value!r:.60}" for key, value in said.items() if value and not _is_known(key, value)]
    if len({repr(said[key]) for key in _CHOSEN if key in there}) > 1:
        strange += [f"{key} {said[key]!r:.60}" for key in _CHOSEN if key in there]
    if missing or strange:
        raise Refused(
            "this mixture of experts is not told by its config alone, nothing was written",
            where=CONFIG,
            expected="\n".join(missing) or "keys of Llama's layers and of experts chosen by a softmax, each once",
            found="\n".join(strange) or "not said",
            do="--hf-config DIR with a config.json that says what it computes; or dconv/arch/<name>.py",
        )
    chosen = next(said[key] for key in _CHOSEN if key in there)
    widths = [said[key] for key in ("moe_intermediate_size", "intermediate_size") if key in there]
    return {"num_experts_per_tok": chosen, "moe_intermediate_size": widths[0], "intermediate_size": widths[-1]}


def _is_known(key: str, value: object) -> bool:
    if key == "layer_types":
        return is_list(value) and set(map(str, value)) == {"full_attention"}
    return key in _KNOWN or (key in _IDLE and value == _IDLE[key])


GENERIC_MOE: Final = replace(
    DEEPSEEK,
    name=NAME,
    config=replace(
        moe_configs.DEEPSEEK,
        model_type=NAME,
        architecture="GenericMoeForCausalLM",
        defaults={
            "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "first_k_dense_replace": 0,
            "initializer_range": 0.02, "attention_dropout": 0.0,
        },
        more=(Experts(Router(normalised="norm_topk_prob"), _EXPERTS, shared="n_shared_experts", layers="late"),),
        filling=_filled,
    ),
)  # fmt: skip
