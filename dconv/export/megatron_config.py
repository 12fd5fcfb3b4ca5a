"""Megatron arguments into megatron-core's own configuration, on the CPU.

What Megatron-LM's ``core_transformer_config_from_args`` says about the function that is computed, and nothing about
how it is trained or made fast. Where this version of megatron-core (0.16.1, local modules) would compute something
else than the arguments say, it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dconv.errors import Refused
from dconv.export.megatron_weights import Args, named

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import TransformerConfig

# sizes that have no default
REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "padded_vocab_size")

# arguments that have the same name in TransformerConfig and say which function is computed
_SAME_NAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "qk_l2_norm", "softmax_scale", "softmax_type",
    "window_attn_skip_freq", "rotary_interleaved", "no_rope_freq",
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "glu_linear_offset", "activation_func_clamp_value",
)  # fmt: skip

_SAME_NAME_MOE = (
    "moe_ffn_hidden_size", "moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
    "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_dtype", "moe_router_enable_expert_bias",
    "moe_router_load_balancing_type", "moe_apply_probs_on_input", "moe_latent_size",
)  # fmt: skip

# multi-latent attention: Megatron-LM's parser has other defaults than MLATransformerConfig for some of them
_SAME_NAME_MLA: Mapping[str, Any] = {
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128,
    "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0, "rotary_base": 10000, "rotary_percent": 1.0,
    "rope_type": "yarn", "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip

# of position_embedding_type yarn, that GPTModel looks for on the configuration, which does not declare them
_YARN: Mapping[str, Any] = {
    "yarn_rotary_scaling_factor": None, "yarn_original_max_position_embeddings": None, "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0, "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0, "yarn_correction_range_round_to_int": True,
}  # fmt: skip

# Megatron-LM's own arguments for three of them (argument_utils.py)
_YARN_ARGS = {
    "yarn_rotary_scaling_factor": "rotary_scaling_factor", "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}  # fmt: skip

# what the local modules of megatron-core 0.16.1 cannot compute on a CPU, or this runtime does not set up
_UNSUPPORTED = (
    "mtp_num_layers", "experimental_attention_variant", "linear_attention_freq",
    "heterogeneous_layers_config_path", "apply_layernorm_1p", "use_legacy_models", "spec", "moe_expert_capacity_factor",
    "attention_output_gate", "is_hybrid_model", "hybrid_override_pattern", "moe_latent_size",
    # no arguments of Megatron-LM: a converted checkpoint says with them what no version of megatron-core computes
    "post_self_attn_layernorm", "post_mlp_layernorm", "no_pre_layernorm", "qk_layernorm_full_width", "embedding_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq",
    "apply_residual_connection_post_layernorm", "scale_decoder_outputs",
    "scale_emb", "scale_depth", "dim_model_base", "rope_scaling", "latent_rotary_halves", "block_ffn",
)  # fmt: skip

# the same, but for this number
_UNSUPPORTED_UNLESS_1 = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


# what says that a decoder has layers of Mamba, which another runtime here builds
_HYBRID = ("is_hybrid_model", "hybrid_override_pattern", "spec")


def as_dict(args: Args, *, hybrid: bool = False) -> dict[str, Any]:
    """Arguments by name, of a model that is computed here.

    Args:
        args: by the names of Megatron-LM's parser.
        hybrid: layers of Mamba are computed.

    Raises:
        Refused: a size is missing, or what is asked for is not computed here.
    """
    given = named(args)
    missing = [name for name in REQUIRED if given.get(name) is None]
    if missing:
        raise Refused("Megatron arguments are missing", where="args", expected=", ".join(missing))
    if unsupported := not_computed(given, hybrid=hybrid):
        raise Refused(
            "megatron-core on a CPU (local layer spec) does not compute this model",
            where="args",
            found=", ".join(unsupported),
        )
    return given


def not_computed(given: Mapping[str, Any], *, hybrid: bool = False) -> list[str]:
    """Arguments that ask for what the local modules of megatron-core do not compute on a CPU, with their values."""
    names = [name for name in _UNSUPPORTED if given.get(name) and not (hybrid and name in _HYBRID)]
    names += [name for name in _UNSUPPORTED_UNLESS_1 if given.get(name) not in (None, 1)]
    return [f"{name}={given[name]}" for name in names]


def transformer_config(given: Mapping[str, Any], dtype: torch.dtype) -> TransformerConfig:
    """TransformerConfig, or MLATransformerConfig for multi-latent attention, of the running `parallel_world`.

    Source: Megatron-LM's ``core_transformer_config_from_args`` (``megatron/training/arguments.py``).

    Args:
        given: of `as_dict`.
        dtype: of the weights and of what the stages send each other.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    state: Any = parallel_state  # whose functions have no types
    experts = given.get("num_experts") or None
    latent = bool(given.get("multi_latent_attention"))
    names = _SAME_NAME + (_SAME_NAME_MOE if experts else ())
    fields = {name: given[name] for name in names if given.get(name) is not None}
    fields |= {"add_bias_linear": given.get("add_bias_linear", True), **_activation(given)}
    if given.get("group_query_attention", given.get("num_query_groups") is not None):
        # without the flag, Megatron-LM saves num_query_groups=1 and means one group a head
        fields["num_query_groups"] = given["num_query_groups"]
    window = given.get("window_size")
    if window is not None and window[0] >= 0:  # -1 is Transformer Engine's "no limit"; the local mask misreads it
        fields["window_size"] = (int(window[0]), int(window[1]))
    if experts:
        # runs on gloo without side streams; which dispatcher carries the tokens does not change the function
        fields |= {"num_moe_experts": experts, "moe_token_dispatcher_type": "allgather"}
    if latent:
        said = {name: given[name] for name in _SAME_NAME_MLA if given.get(name) is not None}
        fields |= {**_SAME_NAME_MLA, **said}
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **fields,
        **_pipeline_split(given),
        layernorm_epsilon=given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=state.get_virtual_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=state.get_expert_tensor_parallel_world_size(),
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    if given.get("position_embedding_type") == "yarn":  # where they are set, megatron-core applies them
        for name, default in _YARN.items():
            said = _yarn(given, name)
            setattr(config, name, default if said is None else said)
    return config


