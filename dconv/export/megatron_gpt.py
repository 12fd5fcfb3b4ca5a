"""Decoders of megatron-core (GPTModel) from Megatron arguments, and their logits.

Layers are those of megatron-core's own local specs. The one part it lacks on a CPU is an attention that accepts the
two channel widths of multi-latent attention; `_layers` gives it megatron-core's DotProductAttention, which computes
with any widths.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from dconv.errors import Refused
from dconv.export.megatron_config import as_dict, position_embedding, transformer_config
from dconv.export.megatron_cpu import cpu_patches
from dconv.export.megatron_weights import Args, forget_weights, require_filled_buffers

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig


def build_gpt(args: Args, *, dtype: torch.dtype | None = None) -> list[GPTModel]:
    """The model chunks that this rank owns in the running `parallel_world`, in evaluation mode, weights all NaN.

    Needed arguments: num_layers, hidden_size, ffn_hidden_size, num_attention_heads, padded_vocab_size. All others
    have the default of Megatron-LM's own parser (LayerNorm, biases, tied embeddings, learned positions, GELU), so a
    checkpoint's saved ``args`` give the model it was trained as. Arguments that split the pipeline unevenly hold for
    the pipeline size they were written for (``pipeline_model_parallel_size``); in a world of another size they are
    left out.

    llama3 RoPE scaling (``use_rope_scaling``) is megatron-core's: only its factor is free; low and high frequency
    factors 1 and 4 and 8192 original positions are constants there. ``window_size`` (left, right) counts the token
    itself apart: a window of W tokens, as HuggingFace counts, is (W - 1, 0). Experts are always `SequentialMLP`,
    whatever the arguments say of grouped ones: how they are multiplied is not what they are.

    Args:
        args: arguments by the names of Megatron-LM's parser (``norm_epsilon``, ``swiglu``, …).
        dtype: of the weights and the computation; float32 if None. Router corrections (``expert_bias``) are float32.

    Returns:
        One `GPTModel`, or one per virtual stage.

    Raises:
        Refused: an argument is missing, or asks for what this runtime does not compute.
    """
    cpu_patches()
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    given = as_dict(args)
    config = transformer_config(given, dtype or torch.float32)
    positions = position_embedding(given)
    state: Any = parallel_state  # whose functions have no types
    models: list[GPTModel] = []
    chunks = config.virtual_pipeline_model_parallel_size
    for chunk in range(chunks or 1):
        stage = chunk if chunks else None
        model = GPTModel(
            config,
            _layers(config, given.get("transformer_impl"), stage),
            vocab_size=given["padded_vocab_size"],
            max_sequence_length=given.get("max_position_embeddings") or 0,
            pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
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
        forget_weights(model)
        models.append(model.eval())
    return models


def _layers(config: TransformerConfig, impl: str | None, stage: int | None) -> Any:
    """The layer specification of a chunk: one for all layers, or with experts, one each.

    The down projections of multi-latent attention are cut over tensor parallel by the local spec and whole on each rank
    with Transformer Engine: megatron-core has a local module for both.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.post_training.modelopt.layers import Linear

    layers: Any
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
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            multi_latent_attention=config.multi_latent_attention,
        )
    if config.multi_latent_attention:
        for layer in layers.layer_specs if config.num_moe_experts else [layers]:
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = _any_widths()
            if impl == "transformer_engine":
                attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    return layers


def _any_widths() -> type:
    """megatron-core's DotProductAttention under the signature that its multi-latent attention calls.

    That names the widths of keys and values, which only Transformer Engine's attention accepts in 0.16.1. The local one
    takes the keys' width from the keys, the scale from its caller and the output's width from its configuration.
    """
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class AnyWidths(DotProductAttention):
        def __init__(self, config: TransformerConfig, *args: Any, v_channels: int = 0, **kwargs: Any) -> None:
            kwargs.pop("k_channels", None)
            config = copy(config)
            config.kv_channels = v_channels or config.kv_channels
            super().__init__(config, *args, **kwargs)

    return AnyWidths


def require_tokens(vocabulary: int, tokens: torch.Tensor) -> None:
    """Raise for all but a matrix of numbers below ``vocabulary``: for others, a parallel embedding answers zeros.

    Raises:
        Refused: with the shape and the numbers.
    """
    if tokens.ndim != 2 or tokens.min() < 0 or tokens.max() >= vocabulary:
        raise Refused(
            "these tokens cannot be fed to the model",
            expected=f"[batch, sequence] of numbers below {vocabulary}",
            found=f"shape {tuple(tokens.shape)}, from {int(tokens.min())} to {int(tokens.max())}",
        )


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
        Damaged: a saved buffer has NaN (`require_filled_buffers`).
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    require_filled_buffers(models)
    require_tokens(models[0].vocab_size, tokens)
    config = models[0].config
    state: Any = parallel_state  # whose functions have no types
    group = state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(group)
    stage: int = state.get_pipeline_model_parallel_rank()
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
