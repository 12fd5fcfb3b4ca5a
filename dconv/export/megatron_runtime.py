"""The real megatron-core as a judge: build a decoder from Megatron arguments, load a checkpoint, compute logits.

``dconv check`` and ``--verify logits`` ask it whether a checkpoint computes what its source computes. Therefore it
shares no code with the converter: names, layouts, padding and file contents are megatron-core's own, and where this
version of megatron-core (0.16.1, local layer spec, CPU) would compute something else than the arguments say, it
refuses. Weights that no loader touched are NaN, so that a hole cannot pass for a model.

Typical use, in each process of a world of tp x pp::

    with parallel_world(tp, pp, rank=rank, world=world, init_method=init_method):
        models = build_gpt(args)
        load_torch_dist(models, "checkpoint/iter_0000001")
        result = logits(models, tokens)  # on the last stage
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dconv.errors import Refused
from dconv.export.megatron_cpu import cpu_patches, parallel_world, require_megatron, spawn
from dconv.export.megatron_weights import (
    Args,
    load_legacy,
    load_torch_dist,
    save_legacy,
    save_torch_dist,
    seed_weights,
)

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

__all__ = [
    "build_gpt", "cpu_patches", "load_legacy", "load_torch_dist", "logits", "parallel_world", "require_megatron",
    "save_legacy", "save_torch_dist", "seed_weights", "spawn",
]  # fmt: skip

_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "padded_vocab_size")

# arguments that have the same name in TransformerConfig and say which function is computed
_SAME_NAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "qk_l2_norm", "softmax_scale", "softmax_type",
    "window_attn_skip_freq", "rotary_interleaved", "no_rope_freq", "apply_residual_connection_post_layernorm",
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "glu_linear_offset", "activation_func_clamp_value",
)  # fmt: skip

_SAME_NAME_MOE = (
    "moe_ffn_hidden_size", "moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
    "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_dtype", "moe_router_enable_expert_bias",
    "moe_router_load_balancing_type", "moe_apply_probs_on_input", "moe_latent_size",
)  # fmt: skip

# what the local spec of megatron-core 0.16.1 cannot compute on a CPU, or this runtime does not set up
_UNSUPPORTED = (
    "multi_latent_attention", "mtp_num_layers", "experimental_attention_variant", "linear_attention_freq",
    "heterogeneous_layers_config_path", "apply_layernorm_1p", "use_legacy_models", "spec", "moe_expert_capacity_factor",
    "attention_output_gate", "is_hybrid_model", "hybrid_override_pattern",
)  # fmt: skip


def build_gpt(args: Args, *, dtype: torch.dtype | None = None) -> list[GPTModel]:
    """The model chunks that this rank owns in the running `parallel_world`, in evaluation mode, weights all NaN.

    Needed arguments: num_layers, hidden_size, ffn_hidden_size, num_attention_heads, padded_vocab_size. All others
    have the default of Megatron-LM's own parser (LayerNorm, biases, tied embeddings, learned positions, GELU), so a
    checkpoint's saved ``args`` give the model it was trained as. Arguments that split the pipeline unevenly hold for
    the pipeline size they were written for (``pipeline_model_parallel_size``); in a world of another size they are
    left out.

    llama3 RoPE scaling (``use_rope_scaling``) is megatron-core's: only its factor is free; low and high frequency
    factors 1 and 4 and 8192 original positions are constants there. ``window_size`` (left, right) counts the token
    itself apart: a window of W tokens, as HuggingFace counts, is (W - 1, 0).

    Args:
        args: arguments by the names of Megatron-LM's parser (``norm_epsilon``, ``swiglu``, …).
        dtype: of the weights and the computation; float32 if None.

    Returns:
        One `GPTModel`, or one per virtual stage.

    Raises:
        Refused: an argument is missing, or asks for what this runtime does not compute.
    """
    cpu_patches()
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    given = _as_dict(args)
    config = _config(given, dtype or torch.float32)
    positions = _position_embedding(given)
    models = []
    chunks = config.virtual_pipeline_model_parallel_size
    layers: Any
    for chunk in range(chunks or 1):
        stage = chunk if chunks else None
        if config.num_moe_experts:
            layers = get_gpt_decoder_block_spec(
                config,
                use_transformer_engine=False,
                normalization=config.normalization,
                qk_l2_norm=config.qk_l2_norm,
                vp_stage=stage,
            )
        else:
            layers = get_gpt_layer_local_spec(
                qk_layernorm=config.qk_layernorm, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
            )
        model = GPTModel(
            config,
            layers,
            vocab_size=given["padded_vocab_size"],
            max_sequence_length=given.get("max_position_embeddings") or 0,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            parallel_output=False,
            share_embeddings_and_output_weights=not given.get("untie_embeddings_and_output_weights", False),
            position_embedding_type=positions,
            rotary_percent=given.get("rotary_percent", 1.0),
            rotary_base=given.get("rotary_base", 10000),
            rope_scaling=given.get("use_rope_scaling", False),
            rope_scaling_factor=given.get("rope_scaling_factor", 8.0),
            seq_len_interpolation_factor=given.get("rotary_seq_len_interpolation_factor"),
            vp_stage=stage,
        )
        for parameter in model.requires_grad_(False).parameters():
            parameter.fill_(torch.nan)
        models.append(model.eval())
    return models


def _as_dict(args: Args) -> dict[str, Any]:
    given = dict(vars(args) if isinstance(args, Namespace) else args)
    missing = [name for name in _REQUIRED if given.get(name) is None]
    if missing:
        raise Refused("Megatron arguments are missing", where="args", expected=", ".join(missing))
    unsupported = [name for name in _UNSUPPORTED if given.get(name)]
    if unsupported:
        raise Refused(
            "megatron-core on a CPU (local layer spec) does not compute this model",
            where="args",
            found=", ".join(f"{name}={given[name]}" for name in unsupported),
        )
    return given


def _config(given: Mapping[str, Any], dtype: torch.dtype) -> TransformerConfig:
    """The part of Megatron-LM's ``core_transformer_config_from_args`` that says which function is computed."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    experts = given.get("num_experts") or None
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
    return TransformerConfig(
        **fields,
        **_pipeline_split(given),
        layernorm_epsilon=given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5)),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )


