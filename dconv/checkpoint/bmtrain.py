"""BMTrain's and ModelCenter's flat state dicts of Llama and MiniCPM, with a config.json in their keys.

The weights are HuggingFace's under other names, in the same order and with the same rotation (``RotaryEmbeddingESM``
rotates halves). Source of the names: ``model_center/layer/`` (attention, feedforward, blocks, transformer).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from dconv.arch import bmtrain
from dconv.arch.family import TIED_HEAD, Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import huggingface, state_dict
from dconv.checkpoint.pt import whole_tensor
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Side, Source, seal, side_bytes, side_files
from dconv.errors import Damaged, DconvError, Refused, group_names
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.plan import Target
from dconv.sharding.tensor import Stored, TensorSpec

_FILE: Final = "pytorch_model.pt"
#: BMTrain's module -> HuggingFace's.
_TOP: Final = {
    "input_embedding": "model.embed_tokens",
    "encoder.output_layernorm": "model.norm",
    "output_projection": "lm_head",
}
#: The same below ``encoder.layers.N`` and ``model.layers.N``.
_IN_LAYER: Final = {
    "self_att.layernorm_before_attention": "input_layernorm",
    "self_att.self_attention.project_q": "self_attn.q_proj",
    "self_att.self_attention.project_k": "self_attn.k_proj",
    "self_att.self_attention.project_v": "self_attn.v_proj",
    "self_att.self_attention.attention_out": "self_attn.o_proj",
    "ffn.layernorm_before_ffn": "post_attention_layernorm",
    "ffn.ffn.w_in.w_0": "mlp.gate_proj",
    "ffn.ffn.w_in.w_1": "mlp.up_proj",
    "ffn.ffn.w_out": "mlp.down_proj",
}
_NAME: Final = re.compile(r"(?:encoder\.layers\.(\d{1,9})\.)?(.+)\.(weight|bias)")
_HF_NAME: Final = re.compile(r"(?:model\.layers\.(\d{1,9})\.)?(.+)\.(weight|bias)")
_MODULE_OF: Final = {hf: module for module, hf in (_TOP | _IN_LAYER).items()}
_DTYPES: Final = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}


def to_hf_name(name: str) -> str:
    """HuggingFace's name, or BMTrain's own where there is none."""
    match = _NAME.fullmatch(name)
    module = None if match is None else (_TOP if match[1] is None else _IN_LAYER).get(match[2])
    if match is None or module is None:
        return name
    return f"model.layers.{match[1]}.{module}.{match[3]}" if match[1] else f"{module}.{match[3]}"


def from_hf_name(name: str) -> str | None:
    """BMTrain's name, or None where it has no place for such a tensor."""
    match = _HF_NAME.fullmatch(name)
    module = None if match is None else _MODULE_OF.get(match[2])
    if match is None or module is None or (module in _TOP) != (match[1] is None):
        return None
    return f"encoder.layers.{match[1]}.{module}.{match[3]}" if match[1] else f"{module}.{match[3]}"


def has_form(family: Family, facts: Facts, config: Mapping[str, object]) -> bool:
    """Whether BMTrain has a place for every tensor of a model, and a key for all that its config says: `lay_out`."""
    names = (spec.name for entry in family.samples(facts) for spec in entry.fused.specs)
    if not all(map(from_hf_name, names)):
        return False
    try:
        bmtrain.from_hf(family, facts, config, "bf16")
    except DconvError:
        return False
    return True


def open_source(path: Path, *, own_config: bool = True, rename: Renaming = AS_STORED) -> Source:
    """Describe a state dict of BMTrain's names: a file, or the one in a directory.

    Args:
        path: the file, or the directory that has one.
        own_config: translate the config.json beside it; False leaves the config to ``--hf-config``.
        rename: gives the stored tensors other names before they are looked at.

    Raises:
        Damaged: no such file, one that is torn, or a config with a missing or impossible value.
        Refused: a config that says neither Llama nor MiniCPM.
    """
    found = state_dict.read(path, rename)
    folder, file = found.path.parent, found.path.name
    tensors = {to_hf_name(name): tensor for name, tensor in found.tensors.items()}
    if len(tensors) < len(found.tensors):
        both = [name for name in found.tensors if to_hf_name(name) != name and to_hf_name(name) in found.tensors]
        raise Damaged(
            "tensors under BMTrain's and HuggingFace's names at once",
            where=f"{group_names(both)}\nin {found.path}",
            expected="one of the two",
        )
    config = huggingface.read_config(folder) if own_config else None
    if config is not None and bmtrain.is_bmtrain(config):
        config = _config(config, tensors)
    side = {name: beside for name, beside in side_files(folder).items() if name != "config.json"}
    return huggingface.source_of(folder, [{file: tensors}], {file: found.stamp}, config, side, "bmtrain")


def _config(config: Mapping[str, object], tensors: Mapping[str, Stored]) -> dict[str, object]:
    shapes = {name: stored.spec.shape for name, stored in tensors.items()}
    shown = bmtrain.sizes_shown(shapes, config.get("num_heads"))
    embedding = tensors.get("model.embed_tokens.weight") or next(iter(tensors.values()))
    dtype = TO_TORCH[embedding.spec.dtype]
    return bmtrain.to_hf(config, shown, tied=TIED_HEAD not in tensors, dtype=dtype)


def lay_out(
    family: Family,
    facts: Facts,
    specs: Mapping[str, TensorSpec],
    *,
    config: Mapping[str, object],
    side: Side,
    left_out: dict[str, str],
) -> Target:
    """``pytorch_model.pt`` and a config.json in BMTrain's keys, with the side files beside.

    Args:
        family: the model's.
        facts: what config and tensors tell of the model.
        specs: the logical tensors as they are to be written.
        config: HuggingFace's config.json.
        side: files that travel with the model, by name.
        left_out: stored tensors that are not written, each with the reason.

    Raises:
        Refused: tensors or properties that BMTrain has no name for.
    """
    names = {name: from_hf_name(name) for name in specs}
    foreign = [name for name, theirs in names.items() if theirs is None]
    if foreign:
        raise Refused(
            f"BMTrain has no place for {len(foreign)} of {len(specs)} tensors of {family.name}, nothing was written",
            where=group_names(foreign),
            expected="what a Llama or a MiniCPM has",
        )
    common = max(dtypes := [spec.dtype for spec in specs.values()], key=dtypes.count)
    theirs = bmtrain.from_hf(family, facts, config, _DTYPES.get(common, common))
    tensors = [whole_tensor(spec, names[name] or "") for name, spec in specs.items()]
    file, placed = state_dict.lay_out_file(_FILE, tensors)
    beside = {name: path for name, path in side.items() if name != "config.json"}

    def closing() -> Iterable[tuple[str, bytes]]:
        return side_bytes(theirs, beside)

    return Target((file,), tuple(placed), closing, seal(theirs, beside), 1, left_out)
