"""Megatron's names: layers numbered by stage or by model, two layer specs, five spellings of an expert.

The canonical name is TransformerEngine's with global numbers, an expert's being ``….experts.{number}.linear_fc1.…``.
Sources: ``sharded_state_dict_keys_map`` in ``megatron/core/models/gpt/gpt_layer_specs.py`` and in
``megatron/core/post_training/modelopt/mamba/model_specs.py``;
``megatron/core/transformer/moe/experts.py`` and its forebears.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from dconv.errors import Damaged

#: The output layer; a tied model's last stage keeps its copy of the embedding under this name.
HEAD: Final = "output_layer.weight"

#: Below a layer: TransformerEngine's name -> the local layer spec's.
_LOCAL_SPEC: Final = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
    "mixer.in_proj.layer_norm_weight": "norm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
#: The other way, and names of newer versions. A layer has one of the two, so that either may stand for the other.
_OTHER: Final = {
    **_LOCAL_SPEC,
    **{local: te for te, local in _LOCAL_SPEC.items()},
    "mixer.conv1d.weight": "mixer.conv1d_weight",
    "mixer.conv1d.bias": "mixer.conv1d_bias",
}
#: Latent attention's projections, which some trainers of MiniCPM call by half a name.
_HALF_NAMED: Final = re.compile(r"(self_attention\.linear_(?:q|kv)_(?:up|down))_proj(\..+)")
#: Norms that the local spec saves in torch_dist as if they were fused, whatever follows them.
_SAVED_AS_FUSED: Final = {
    local: te for te, local in _LOCAL_SPEC.items() if local.startswith(("input_layernorm", "pre_mlp_layernorm", "norm"))
}

#: The decoder layer inside a token predictor, now and from 2026 on.
_INNER: Final = (".transformer_layer.", ".mtp_model_layer.")

#: Layers that a pipeline stage numbers from 0.
_LAYER: Final = re.compile(r"((?:language_model\.)?(?:decoder|encoder)\.layers\.)(\d{1,9})\.(.+)")
#: Those, the layers of a vision tower, which is no part of the pipeline, and the one inside a token predictor.
_ANY_LAYER: Final = re.compile(
    r"((?:language_model\.|vision_model\.)?(?:decoder|encoder)\.layers\.\d{1,9}\."
    r"|mtp\.layers\.\d{1,9}\.(?:transformer_layer|mtp_model_layer)\.)(.+)"
)
_CANONICAL: Final = re.compile(r"(.+\.experts\.)(\d{1,6})\.(.+)")
_SEQUENTIAL: Final = re.compile(r"(.+\.experts\.)local_experts\.(\d{1,6})\.(.+)")
_GROUPED: Final = re.compile(r"(.+\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d{1,6})")
_SINGLE: Final = re.compile(r"(.+\.experts\.)experts\.(\d{1,6})\.(.+)")


def head_beside(embedding: str) -> str:
    """The name of the output layer of a model whose embedding has this name."""
    return embedding.removesuffix("embedding.word_embeddings.weight") + HEAD


def local_name(name: str) -> str:
    """The local layer spec's spelling of a canonical name."""
    match = _ANY_LAYER.fullmatch(name)
    return name if match is None else match[1] + _LOCAL_SPEC.get(match[2], match[2])


def local_key(name: str) -> str:
    """The name under which a model of the local layer spec saves a canonical name in torch_dist.

    Not with latent attention: such layers have no ``sharded_state_dict_keys_map`` and save what `local_name` says.
    """
    match = _ANY_LAYER.fullmatch(name)
    if match is None:
        return name
    inner = _LOCAL_SPEC.get(match[2], match[2])
    return match[1] + _SAVED_AS_FUSED.get(inner, inner)


def spellings(name: str) -> tuple[str, ...]:
    """A canonical name, and others that may stand for it."""
    match = _ANY_LAYER.fullmatch(name)
    if match is None:
        return (name,)
    inner = [match[2]] + ([_OTHER[match[2]]] if match[2] in _OTHER else [])
    inner += [f"{half[1]}{half[2]}" for known in inner if (half := _HALF_NAMED.fullmatch(known))]
    before = dict.fromkeys(match[1].replace(_INNER[0], called, 1) for called in _INNER)
    return tuple(f"{layer}{known}" for layer in before for known in inner)


def renumber(name: str, layers: range) -> str:
    """A chunk's local layer number made global.

    Raises:
        Damaged: the chunk has more layers than its stage holds.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    local = int(match[2])
    if local >= len(layers):
        raise Damaged("a layer number is outside its pipeline stage", where=name, expected=f"below {len(layers)}")
    return f"{match[1]}{layers[local]}.{match[3]}"


def local_layers(names: Iterable[str]) -> int:
    """How many layers a chunk holds.

    Raises:
        Damaged: the numbers have a gap.
    """
    numbers = {int(match[2]) for name in names if (match := _LAYER.fullmatch(name))}
    if numbers != set(range(len(numbers))):
        expected = f"layers 0 to {max(numbers)}"
        raise Damaged("a pipeline stage lacks layers", expected=expected, found=str(sorted(numbers)))
    return len(numbers)


def expert(prefix: str, number: int, rest: str) -> str:
    """An expert's canonical name; ``prefix`` ends in ``experts.``."""
    return f"{prefix}{number}.{rest}"


def parse_expert(name: str) -> tuple[str, int, str] | None:
    """(prefix, number, rest) of an expert's tensor as `SequentialMLP` and `TEGroupedMLP` name it; number is local."""
    if match := _SEQUENTIAL.fullmatch(name):
        return match[1], int(match[2]), match[3]
    if match := _GROUPED.fullmatch(name):
        return match[1], int(match[3]), match[2]
    return None


def parse_single(name: str) -> tuple[str, int, str] | None:
    """The same for a torch_dist key of one expert (``singleton_local_shards``); number is global."""
    match = _SINGLE.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def sequential(name: str) -> str:
    """A canonical name as `SequentialMLP` spells it."""
    match = _CANONICAL.fullmatch(name)
    return f"{match[1]}local_experts.{match[2]}.{match[3]}" if match else name


def grouped(name: str) -> str:
    """A canonical name as `TEGroupedMLP` spells it."""
    match = _CANONICAL.fullmatch(name)
    return f"{match[1]}{match[3]}{match[2]}" if match else name


def is_state(name: str) -> bool:
    """TransformerEngine's extra state: FP8 bookkeeping that carries no weights."""
    return name.endswith("_extra_state") or "._extra_state" in name
