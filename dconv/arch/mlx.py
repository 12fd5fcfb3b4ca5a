"""MLX's names and shapes: which tensor of an mlx-lm model is made of which of HuggingFace's.

For most families the names are HuggingFace's own. What differs is what each ``sanitize`` of mlx-lm does to them:

- experts are one tensor a layer, [experts, out, in], under ``switch_mlp`` (Mixtral's w1, w3, w2 are gate, up, down);
- DeepSeek-V3's ``kv_b_proj`` is two tensors by head: ``embed_q``, transposed, and ``unembed_out``;
- gpt-oss's experts are [out, in], gate and up apart;
- an output layer that is tied to the embedding is left out where the model can do without, and is a copy of the
  embedding where mlx-lm's class always has one, or scales the head's input only there (MiniCPM);
- token predictors are left out.

In codes is what ``mlx_lm.quantize_model`` takes: every ``Linear``, ``Embedding``, ``SwitchLinear`` and ``MultiLinear``.
A router that is a matrix in a class of its own stays as it is, and some families hold some layers in 8 bits whatever is
asked for (``quant_predicate``).

Source: mlx-lm 0.32.2, ``utils.py`` and ``models/*.py``. A family stands here when its class was read and its logits
were compared with transformers' (`tests/formats/mlx_check.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from dconv.arch.family import Family
from dconv.arch.layouts import Facts, size
from dconv.errors import Refused, group_names
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Slot, TensorSpec

#: How ``--quant`` holds a tensor: as asked for, in 8 bits and groups of 64, or not in codes.
Coding = Literal["usual", "eight", "plain"]


@dataclass(frozen=True, slots=True)
class MlxModel:
    """What mlx-lm's class of a family has.

    Attributes:
        head: the output layer: ``either`` (left out when tied), ``own`` (always there), ``tied`` (never).
        biases: ends of the names of biases that the class has, beside norms'.
        plain: ends of modules that are no linear layers to MLX, though matrices.
        eight: ends of modules that are held in 8 bits.
        experts: HuggingFace's names of an expert's matrices, and MLX's.
    """

    head: Literal["either", "own", "tied"] = "either"
    biases: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    eight: tuple[str, ...] = ()
    experts: Mapping[str, str] | None = None


_QKV: Final = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
_ATTENTION: Final = (*_QKV, "o_proj.bias")
_MLP: Final = ("gate_proj.bias", "up_proj.bias", "down_proj.bias")
_GATED: Final = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_NUMBERED: Final = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_GATE: Final = ("mlp.gate",)

MODELS: Final[Mapping[str, MlxModel]] = {
    "llama": MlxModel(biases=(*_ATTENTION, *_MLP)),
    "mistral": MlxModel(),
    "qwen2": MlxModel(biases=_QKV),
    "qwen3": MlxModel(),
    "olmo2": MlxModel(biases=_ATTENTION),
    "granite": MlxModel(biases=(*_ATTENTION, *_MLP), eight=("self_attn.o_proj", "mlp.down_proj", "lm_head")),
    "gemma": MlxModel("tied"),
    "gemma2": MlxModel("tied"),
    "gemma3_text": MlxModel(),
    "phi3": MlxModel(),
    "glm4": MlxModel("own", biases=_QKV),
    "minicpm": MlxModel("own"),
    "minicpm3": MlxModel("own"),
    "mixtral": MlxModel(experts=_NUMBERED),
    "qwen2_moe": MlxModel("own", biases=_QKV, experts=_GATED),
    "qwen3_moe": MlxModel(eight=_GATE, experts=_GATED),
    "olmoe": MlxModel(biases=_ATTENTION, experts=_GATED),
    "minimax_m2": MlxModel(
        biases=("e_score_correction_bias",), eight=("block_sparse_moe.gate",), experts=_NUMBERED
    ),
    "glm4_moe": MlxModel("own", biases=(*_QKV, "e_score_correction_bias"), plain=_GATE, experts=_GATED),
    "deepseek": MlxModel("own", biases=_ATTENTION, plain=_GATE, experts=_GATED),
    "deepseek_v2": MlxModel("own", plain=_GATE, experts=_GATED),
    "deepseek_v3": MlxModel("own", biases=("e_score_correction_bias",), plain=_GATE, experts=_GATED),
    "gpt_oss": MlxModel("own", biases=(*_ATTENTION, "router.bias", "_proj_bias"), eight=("mlp.router",)),
}  # fmt: skip
_EXPERT: Final = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
_STACKED: Final = ".mlp.experts."


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of MLX's, before it is in codes.

    Attributes:
        slots: where HuggingFace's tensors lie in it.
    """

    name: str
    shape: Index
    slots: tuple[Slot, ...]
    coding: Coding = "plain"


def model_of(family: Family) -> MlxModel:
    """mlx-lm's class of a family.

    Raises:
        Refused: it has none, or none whose function is known here.
    """
    found = MODELS.get(family.name)
    if found is None:
        raise Refused(
            f"mlx-lm 0.32.2 has no model that is known to compute {family.name}, nothing was written",
            expected="one of " + ", ".join(MODELS),
        )
    return found