def _activation(given: Mapping[str, Any]) -> dict[str, Any]:
    from megatron.core.activations import quick_gelu, squared_relu
    from torch.nn.functional import gelu, silu

    if given.get("swiglu"):
        return {"activation_func": silu, "gated_linear_unit": True}
    if given.get("quick_geglu"):
        return {"activation_func": quick_gelu, "gated_linear_unit": True}
    if given.get("squared_relu"):
        return {"activation_func": squared_relu}
    if given.get("openai_gelu") or given.get("bias_gelu_fusion"):
        # the fused bias+GELU kernel, on by default in Megatron-LM, is the tanh form
        return {"activation_func": partial(gelu, approximate="tanh")}
    return {"activation_func": gelu}


def _position_embedding(given: Mapping[str, Any]) -> Literal["rope", "learned_absolute", "none"]:
    kind = given.get("position_embedding_type", "learned_absolute")
    if given.get("use_rotary_position_embeddings"):  # the older spelling
        kind = "rope"
    if kind not in ("rope", "learned_absolute", "none"):
        raise Refused(
            "this kind of position embedding is not set up here",
            where="args.position_embedding_type",
            expected="rope, learned_absolute or none",
            found=str(kind),
        )
    if kind == "learned_absolute" and not given.get("max_position_embeddings"):
        raise Refused("Megatron arguments are missing", where="args", expected="max_position_embeddings")
    return kind


def _pipeline_split(given: Mapping[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    stages = parallel_state.get_pipeline_model_parallel_world_size()
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


def logits(models: list[GPTModel], tokens: torch.Tensor) -> torch.Tensor | None:
    """One forward pass of the whole pipeline; every rank of the world calls it with the same tokens.

    Hidden states go from stage to stage, and with virtual stages from the last stage back to the first. The mask is
    causal (and a sliding window, where the arguments have one), so that padding belongs at the right.

    Args:
        models: this rank's chunks, from `build_gpt`.
        tokens: int64 [batch, sequence].

    Returns:
        On the last stage float32 [batch, sequence, padded vocabulary], gathered over tensor parallel; None elsewhere.

    Raises:
        Refused: tokens are not a matrix of numbers below the vocabulary size.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    vocabulary = models[0].vocab_size
    if tokens.ndim != 2 or tokens.min() < 0 or tokens.max() >= vocabulary:
        # Megatron's parallel embedding would answer zeros for a token of no rank
        raise Refused(
            "these tokens cannot be fed to the model",
            expected=f"[batch, sequence] of numbers below {vocabulary}",
            found=f"shape {tuple(tokens.shape)}, from {int(tokens.min())} to {int(tokens.max())}",
        )
    config = models[0].config
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(group)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        for model in models:
            if not model.pre_process:
                hidden = torch.empty(tokens.shape[1], tokens.shape[0], config.hidden_size, dtype=config.params_dtype)
                dist.recv(hidden, stages[stage - 1], group=group)
                model.set_input_tensor(hidden)
            output = model(tokens, positions, None)
            if model.post_process:
                return output.float()
            dist.send(output.contiguous(), stages[(stage + 1) % len(stages)], group=group)
    return None
