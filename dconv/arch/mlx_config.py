"""config.json as mlx-lm reads it: the keys that its classes ask for, and what they compute nothing with.

mlx-lm takes of config.json what its ``ModelArgs`` names, each with defaults of its own, and mostly the names of
transformers 4. So what transformers leaves to its defaults is said, ``rope_parameters`` is said once more as
``rope_theta`` and ``rope_scaling``, and a config whose function the class does not have is refused. What only shows in
long texts (a window that the class does not have) is told.

Source: mlx-lm 0.32.2, ``models/*.py``, ``models/rope_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.arch.family import Family
from dconv.arch.fields import table
from dconv.arch.layouts import Facts, size
from dconv.arch.mlx import model_of
from dconv.arch.rope import rope_parameters
from dconv.arch.translate import CONFIG
from dconv.errors import Refused
from dconv.sharding.parsed import is_list

#: What ``initialize_rope`` knows, and computes as transformers does.
_ALL: Final = ("default", "linear", "llama3", "yarn", "longrope")
_PLAIN: Final = ("default",)
_FULL, _SLIDES = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Asks:
    """What a family's class asks of config.json.

    Attributes:
        ropes: kinds of scaling that it has.
        even: whether a head is hidden_size / heads wide whatever ``head_dim`` says.
        only: keys with the values that it computes; a key that is not there has the first.
        windows: whether it has layers with a window.
        part: whether ``partial_rotary_factor`` is a key of its own.
        adds: keys that it asks for where the config has none, with values that change nothing.
        near: what it computes a little differently, whatever the config says.
    """

    ropes: tuple[str, ...] = _ALL
    even: bool = False
    only: Mapping[str, tuple[object, ...]] | None = None
    windows: bool = False
    part: bool = False
    adds: Mapping[str, object] | None = None
    near: tuple[str, ...] = ()


_AS_THEY_ARE: Final = {"norm_topk_prob": (False,)}
_EVERY_LAYER: Final[Mapping[str, tuple[object, ...]]] = {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)}
_DEEPSEEK_V3: Final = {"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",)}
ASKS: Final[Mapping[str, Asks]] = {
    "llama": Asks(),
    "mistral": Asks(),
    "qwen2": Asks(even=True),
    "qwen3": Asks(),
    "olmo2": Asks(),
    "granite": Asks(even=True),
    "gemma": Asks(_PLAIN, near=("mlx-lm's gemma has GELU itself where the model has its tanh form",)),
    "gemma2": Asks(_PLAIN),
    "gemma3_text": Asks(("default", "linear"), only={"final_logit_softcapping": (None,)}, windows=True),
    "phi3": Asks(("default", "longrope"), even=True, part=True),
    "glm4": Asks(_PLAIN, part=True),
    "minicpm": Asks(even=True),
    "minicpm3": Asks(("longrope",)),
    "mixtral": Asks(_PLAIN, even=True),
    "qwen2_moe": Asks(_PLAIN, even=True, only={**_AS_THEY_ARE, **_EVERY_LAYER}),
    "qwen3_moe": Asks(_PLAIN, adds={"decoder_sparse_step": 1, "mlp_only_layers": []}),
    "olmoe": Asks(),
    "minimax_m2": Asks(_PLAIN, only={"scoring_func": ("sigmoid",)}, adds={"shared_intermediate_size": 0}),
    "glm4_moe": Asks(_PLAIN, part=True, only=_DEEPSEEK_V3, adds={"n_group": 1, "topk_group": 1}),
    "deepseek": Asks(("default", "linear"), even=True, only={**_AS_THEY_ARE, "routed_scaling_factor": (1.0, 1)}),
    "deepseek_v2": Asks(("yarn",), only={**_AS_THEY_ARE, "scoring_func": ("softmax",)}),
    "deepseek_v3": Asks(("default", "yarn"), only=_DEEPSEEK_V3),
    "gpt_oss": Asks(("default", "yarn"), windows=True),
}  # fmt: skip


def config_of(family: Family, facts: Facts, config: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """config.json of an MLX directory without its quantisation, and what a person should know of it.

    Raises:
        Refused: the class computes something else, or there is none.
    """
    model, asks = model_of(family), ASKS[family.name]
    defaults: Mapping[str, object] = getattr(family.config, "defaults", {})
    said: dict[str, Any] = {**{key: value for key, value in defaults.items() if value is not None}, **config}
    said = {**(asks.adds or {}), **said}
    odd = [
        f"{key} {said[key]!r:.60}: mlx-lm computes {wanted[0]!r}"
        for key, wanted in (asks.only or {}).items()
        if key in said and said[key] not in wanted
    ]
    heads = size(facts, "heads")
    if asks.even and size(facts, "head_dim") * heads != size(facts, "hidden"):
        odd.append(f"head_dim {facts['head_dim']}: mlx-lm takes hidden_size / num_attention_heads")
    if family.name == "minicpm3" and size(facts, "v_dim") * heads != size(facts, "hidden"):
        odd.append(f"v_head_dim {facts['v_dim']}: mlx-lm takes hidden_size / num_attention_heads")
    rotary, notes = (_two_bases if family.name == "gemma3_text" else _rotary)(said, asks, odd)
    said |= rotary
    if odd:
        raise Refused(
            f"mlx-lm's {family.name} does not compute this model, nothing was written",
            where=CONFIG,
            found="\n".join(odd),
            do="FORMAT hf keeps it as it is",
        )
    said["model_type"] = family.config.model_type
    said["num_key_value_heads"] = said.get("num_key_value_heads") or size(facts, "groups")
    if "head_dim" in said or not facts.get("mla"):
        said["head_dim"] = size(facts, "head_dim") if said.get("head_dim") is None else said["head_dim"]
    said["tie_word_embeddings"] = bool(facts["tied"]) and model.head != "own"
    if facts["tied"] and model.head == "own":
        notes.append(f"{family.head} is written, a copy of the embedding: mlx-lm's {family.name} always has one")
    return said, [*notes, *asks.near, *_windows(said, asks)]


def _rotary(said: Mapping[str, Any], asks: Asks, odd: list[str]) -> tuple[dict[str, object], list[str]]:
    """The rotary keys of transformers 4, and what to tell."""
    found = rope_parameters(said)
    kind, theta = str(found.pop("rope_type")), found.pop("rope_theta")
    part = found.pop("partial_rotary_factor", 1.0)
    if kind not in asks.ropes:
        odd.append(f"rope_type {kind}: mlx-lm's class has {', '.join(asks.ropes)}")
    if "attention_factor" in found:
        odd.append("attention_factor of the rope parameters: mlx-lm computes its own")
    notes: list[str] = []
    if kind == "longrope":
        notes.append("mlx-lm rotates with a longrope's long factors, in short texts too")
    if found.get("truncate") is False:
        notes.append("mlx-lm rounds the range of a yarn's frequencies, which truncate: false does not")
    scaling = None if kind == "default" else {**found, "rope_type": kind, "type": kind}
    keys: dict[str, object] = {"rope_theta": theta, "rope_scaling": scaling}
    if asks.part:
        keys["partial_rotary_factor"] = part
    if "original_max_position_embeddings" in found:
        keys.setdefault("original_max_position_embeddings", found["original_max_position_embeddings"])
    return keys, notes


def _two_bases(said: Mapping[str, Any], asks: Asks, odd: list[str]) -> tuple[dict[str, object], list[str]]:
    """The same for Gemma 3, whose layers with a window have a base of their own; and the pattern of these layers."""
    tables = table(said, "rope_parameters", CONFIG)
    full = {**table(tables, _FULL, CONFIG), **table(said, "rope_scaling", CONFIG)}
    slides = table(tables, _SLIDES, CONFIG)
    keys, notes = _rotary({**said, "rope_parameters": None, "rope_scaling": full}, asks, odd)
    keys["rope_local_base_freq"] = slides.get("rope_theta", said.get("rope_local_base_freq", 10000.0))
    if is_list(kinds := said.get("layer_types")):
        pattern = kinds.index(_FULL) + 1 if _FULL in kinds else len(kinds) + 1
        if any((kind == _FULL) != ((layer + 1) % pattern == 0) for layer, kind in enumerate(kinds)):
            odd.append("layer_types: mlx-lm has every so many layers without a window")
        keys["sliding_window_pattern"] = pattern
    return keys, notes


def _windows(said: Mapping[str, Any], asks: Asks) -> list[str]:
    window, longest = said.get("sliding_window"), said.get("max_position_embeddings")
    if asks.windows or not isinstance(window, int) or said.get("use_sliding_window") is False:
        return []
    if isinstance(longest, int) and longest <= window:
        return []
    return [f"mlx-lm attends without the model's window of {window}: longer texts compute something else"]
