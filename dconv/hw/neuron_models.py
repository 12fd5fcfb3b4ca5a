"""What AWS Neuron's NxD Inference takes: models, chips, and how the one is divided over the other's cores.

Sources: aws-neuron/neuronx-distributed-inference 4bcdc54, ``inference_demo.py`` for the models and
``models/<name>/modeling_<name>.py`` for what each class reads of a config, ``modules/attention/gqa.py`` for heads; AWS
Neuron's documentation, "NxD Inference Features Configuration Guide", for cores, memory and parallel sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from dconv.arch.decoder import DecoderConfig
from dconv.arch.rope import TABLE, for_older_loaders
from dconv.checkpoint.fold import fold, nothing_to_fold
from dconv.describe import Described
from dconv.errors import Refused

_GIB: Final = 1 << 30


@dataclass(frozen=True)
class Chip:
    """An instance family.

    Attributes:
        words: the chip, and the names of its instances.
        logical: by how many cores are taken for one (LNC), the default first: memory of such a one in bytes, and the
            parallel sizes that its runtime has.
        instances: their cores, for the default of ``logical``.
        fp8: whether its FP8 is documented: NxD Inference's FP8 tutorial is for Trn2; of NeuronCore-v2 (Trn1, Inf2) the
            data types' page says that the compiler does not have its configurable FP8 yet.
    """

    words: str
    logical: Mapping[int, tuple[int, tuple[int, ...]]]
    instances: Mapping[str, int]
    fp8: bool = False


CHIPS: Final[Mapping[str, Chip]] = {
    "trn1": Chip(
        "Trainium: trn1, trn1n",
        {1: (16 * _GIB, (1, 2, 8, 16, 32))},
        {"trn1.2xlarge": 2, "trn1.32xlarge": 32},
    ),
    "trn2": Chip(
        "Trainium2: trn2",
        {2: (24 * _GIB, (1, 2, 4, 8, 16, 32, 64)), 1: (12 * _GIB, (1, 2, 4, 8, 16, 32, 64, 128))},
        {"trn2.3xlarge": 4, "trn2.48xlarge": 64},
        fp8=True,
    ),
    "inf2": Chip(
        "Inferentia2: inf2",
        {1: (16 * _GIB, (1, 2, 4, 8, 24))},
        {"inf2.xlarge": 2, "inf2.24xlarge": 12, "inf2.48xlarge": 24},
    ),
}

#: Families that inference_demo has a class for, under its own names, which are the same. Its gemma3 is not here: the
#: class takes the vocabulary and the rotation of one size of Gemma 3 for all of them.
FAMILIES: Final = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
#: Classes that read a directory of Neuron's names. Others convert HuggingFace's names without a look, and leave out the
#: scales of experts.
FP8_FAMILIES: Final = ("llama",)


def plain(model: Described) -> Described:
    """The model that is compiled: as it is, or as folding its muP scalars leaves it.

    Raises:
        Refused: scalars that cannot be folded.
    """
    if nothing_to_fold(model.family, model.config):
        return model
    made = fold(model.family, model.config, model.logical, model.source.shapes)
    return replace(model, family=made.family, config=made.config, facts=made.facts, logical=made.logical)


def known_config(model: Described, chip: str) -> dict[str, Any]:
    """The config with what a class takes for keys that it omits, the rotation in transformers 4's keys.

    Raises:
        Refused: no class computes this model, with all that one would not look at.
    """
    name, family = model.family.name, model.family.config
    if name not in FAMILIES:
        raise Refused("NxD Inference's inference_demo has no such model, nothing was written", found=name,
                      expected=", ".join(FAMILIES),
                      do="without --platform, FORMAT neuron writes the tensors alone, for a class of your own"
                      if name == "minimax_m2" else "")  # fmt: skip
    said: dict[str, Any] = {**(family.defaults if isinstance(family, DecoderConfig) else {}), **model.config}
    said = for_older_loaders(said)
    heads = said["num_attention_heads"]
    said["num_key_value_heads"] = said.get("num_key_value_heads") or heads
    said["head_dim"] = said.get("head_dim") or said["hidden_size"] // heads
    if wrong := list(_unread(name, said, chip)):
        raise Refused(f"NxD Inference's {name} would compute something else, nothing was written",
                      where="config.json", found="\n".join(wrong))  # fmt: skip
    return said


def _unread(family: str, said: Mapping[str, Any], chip: str) -> Iterator[str]:
    scaling, window = said.get(TABLE), said.get("sliding_window")
    if family != "llama" and scaling and scaling.get("rope_type", scaling.get("type")) != "default":
        yield f"{TABLE}: its class rotates without scaling"
    width = said["hidden_size"] // said["num_attention_heads"]
    if family in ("mistral", "mixtral", "qwen2") and said["head_dim"] != width:
        yield f"head_dim {said['head_dim']}: its class takes hidden_size / num_attention_heads, {width}"
    if family in ("qwen3", "qwen3_moe") and said.get("attention_bias"):
        yield "attention_bias: its class has none"
    if family in ("qwen2", "qwen3", "qwen3_moe") and said.get("use_sliding_window"):
        yield "use_sliding_window: its class looks at all tokens"
    if family == "mixtral" and window:
        yield "sliding_window: its class looks at all tokens"
    if family == "mistral" and window and chip == "trn1":
        yield "sliding_window: its attention has none on trn1"
    if family == "qwen3_moe" and not said.get("norm_topk_prob"):
        yield "norm_topk_prob false: its class always normalises"
    if family == "qwen3_moe" and (said.get("mlp_only_layers") or said.get("decoder_sparse_step", 1) != 1):
        yield "layers without experts: its class has them in all"


def heads_of(said: Mapping[str, Any], cores: int) -> tuple[int, int]:
    """Query and key heads as they lie on the cores: padded, replicated.

    Source: ``get_shardable_head_counts`` and ``determine_sharding_strategy``, ``modules/attention/gqa.py``.
    """
    queries, keys = said["num_attention_heads"], said["num_key_value_heads"]
    padded = -(-queries // cores) * cores
    if queries == keys:
        return padded, padded
    if keys % cores == 0:
        return padded, keys
    return padded, cores if cores % keys == 0 else padded


def widths(said: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of what is cut over cores and not padded: experts'. Dense layers of these classes pad themselves."""
    known = ("moe_intermediate_size",) if "num_experts" in said else ("intermediate_size",)
    return known if {"num_experts", "num_local_experts"} & set(said) else ()


@dataclass(frozen=True)
class Sizes:
    """What lies in the memory of all cores together, in bytes."""

    weights: int
    cache: int


def sizes_of(model: Described, said: Mapping[str, Any], cores: int, tokens: int, fp8: bool) -> Sizes:
    """Weights and key-value cache, both in bf16 but for what ``fp8`` says.

    Args:
        model: whose tensors are counted.
        said: of `known_config`.
        cores: by which heads are padded and copied.
        tokens: of all sequences together.
        fp8: whether matrices of layers take a byte a number.
    """
    matrices = 0
    if fp8:  # a byte instead of two; scales and the rest are as good as nothing
        names = {name: prod(spec.shape) for name, spec in model.logical.specs.items() if "_proj." in name}
        matrices = sum(names.values())
    weights = 2 * sum(prod(spec.shape) for spec in model.logical.specs.values()) - matrices
    width = heads_of(said, cores)[1] * said["head_dim"]
    return Sizes(weights, 2 * 2 * said["num_hidden_layers"] * width * tokens)
