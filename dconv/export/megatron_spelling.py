"""Two spellings of one model: those of megatron-core's local modules and of Transformer Engine, Megatron-LM's default.

The judge computes with local modules, while most checkpoints carry the other names: Transformer Engine fuses norms
into the linear layer that follows, except before experts, and multiplies all experts of a rank at once (one module,
``weight0``, ``weight1`` …). Only names differ, never a value or a shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedBase

_LAYER: Final = re.compile(r"^(?:.*\.)?layers(?:\.\d+)?\.")
_EXPERT: Final = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$")
_GROUPED: Final = re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")

# a norm of its own, and the linear layer that Transformer Engine fuses it into
_NORMS: Final = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".self_attention.q_layernorm.", ".self_attention.linear_q_up_proj.layer_norm_"),
    (".self_attention.kv_layernorm.", ".self_attention.linear_kv_up_proj.layer_norm_"),
    (".norm.", ".mixer.in_proj.layer_norm_"),
)


def to_local(key: str) -> str:
    """A name of a legacy file as the local spec has it."""
    for alone, fused in _NORMS:
        key = _swap(key, fused, alone)
    return _GROUPED.sub(r".experts.local_experts.\3.\1.\2", key)


def to_fused(keys: Iterable[str], *, grouped: bool) -> dict[str, str]:
    """Names, in whichever spelling → those of Transformer Engine; ``grouped`` with all experts in one module."""
    local = {key: to_local(key) for key in keys}
    linears = {(layer[0], key[layer.end() :]) for key in local.values() if (layer := _LAYER.search(key))}
    return {key: _fused(name, linears, grouped) for key, name in local.items()}


def _fused(key: str, linears: Collection[tuple[str, str]], grouped: bool) -> str:
    if grouped:
        key = _EXPERT.sub(r".experts.\2.\3\1", key)
    layer = _LAYER.search(key)
    for alone, fused in _NORMS:
        linear = fused.rpartition(".")[0].removeprefix(".") + ".weight"  # none before experts and latent attention
        if (spelled := _swap(key, alone, fused)) != key and layer and (layer[0], linear) in linears:
            return spelled
    return key


def _swap(key: str, old: str, new: str) -> str:
    """A name with one part of it spelled otherwise; a mixer's own norm is not the one before the mixer."""
    return re.sub(rf"(?<!\.mixer){re.escape(old)}", new, key)


def as_saved(keys: Collection[str], saved: Collection[str]) -> Mapping[str, str]:
    """For each of ``keys`` that ``saved`` lacks, the other spelling, if ``saved`` has that."""
    found: dict[str, str] = {}
    for key in keys:
        others = (_swap(key, a, b) for names in _NORMS for a, b in (names, names[::-1]) if a in key)
        if key not in saved and (other := next((name for name in others if name in saved), None)):
            found[key] = other
    return found


def rename(sharded: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give the pieces of a sharded state dict other global names, in place; those that are not named keep theirs."""
    for piece in pieces(sharded):
        piece.key = names.get(piece.key, piece.key)


def global_names(sharded: dict[str, Any]) -> list[str]:
    """Global names of the pieces of a sharded state dict, in its order."""
    return [piece.key for piece in pieces(sharded)]


def pieces(sharded: dict[str, Any]) -> Iterator[ShardedBase]:
    """What a sharded state dict says of its tensors and objects, however deep they lie."""
    from megatron.core.dist_checkpointing import dict_utils
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    tree: Any = dict_utils  # whose functions have no types
    for value in tree.nested_values(sharded):
        if isinstance(value, ShardedBase):
            yield value
