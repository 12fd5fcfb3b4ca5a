"""EAGLE heads, which guess tokens ahead of a model: tensors of any family beside its own, moved whole and unchanged.

In a HuggingFace directory they stand at the top (EAGLE-2 of MiniCPM: ``fc``, ``input_norm1``, ``input_norm2``; EAGLE-3:
``d2t``, ``fc``, ``midlayer``, ``norm``), in Megatron under ``eagle_module`` as ModelOpt's. No config of the model says
their shapes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from dconv.arch.family import Family, Row
from dconv.arch.layouts import as_stored

_LAYER: Final = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
)
_NAMES: Final = (
    "fc.weight", "fc.bias", "input_norm1.weight", "input_norm2.weight", "norm.weight", "d2t", "t2d",
    *(f"midlayer.{name}" for name in _LAYER),
)  # fmt: skip
#: Differences of token numbers, no weights.
_INDICES: Final = ("d2t", "t2d")
_MEGATRON: Final = "eagle_module."
_REASON: Final = "of an EAGLE head: --with-eagle keeps it"


def kept(family: Family) -> Family:
    """The family with a row for each tensor of a head; it exists where the tensor does."""
    rows = tuple(
        Row(_MEGATRON + name, name, as_stored(), when=f"eagle {name}", keeps=name in _INDICES) for name in _NAMES
    )
    return replace(family, rows=family.rows + rows)


def left_out(family: Family) -> Family:
    """The family that leaves a head's tensors out, each by its name."""
    names = (*_NAMES, *(_MEGATRON + name for name in _NAMES))
    return replace(family, recomputed=family.recomputed + tuple((name, _REASON) for name in names))
