"""Keys of config.json that change the function and that Megatron-LM has no argument for.

They travel inside the args under their own name, so that a round trip through a Megatron checkpoint loses nothing. A
family that does not declare them refuses them on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dconv.arch.args import ARGS
from dconv.arch.fields import number, plain, table
from dconv.arch.translate import CONFIG, Said

#: Keys by which some family scales, clips or positions what flows, with the value that changes nothing.
RESCALING: Final[Mapping[str, object]] = {
    "scale_emb": None,  # MiniCPM
    "scale_depth": None,
    "dim_model_base": None,
    "embedding_multiplier": 1,  # Granite
    "residual_multiplier": 1,
    "attention_multiplier": None,
    "logits_scaling": 1,
    "logit_scale": 1,  # Cohere
    "query_pre_attn_scalar": None,  # Gemma
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_scale": None,  # no key: a constant of Gemma's code, in the args under this name
    "clip_qkv": None,  # OLMo
    "no_rope_layers": None,  # SmolLM3
    "rope_local_base_freq": None,  # Gemma 3
}
#: Norms at other places of a layer than Llama's: no keys of config.json but constants of a family's code, and no
#: arguments of Megatron-LM. The first two are named as in forks of it that have them.
POST_NORMS: Final = {"post_self_attn_layernorm": True, "post_mlp_layernorm": True}
NO_PRE_NORMS: Final = {"no_pre_layernorm": True}
POST_NORMS_LACKING: Final = (
    "post_self_attn_layernorm, post_mlp_layernorm: what leaves attention and feed-forward is normalised"
)
#: The same for keys that end so.
_ENDS: Final[Mapping[str, object]] = {"_multiplier": 1, "_multipliers": None, "_softcapping": None}


def rescales(key: str, value: object) -> bool:
    """Whether this key of config.json, with this value, makes another function of the same weights."""
    neutral = next((one for end, one in _ENDS.items() if key.endswith(end)), RESCALING.get(key, value))
    return value is not None and value != neutral


@dataclass(frozen=True)
class Carried:
    """Keys with a real number each, or null.

    Attributes:
        keys: key, and what mainline megatron-core would have to compute with it, in words.
        optional: whether a model of this family may have none of them.
        idle: the values that change nothing, where they follow from the model's sizes.
    """

    keys: Mapping[str, str] = field(hash=False)
    optional: bool = False
    idle: Callable[[Said], Mapping[str, object]] = lambda _: {}

    @property
    def owns(self) -> tuple[str, ...]:
        """The keys: the args carry them under these names."""
        return tuple(self.keys)

    @property
    def compared(self) -> Mapping[str, str]:
        """Each key, by the arg of the same name."""
        return {key: key for key in self.keys}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The numbers as config.json writes them; nothing is lost."""
        return {key: _number(said, key, CONFIG) for key in self.keys}, []

    def to_hf(self, said: Said) -> dict[str, object]:
        """The numbers as the args have them."""
        return {key: _number(said, key, ARGS) for key in self.keys}

    def mismatches(self, said: Said) -> list[str]:
        """Without any of them it is some other family's model, or one whose numbers nobody wrote down."""
        lacking = not self.optional and all(said.get(key) is None for key in self.keys)
        return [f"none of {', '.join(self.keys)} is in the args"] if lacking else []

    def needs(self, said: Said) -> list[str]:
        """A line for each key whose number changes something."""
        idle = self.idle(said)
        busy = {key for key in self.keys if rescales(key, said.get(key)) and said[key] != idle.get(key)}
        return [f"{key}: {words}" for key, words in self.keys.items() if key in busy]


def _number(said: Said, key: str, where: str) -> object:
    """The number as it is written: transformers' classes tell 256 from 256.0."""
    if said.get(key) is not None:
        number(said, key, where)
    return said.get(key)


@dataclass(frozen=True)
class Kept:
    """Keys whose value is plain data of any shape (tables, lists, text), carried along as it stands.

    Attributes:
        keys: key, and what mainline megatron-core would have to compute with it, in words; "" where nothing.
        table: the own arg that holds them all, where Megatron has args of their names; none means each by itself.
    """

    keys: Mapping[str, str] = field(hash=False)
    table: str = ""

    @property
    def owns(self) -> tuple[str, ...]:
        """The arg that holds them, or the keys themselves."""
        return (self.table,) if self.table else tuple(self.keys)

    @property
    def compared(self) -> Mapping[str, str]:
        """The keys that change the function."""
        return {key: self.table or key for key, words in self.keys.items() if words}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The values as they stand, those that are null left out; nothing is lost."""
        held = {key: plain(said, key, CONFIG) for key in self.keys if said.get(key) is not None}
        return {self.table: held} if self.table and held else held, []

    def to_hf(self, said: Said) -> dict[str, object]:
        """The values as the args have them."""
        held = table(said, self.table, ARGS) if self.table else said
        return {key: plain(held, key, ARGS) for key in self.keys if held.get(key) is not None}

    def mismatches(self, _said: Said) -> list[str]:
        """None: a model may have none of them."""
        return []

    def needs(self, said: Said) -> list[str]:
        """A line for each key that is there and changes the function."""
        return [f"{key}: {words}" for key, words in self.keys.items() if words and said.get(key) is not None]
