"""Where a tensor belongs, read from its HuggingFace name alone: its layer, its class of modules and what it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_EXPERTS: Final = re.compile(r"^(.*?\.experts)(?:\..*)?$", re.DOTALL)
_ROUTERS: Final = ("gate", "router", "wg", "router_proj", "moe_router")
_EMBEDDINGS: Final = ("wte", "wpe", "shared", "relative_attention_bias")
_HEADS: Final = ("lm_head", "output_layer", "head", "output")
#: Parts of a token predictor that no runtime quantises, listed or not: DeepSeek-V3's own checkpoint does not list them.
_PREDICTOR: Final = ("eh_proj",)
#: What vLLM holds as one matrix under a name of its own, from parts that must be in codes of one kind.
FUSED: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
#: The parts of each, and of what is one matrix inside of a layer's experts, which have a name as a whole.
FUSED_PARTS: Final = (*FUSED.values(), ("w1", "w3"))


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place.

    Attributes:
        stack: what the layers are called: ``model.layers``; "" outside of layers.
        layer: its number; -1 outside of layers.
        kind: the module's class, its name inside of a layer with ``*`` for an expert's number; a parameter that is not
            ``weight`` stays in it.
        module: the module's whole name.
        role: ``linear``, ``norm``, ``embedding``, ``head``, ``router``, ``bias`` or ``other``.
    """

    stack: str
    layer: int
    kind: str
    module: str
    role: str


def place_of(name: str, shape: tuple[int, ...]) -> Place:
    """The place of a tensor of this name and shape."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if _is_number(part) and i and "expert" not in parts[i - 1]), None)
    if at is None or at + 1 == len(parts):
        stack, layer, rest = "", -1, parts
    else:
        stack, layer, rest = ".".join(parts[:at]), int(parts[at]), parts[at + 1 :]
    rest = ["*" if _is_number(p) and i and "expert" in rest[i - 1] else p for i, p in enumerate(rest)]
    role = _role(rest, shape)
    if len(rest) > 1 and rest[-1] == "weight":
        rest = rest[:-1]
    module = name.removesuffix(".weight") if name.endswith(".weight") else name.removesuffix(".bias")
    return Place(stack, layer, ".".join(rest), module, role)


def _is_number(part: str) -> bool:
    return part.isdecimal() and part.isascii() and len(part) <= 9


def _role(parts: list[str], shape: tuple[int, ...]) -> str:
    module = parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]
    if parts[-1].endswith("bias") and "relative" not in module:
        return "bias"
    if "norm" in module.lower() or module.startswith("ln_"):
        return "norm"
    if "embed" in module or module in _EMBEDDINGS:
        return "embedding"
    if module in _HEADS:
        return "head"
    if module in _ROUTERS:
        return "router"
    matrix = len(shape) == 2 or (len(shape) == 3 and any("expert" in part for part in parts))
    return "linear" if matrix and module not in _PREDICTOR else "other"


def experts_of(module: str) -> str:
    """The module of a layer's experts that a stored module is inside of, by its stored name; "" for none."""
    found = _EXPERTS.match(module)
    return found[1] if found and found[1] != module else ""


def loaded_as(module: str) -> str:
    """The module of transformers that a stored module is a part of: it has a layer's experts in one, under ``mlp``.

    Source: ``conversion_mapping.py`` and the modules named ``experts`` in transformers 5.
    """
    module = module.replace(".block_sparse_moe.", ".mlp.")
    found = _EXPERTS.match(module)
    return found[1] if found else module
