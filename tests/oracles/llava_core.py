"""megatron-core's own LLaVAModel on a CPU, from the args that a converted checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch


def build(args: Mapping[str, Any]) -> list[Any]:
    """The model of this rank in the running `parallel_world` of one pipeline stage, weights all NaN; local layers."""
    from megatron.core.activations import quick_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision import clip_vit_model, vit_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from dconv.export.megatron_config import transformer_config
    from dconv.export.megatron_weights import forget_weights

    language = transformer_config(args, torch.float32)
    vision = copy(language)
    sizes = {
        "num_layers": args["vision_num_layers"],
        "hidden_size": args["vision_hidden_size"],
        "ffn_hidden_size": args["vision_ffn_hidden_size"],
        "num_attention_heads": args["vision_num_attention_heads"],
        "num_query_groups": args["vision_num_attention_heads"],
        "kv_channels": args["vision_hidden_size"] // args["vision_num_attention_heads"],
        "layernorm_epsilon": args["vision_norm_epsilon"],
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": False,
        "activation_func": quick_gelu,
    }
    for name, value in sizes.items():
        setattr(vision, name, value)
    vision.vision_model_type = args["vision_model_type"]  # type: ignore[attr-defined]
    projection = copy(language)
    projection.ffn_hidden_size, projection.gated_linear_unit = language.hidden_size, False
    projection.add_bias_linear = args["vision_projection_bias"]
    projection.activation_func = torch.nn.functional.gelu
    layer: Any = vit_layer_specs.get_vit_layer_with_local_spec()
    # as Transformer Engine's spec of the same layer has it: an image is seen whole
    layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    made: Any = clip_vit_model.CLIPViTModel.__init__  # without Transformer Engine its norm is one that takes no config
    made.__defaults__ = tuple(WrappedTorchNorm if it is torch.nn.LayerNorm else it for it in made.__defaults__)
    model = LLaVAModel(
        language,
        get_gpt_layer_local_spec(normalization=language.normalization),
        args["padded_vocab_size"],
        256,
        vision,
        layer,
        drop_vision_class_token=args["disable_vision_class_token"],
        vision_projection_config=projection,
        vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        parallel_output=False,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        language_position_embedding_type=args["position_embedding_type"],
        img_h=args["img_h"],
        img_w=args["img_w"],
        patch_dim=args["patch_dim"],
        language_rotary_base=args["rotary_base"],
        image_token_index=args["image_token_index"],
    )
    forget_weights(model)
    return [model.eval()]


def logits(models: list[Any], tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] where each row of ``tokens`` has one place for the image."""
    (model,) = models
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        output = model(image, tokens, positions, None)
    return (output[0] if isinstance(output, tuple) else output).float()
