"""LLaVAModel of megatron-core from the arguments that a converted checkpoint says, and its logits of an image and text.

Megatron-LM's examples take the tower's sizes from ``vision_model_type``; here the arguments of their own say them
(`dconv.arch.llava`). All in one pipeline stage, with local layers.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from dconv.errors import Refused
from dconv.export.megatron_config import as_dict, position_embedding, transformer_config
from dconv.export.megatron_cpu import cpu_patches
from dconv.export.megatron_weights import Args, forget_weights

_SIZES = (
    "vision_num_layers", "vision_hidden_size", "vision_ffn_hidden_size", "vision_num_attention_heads",
    "vision_norm_epsilon", "vision_model_type", "img_h", "img_w", "patch_dim", "image_token_index",
    "max_position_embeddings",
)  # fmt: skip


def build_llava(args: Args, *, dtype: Any = None) -> list[Any]:
    """The model of this rank in the running `parallel_world` of one pipeline stage, weights all NaN; local layers.

    Args:
        args: as for `dconv.export.megatron_gpt.build_gpt`, and those of the tower (`dconv.arch.llava`).
        dtype: torch's, of the weights and the computation; float32 if None.

    Returns:
        One `LLaVAModel`.

    Raises:
        Refused: an argument is missing, or asks for what this runtime does not compute, or pp is more than 1.
    """
    cpu_patches()
    import torch
    from megatron.core import parallel_state
    from megatron.core.activations import quick_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision import clip_vit_model, vit_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise Refused("LLaVA runs here in one pipeline stage", found="pp > 1")
    given = as_dict(args)
    lacking = [name for name in _SIZES if given.get(name) is None]
    if lacking:
        raise Refused("Megatron arguments are missing", where="args", expected=", ".join(lacking))
    language = transformer_config(given, dtype or torch.float32)
    vision = copy(language)
    sizes = {
        "num_layers": given["vision_num_layers"],
        "hidden_size": given["vision_hidden_size"],
        "ffn_hidden_size": given["vision_ffn_hidden_size"],
        "num_attention_heads": given["vision_num_attention_heads"],
        "num_query_groups": given["vision_num_attention_heads"],
        "kv_channels": given["vision_hidden_size"] // given["vision_num_attention_heads"],
        "layernorm_epsilon": given["vision_norm_epsilon"],
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": False,
        "activation_func": quick_gelu,
        "window_size": None,
        "vision_model_type": given["vision_model_type"],
    }
    for name, value in sizes.items():
        setattr(vision, name, value)
    projection = copy(language)
    projection.ffn_hidden_size, projection.gated_linear_unit = language.hidden_size, False
    projection.add_bias_linear = given.get("vision_projection_bias", True)
    projection.activation_func = torch.nn.functional.gelu
    layer: Any = vit_layer_specs.get_vit_layer_with_local_spec()
    # as Transformer Engine's spec of the same layer has it: an image is seen whole
    layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    made: Any = clip_vit_model.CLIPViTModel.__init__  # without Transformer Engine its norm is one that takes no config
    made.__defaults__ = tuple(WrappedTorchNorm if it is torch.nn.LayerNorm else it for it in made.__defaults__)
    projector: Any = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    model: Any = LLaVAModel(
        language,
        get_gpt_layer_local_spec(normalization=language.normalization),
        given["padded_vocab_size"],
        given["max_position_embeddings"],
        vision,
        layer,
        drop_vision_class_token=given.get("disable_vision_class_token", False),
        vision_projection_config=projection,
        vision_projection_layer_spec=projector,
        parallel_output=False,
        share_embeddings_and_output_weights=not given.get("untie_embeddings_and_output_weights", False),
        language_position_embedding_type=position_embedding(given),
        img_h=given["img_h"],
        img_w=given["img_w"],
        patch_dim=given["patch_dim"],
        language_rotary_base=given.get("rotary_base", 10000),
        language_rotary_percent=given.get("rotary_percent", 1.0),
        language_rope_scaling=given.get("use_rope_scaling", False),
        language_rope_scaling_factor=given.get("rope_scaling_factor", 8.0),
        image_token_index=given["image_token_index"],
    )
    forget_weights(model)
    return [model.eval()]


def llava_logits(models: list[Any], tokens: Any, image: Any) -> Any:
    """Logits float32 [batch, sequence with a place for each patch, padded vocabulary]; every rank calls it.

    Args:
        models: from `build_llava`.
        tokens: int64 [batch, sequence], where each row has one place for the image.
        image: float32 [1, channels, height, width].
    """
    import torch

    (model,) = models
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        output = model(image, tokens, positions, None)
    held: Any = output  # not narrowed: what a tuple has is of any type
    return (held[0] if isinstance(output, tuple) else held).float()