def _activation(given: Mapping[str, Any]) -> dict[str, Any]:
    from megatron.core.activations import quick_gelu, squared_relu
    from torch.nn.functional import gelu, relu, silu

    if given.get("activation_func") == "relu":
        return {"activation_func": relu}
    if given.get("swiglu"):
        return {"activation_func": silu, "gated_linear_unit": True}
    if given.get("gated_linear_unit"):
        tanh = given.get("openai_gelu") or given.get("bias_gelu_fusion")
        return {"activation_func": partial(gelu, approximate="tanh") if tanh else gelu, "gated_linear_unit": True}
    if given.get("quick_geglu"):
        return {"activation_func": quick_gelu, "gated_linear_unit": True}
    if given.get("squared_relu"):
        return {"activation_func": squared_relu}
    if given.get("openai_gelu") or given.get("bias_gelu_fusion"):
        # the fused bias+GELU kernel, on by default in Megatron-LM, is the tanh form
        return {"activation_func": partial(gelu, approximate="tanh")}
    return {"activation_func": gelu}


def position_embedding(given: Mapping[str, Any]) -> Literal["rope", "yarn", "learned_absolute", "none"]:
    """Kind of position embedding.

    Raises:
        Refused: another than these, or one that lacks an argument that it needs.
    """
    kind = given.get("position_embedding_type", "learned_absolute")
    if given.get("use_rotary_position_embeddings"):  # the older spelling
        kind = "rope"
    if kind not in ("rope", "yarn", "learned_absolute", "none"):
        raise Refused(
            "this kind of position embedding is not set up here",
            where="args.position_embedding_type",
            expected="rope, yarn, learned_absolute or none",
            found=str(kind),
        )
    needed = {"learned_absolute": ("max_position_embeddings",), "yarn": tuple(_YARN)[:2]}.get(kind, ())
    missing = [name for name in needed if not _yarn(given, name)]
    if missing:
        raise Refused("Megatron arguments are missing", where="args", expected=", ".join(missing))
    return kind


def _yarn(given: Mapping[str, Any], name: str) -> Any:
    """An argument by megatron-core's name, or by Megatron-LM's."""
    said = given.get(name)
    return given.get(_YARN_ARGS.get(name, name)) if said is None else said


def _pipeline_split(given: Mapping[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    state: Any = parallel_state  # whose functions have no types
    stages = state.get_pipeline_model_parallel_world_size()
    if stages == 1 or given.get("pipeline_model_parallel_size", stages) != stages:
        return {}
    layout = given.get("pipeline_model_parallel_layout")
    split = {
        # the parser's names for the first two are decoder_*; a saved TransformerConfig has the others
        "num_layers_in_first_pipeline_stage": given.get("decoder_first_pipeline_num_layers"),
        "num_layers_in_last_pipeline_stage": given.get("decoder_last_pipeline_num_layers"),
        "account_for_embedding_in_pipeline_split": given.get("account_for_embedding_in_pipeline_split", False),
        "account_for_loss_in_pipeline_split": given.get("account_for_loss_in_pipeline_split", False),
        # Megatron-LM saves its parsed layout object, which keeps the text it was made from
        "pipeline_model_parallel_layout": getattr(layout, "input_data", layout) or None,
    }
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        split[name] = split[name] if split[name] is not None else given.get(name)
    return split
