"""megatron-core's own MambaModel on a CPU: its modules, its sharding and its forward pass, with kernels in torch.

What it takes from mamba_ssm and einops (a gated norm, one scan, three transpositions) is here in torch, after the
definitions that those give: a state a head, ``h = exp(dt A) h + dt B x`` and ``y = C h + D x``, gated by ``silu(z)``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F


class RMSNorm(torch.nn.Module):
    """Over groups of channels, after the gate."""

    def __init__(self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: Any):
        super().__init__()
        assert not norm_before_gate
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        return (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


def scan(
    zxbcdt: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor, dt_bias: torch.Tensor, a: torch.Tensor,
    *, D: torch.Tensor, headdim: int, ngroups: int, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """``mamba_split_conv1d_scan_combined``: [batch, length, z x B C dt] to [batch, length, channels]."""
    heads, inner = len(a), len(a) * headdim
    z, xbc, dt = zxbcdt.split([inner, len(conv_weight), heads], -1)
    width = conv_weight.shape[-1]
    padded = F.pad(xbc.transpose(1, 2), (width - 1, 0))
    xbc = F.silu(F.conv1d(padded, conv_weight[:, None], conv_bias, groups=len(conv_weight))).transpose(1, 2)
    each = (len(conv_weight) - inner) // 2
    x, b, c = xbc.split([inner, each, each], -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for part in (b, c))
    dt = F.softplus(dt + dt_bias)
    state = torch.zeros(*x[:, 0].shape, b.shape[-1])
    out = []
    for t in range(x.shape[1]):
        kept = torch.exp(dt[:, t] * a)[..., None, None] * state
        state = kept + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        out.append((state * c[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(out, 1).flatten(2) * F.silu(z)


def rearrange(x: torch.Tensor, pattern: str) -> torch.Tensor:
    if pattern == "d 1 w -> d w":
        return x.squeeze(1)
    assert pattern in ("l b d -> b l d", "b l d -> l b d")
    return x.transpose(0, 1)


def stand_in() -> None:
    """Put the above where megatron-core looks for mamba_ssm and einops. To be called before it is imported."""
    names = {
        "mamba_ssm": {}, "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_split_conv1d_scan_combined": scan, "mamba_chunk_scan_combined": None,
        },
        # imported for generation only; needs triton
        "megatron.core.inference.contexts.attention_context.triton.tensor_ops": dict.fromkeys(
            ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")
        ),
        "einops": {"rearrange": rearrange, "repeat": None},
    }  # fmt: skip
    for name, members in names.items():
        sys.modules[name] = module = ModuleType(name)
        module.__dict__.update(members)


def build(args: Mapping[str, Any]) -> list[Any]:
    """The model of this rank in the running `parallel_world`, weights all NaN; layers of its local (ModelOpt) spec."""
    from megatron.core import parallel_state
    from megatron.core.models.mamba import MambaModel
    from megatron.core.post_training.modelopt.mamba import model_specs
    from megatron.core.ssm import mamba_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from dconv.export.megatron_config import transformer_config
    from dconv.export.megatron_weights import forget_weights

    model_specs.Norm = mamba_block.TENorm = WrappedTorchNorm  # theirs is Transformer Engine's
    config = transformer_config(args, torch.float32)
    config.is_hybrid_model = True
    for name in ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"):
        setattr(config, name, args[name])
    model = MambaModel(
        config,
        model_specs.get_mamba_stack_modelopt_spec(local_core_attention=True, remap_te_layernorm=True),
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=256,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        hybrid_override_pattern=args["hybrid_override_pattern"],
        parallel_output=False,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"],
        rotary_percent=args.get("rotary_percent", 1.0),
        rotary_base=args.get("rotary_base", 10000),
    )
    forget_weights(model)
    return [model.eval()]
