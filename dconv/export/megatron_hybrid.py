"""Hybrids (MambaModel) of megatron-core from Megatron arguments: its modules, sharding and forward pass on a CPU.

What it takes from mamba_ssm and einops (a gated norm, one scan, three transpositions) runs on a GPU only. It is here in
torch, after the definitions that those give: a state a head, ``h = exp(dt A) h + dt B x`` and ``y = C h + D x``, gated
by ``silu(z)``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from dconv.errors import Refused, ToolMissing
from dconv.export.megatron_config import as_dict, position_embedding, transformer_config
from dconv.export.megatron_cpu import cpu_patches
from dconv.export.megatron_weights import Args, forget_weights

_SIZES = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads")


class RMSNorm(torch.nn.Module):
    """Root mean square norm over groups of channels, behind the gate, which `scan` has applied by then.

    Source: mamba_ssm, ``ops/triton/layernorm_gated.py``, ``rms_norm_ref`` with a ``group_size`` and without ``z``.
    """

    def __init__(self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: Any):
        super().__init__()
        if norm_before_gate:
            raise _unknown("a norm before the gate")
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, channels] to the same, each group of ``group_size`` channels by itself."""
        groups = torch.unflatten(x, -1, (-1, self.group_size))
        return (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


def scan(
    zxbcdt: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor, dt_bias: torch.Tensor, a: torch.Tensor,
    *, headdim: int, ngroups: int, **further: Any,
) -> torch.Tensor:  # fmt: skip
    """``mamba_split_conv1d_scan_combined``: [batch, length, z x B C dt] to [batch, length, channels].

    Source: mamba_ssm, ``ops/triton/ssd_combined.py``, ``mamba_split_conv1d_scan_ref`` without ``rmsnorm_weight``.

    Args:
        zxbcdt: gate, input, B and C of each group and step of each head, one behind the other in the last axis.
        conv_weight: [channels of x, B and C, width], of a convolution of each channel by itself.
        conv_bias: of these channels.
        dt_bias: [heads].
        a: [heads], negative.
        headdim: channels of a head.
        ngroups: groups of heads that share B and C.
        further: ``D`` [heads]; the other arguments say how a GPU computes the same.
    """
    heads, inner = len(a), len(a) * headdim
    z, xbc, dt = torch.split(zxbcdt, [inner, len(conv_weight), heads], -1)
    width = conv_weight.shape[-1]
    padded = functional.pad(xbc.transpose(1, 2), (width - 1, 0))
    xbc = functional.silu(
        functional.conv1d(padded, conv_weight[:, None], conv_bias, groups=len(conv_weight))
    ).transpose(1, 2)
    each = (len(conv_weight) - inner) // 2
    x, b, c = torch.split(xbc, [inner, each, each], -1)
    x = torch.unflatten(x, -1, (heads, headdim))
    b, c = (torch.unflatten(part, -1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for part in (b, c))
    dt = functional.softplus(dt + dt_bias)
    state = torch.zeros(*x[:, 0].shape, b.shape[-1])
    out: list[torch.Tensor] = []
    for t in range(x.shape[1]):
        kept = torch.exp(dt[:, t] * a)[..., None, None] * state
        state = kept + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        out.append((state * c[:, t, :, None]).sum(-1) + further["D"][:, None] * x[:, t])
    return torch.stack(out, 1).flatten(2) * functional.silu(z)


def rearrange(x: torch.Tensor, pattern: str) -> torch.Tensor:
    """``einops.rearrange`` for the three patterns that megatron-core's mixers ask for.

    Raises:
        ToolMissing: another pattern.
    """
    if pattern == "d 1 w -> d w":
        return x.squeeze(1)
    if pattern not in ("l b d -> b l d", "b l d -> l b d"):
        raise _unknown(f"rearrange {pattern!r:.80}")
    return x.transpose(0, 1)


def _unknown(what: str) -> ToolMissing:
    """Of a megatron-core that asks mamba_ssm or einops for more than the one that this was written after."""
    return ToolMissing(
        "this megatron-core's mixers ask for what is not computed on a CPU here", found=what, expected="as 0.16.1 does"
    )


def stand_in() -> None:
    """Put the above where megatron-core looks for mamba_ssm and einops. To be called before it is imported."""
    names: dict[str, dict[str, Any]] = {
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


def build_hybrid(args: Args, *, dtype: torch.dtype | None = None) -> list[Any]:
    """This rank's stage of a stack of Mamba and other layers in the running `parallel_world`, weights all NaN.

    Arguments as for `dconv.export.megatron_gpt.build_gpt`, and hybrid_override_pattern and the mixer's sizes
    (mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim). Layers are of megatron-core's local (ModelOpt)
    specification. `stand_in` must have been called where mamba_ssm is not installed.

    Returns:
        One `MambaModel`, for `dconv.export.megatron_gpt.logits`; megatron-core has no virtual stages for it.

    Raises:
        Refused: an argument is missing, or asks for what this runtime does not compute.
    """
    cpu_patches()
    from megatron.core import parallel_state
    from megatron.core.models.mamba import MambaModel
    from megatron.core.post_training.modelopt.mamba import model_specs
    from megatron.core.ssm import mamba_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    given = as_dict(args, hybrid=True)
    lacking = [name for name in (*_SIZES, "hybrid_override_pattern") if given.get(name) is None]
    if lacking:
        raise Refused("Megatron arguments are missing", where="args", expected=", ".join(lacking))
    model_specs.Norm = mamba_block.TENorm = WrappedTorchNorm  # theirs is Transformer Engine's
    config = transformer_config(given, dtype or torch.float32)
    if config.virtual_pipeline_model_parallel_size:
        raise Refused("megatron-core has no virtual stages for hybrids", found="vpp > 1", do="run it with vpp 1")
    config.is_hybrid_model = True
    for name in _SIZES:
        setattr(config, name, given[name])
    state: Any = parallel_state  # whose functions have no types
    positions: Any = position_embedding(given)
    model: Any = MambaModel(
        config,
        model_specs.get_mamba_stack_modelopt_spec(local_core_attention=True, remap_te_layernorm=True),
        vocab_size=given["padded_vocab_size"],
        max_sequence_length=given.get("max_position_embeddings") or 0,
        pre_process=state.is_pipeline_first_stage(),
        post_process=state.is_pipeline_last_stage(),
        hybrid_override_pattern=given["hybrid_override_pattern"],
        parallel_output=False,
        share_embeddings_and_output_weights=not given.get("untie_embeddings_and_output_weights", False),
        position_embedding_type=positions,
        rotary_base=given.get("rotary_base") or 10000,
        rotary_percent=given.get("rotary_percent") or 1.0,
    )
    forget_weights(model)
    return [model.eval()]