def lay_out(family: Family, facts: Facts) -> tuple[Held, ...]:
    """Every tensor that mlx-lm's class has of a model, in the model's own order; token predictors are left out.

    Raises:
        Refused: no such class, or a tensor that it does not have.
    """
    model = model_of(family)
    held: list[Held] = []
    stacks: dict[str, list[TensorSpec]] = {}
    strange: list[str] = []
    done: set[str] = set()
    embedding: TensorSpec | None = None
    for entry in family.entries(facts):
        if entry.row.stack == "mtp":
            continue
        for spec in entry.fused.specs:
            if spec.name in done:  # one expert's part of a tensor that holds them all
                continue
            done.add(spec.name)
            embedding = spec if entry.is_embedding else embedding
            expert = _EXPERT.fullmatch(spec.name)
            if spec.name.endswith("bias") and not spec.name.endswith(model.biases):
                strange.append(spec.name)
            elif expert and model.experts:
                name = f"{expert[1]}.switch_mlp.{model.experts[expert[3]]}.weight"
                stack = stacks.setdefault(name, [])
                stack.append(spec)
                if len(stack) == size(facts, "experts"):
                    held.append(_stack(model, name, stack))
            elif family.name == "gpt_oss" and _STACKED in spec.name:
                held += _gpt_oss(model, spec)
            elif family.name == "deepseek_v3" and spec.name.endswith(".kv_b_proj.weight"):
                held += _by_head(model, spec, facts)
            else:
                held.append(_as_it_is(model, spec.name, spec))
    if strange:
        raise Refused(
            f"mlx-lm's {family.name} has no place for {len(strange)} tensors, nothing was written",
            where=group_names(strange),
            expected="no biases" if not model.biases else "only " + ", ".join(model.biases),
        )
    if facts["untied"] and model.head == "tied":
        raise Refused(
            f"mlx-lm's {family.name} has no output layer of its own, nothing was written",
            where=family.head,
            expected="one that is tied to the embedding",
        )
    if facts["tied"] and model.head == "own" and embedding is not None:
        held.append(_as_it_is(model, family.head, embedding))
    return tuple(held)


def left_out(family: Family, facts: Facts) -> dict[str, str]:
    """HuggingFace's tensors that mlx-lm has no place for, with the reason."""
    predicted = (entry for entry in family.entries(facts) if entry.row.stack == "mtp")
    names = (spec.name for entry in predicted for spec in entry.fused.specs)
    return dict.fromkeys(names, "mlx-lm has no token predictors")


def _as_it_is(model: MlxModel, name: str, spec: TensorSpec) -> Held:
    axes = tuple(range(len(spec.shape)))
    slot = Slot(spec.name, Region.whole(spec.shape), (0,) * len(axes), axes)
    return Held(name, spec.shape, (slot,), _coding(model, name, spec.shape))


def _stack(model: MlxModel, name: str, specs: list[TensorSpec]) -> Held:
    whole = specs[0].shape
    slots = (Slot(spec.name, Region.whole(whole), (i, 0, 0), (-1, 0, 1)) for i, spec in enumerate(specs))
    shape = (len(specs), *whole)
    return Held(name, shape, tuple(slots), _coding(model, name, shape))


def _by_head(model: MlxModel, spec: TensorSpec, facts: Facts) -> list[Held]:
    """``kv_b_proj`` [heads × (key, value), rank] as ``embed_q`` [heads, rank, key] and ``unembed_out``."""
    heads, rank = size(facts, "heads"), spec.shape[1]
    key, value = size(facts, "qk_nope"), size(facts, "v_dim")
    module = spec.name.removesuffix(".kv_b_proj.weight")
    first, second = f"{module}.embed_q.weight", f"{module}.unembed_out.weight"
    starts = range(0, heads * (key + value), key + value)
    keys = (Slot(spec.name, Region((at, 0), (key, rank)), (i, 0, 0), (-1, 1, 0)) for i, at in enumerate(starts))
    values = (
        Slot(spec.name, Region((at + key, 0), (value, rank)), (i, 0, 0), (-1, 0, 1)) for i, at in enumerate(starts)
    )
    return [
        Held(first, (heads, rank, key), tuple(keys), _coding(model, first, (heads, rank, key))),
        Held(second, (heads, value, rank), tuple(values), _coding(model, second, (heads, value, rank))),
    ]


def _gpt_oss(model: MlxModel, spec: TensorSpec) -> list[Held]:
    """Experts [experts, in, out] turned; of gate and up, which alternate along the last axis, each by itself."""
    module, _, last = spec.name.rpartition(".")
    bias = last.endswith("_bias")
    end = "bias" if bias else "weight"
    turned = (0, 1) if bias else (0, 2, 1)
    shape = tuple(spec.shape[axis] for axis in turned)
    zeros = (0,) * len(shape)
    if not last.startswith("gate_up_proj"):
        name = f"{module}.{last.removesuffix('_bias')}.{end}"
        slot = Slot(spec.name, Region.whole(spec.shape), zeros, turned)
        return [Held(name, shape, (slot,), _coding(model, name, shape))]
    found: list[Held] = []
    for half, name in enumerate((f"{module}.gate_proj.{end}", f"{module}.up_proj.{end}")):
        region = Region((*zeros, half), (*spec.shape[:-1], 1))
        found.append(Held(name, shape, (Slot(spec.name, region, zeros, turned),), _coding(model, name, shape)))
    return found


def _coding(model: MlxModel, name: str, shape: Index) -> Coding:
    module = name.removesuffix(".weight")
    if len(shape) < 2 or module == name or module.endswith(model.plain):
        return "plain"
    return "eight" if module.endswith(model.eight) else "usual"
