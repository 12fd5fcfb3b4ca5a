"""EAGLE heads, which guess tokens ahead of a model: tensors of any family beside its own, moved whole and unchanged.

In a HuggingFace directory they stand at the top, in Megatron under ``eagle_module`` as ModelOpt's. No config of the
model says their shapes. Sources: SafeAILab's ``cnets1.py`` (EAGLE and EAGLE-2: ``fc``, one layer without an opening
norm, a copy of the embedding) and ``cnets.py`` (EAGLE-3: ``d2t``, ``fc``, ``midlayer``, ``norm``); SGLang's
``MiniCPMMTP`` and OpenBMB's CPM.cu for MiniCPM4's (EAGLE-2 with ``input_norm1``, ``input_norm2`` and the opening norm).
EAGLE-3's own ``lm_head``, of fewer tokens, has the name of the model's: such a file cannot stand beside it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from dconv.arch.family import Family, Row
from dconv.arch.layouts import as_stored
from dconv.errors import Refused

_LAYER: Final = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"self_attn.{name}_proj.bias" for name in "qkv"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
)
_NAMES: Final = (
    "fc.weight", "fc.bias", "input_norm1.weight", "input_norm2.weight", "norm.weight", "d2t", "t2d",
    "embed_tokens.weight", *(f"{layer}.{name}" for layer in ("midlayer", "layers.0") for name in _LAYER),
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


def refuse_alone(names: Collection[str], where: str) -> None:
    """Refuse a directory that has a head and not the model that it belongs to: as heads are published.

    Raises:
        Refused: every stored tensor is of a head.
    """
    if "fc.weight" in names and all(name in (*_NAMES, "lm_head.weight") for name in names):
        raise Refused(
            "an EAGLE head without its model, nothing was written",
            where=where,
            expected="the model's tensors beside the head's",
            found=f"{len(names)} tensors, all of a head",
            do="put the head's file beside the model's, name both in model.safetensors.index.json, add --with-eagle",
        )
