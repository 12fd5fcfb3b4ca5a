"""What models from before rotary positions have: learned positions, a key and value for each query head, plain GELU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.arch.activation import OFF
from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.fields import flag, heads, multiple, whole
from dconv.arch.translate import CONFIG, Said

#: How transformers calls GELU by its tanh approximation.
_TANH: Final = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")
_ERF: Final = ("gelu", "gelu_python")


@dataclass(frozen=True)
class Multihead:
    """As many keys and values as query heads, biases among them, and nothing around them.

    Attributes:
        heads: the key of config.json that counts them.
        hidden: the key of config.json whose value they divide.
        width: the key for the width of one, where they need not divide it.
    """

    heads: str = "num_attention_heads"
    hidden: str = "hidden_size"
    width: str = ""

    @property
    def owns(self) -> tuple[str, ...]:
        """Args of the heads, and those that say that nothing is around them."""
        return "num_attention_heads", "num_query_groups", "kv_channels", "group_query_attention", *_PLAIN

    @property
    def compared(self) -> Mapping[str, str]:
        """The number of heads, and the width of one where that has a key."""
        return {self.heads: "num_attention_heads", **({self.width: "kv_channels"} if self.width else {})}

    def facts(self, said: Said) -> dict[str, Any]:
        """heads, groups, head_dim, q and kv (heads * head_dim)."""
        count = heads(said, self.heads, CONFIG)
        if self.width:
            width = whole(said, self.width, CONFIG)
        else:
            width = multiple(self.hidden, whole(said, self.hidden, CONFIG), self.heads, count, CONFIG)
        return {"heads": count, "groups": count, "head_dim": width, "q": count * width, "kv": count * width}

    def to_args(self, _said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """As many query groups as heads; nothing is lost."""
        return {
            "num_attention_heads": facts["heads"],
            "num_query_groups": facts["heads"],  # as for Grouped: right for every reader
            "kv_channels": facts["head_dim"],
            "group_query_attention": False,
            **_PLAIN,
        }, []

    def to_hf(self, said: Said) -> dict[str, object]:
        """The number of heads, and the width of one where that has a key."""
        its = {self.width: whole(said, "kv_channels", ARGS)} if self.width else {}
        return {self.heads: whole(said, "num_attention_heads", ARGS), **its}

    def mismatches(self, said: Said) -> list[str]:
        """Grouped queries, heads that do not fill the hidden size where they must, norms of query and key, or sinks."""
        count = heads(said, "num_attention_heads", ARGS)
        width = {} if self.width else {"kv_channels": whole(said, "hidden_size", ARGS) // count}
        return differing(said, {"num_query_groups": count, **width, **_PLAIN})

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []


_PLAIN: Final[Mapping[str, object]] = {"qk_layernorm": False, "softmax_type": "vanilla"}


@dataclass(frozen=True)
class Learned:
    """A learned embedding of positions, added to that of words.

    Attributes:
        key: the key of config.json that counts them.
    """

    key: str = "max_position_embeddings"

    @property
    def owns(self) -> tuple[str, ...]:
        """The kind of positions."""
        return ("position_embedding_type",)

    @property
    def compared(self) -> Mapping[str, str]:
        """No key: how many positions there are may differ."""
        return {}

    def facts(self, said: Said) -> dict[str, Any]:
        """``positions``: rows of the embedding."""
        return {"positions": whole(said, self.key, CONFIG)}

    def to_args(self, _said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The kind of positions; how many there are is one of the decoder's own sizes."""
        return {"position_embedding_type": "learned_absolute"}, []

    def to_hf(self, _said: Said) -> dict[str, object]:
        """Nothing: how many positions there are is one of the decoder's own sizes."""
        return {}

    def mismatches(self, said: Said) -> list[str]:
        """Positions of another kind."""
        return differing(said, {"position_embedding_type": "learned_absolute"})

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []


@dataclass(frozen=True)
class Gelu:
    """GELU without a gate. Megatron's kernel that adds the bias as well (``bias_gelu_fusion``) approximates by tanh.

    Attributes:
        key: its key in config.json.
        tanh: whether the approximation is there, too. BERT's language model head has the exact one whatever the layers
            have, which no class of transformers says.
    """

    key: str = "hidden_act"
    tanh: bool = True

    @property
    def owns(self) -> tuple[str, ...]:
        """Every switch of an activation, and the older ``openai_gelu``."""
        return *OFF, "openai_gelu"

    @property
    def compared(self) -> Mapping[str, str]:
        """The function's key, by the switch of the approximation."""
        return {self.key: "bias_gelu_fusion"}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Every switch off but the approximation's; a function that is not GELU is lost."""
        named = said.get(self.key)
        known = _ERF + _TANH if self.tanh else _ERF
        lost = [] if named in known else [f"{self.key} {named}: Megatron has {' or '.join(known)} here"]
        return {**OFF, "bias_gelu_fusion": self.tanh and named in _TANH}, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """``gelu_new`` where Megatron approximates, else ``gelu``."""
        return {self.key: _TANH[0] if _approximates(said) else _ERF[0]}

    def mismatches(self, said: Said) -> list[str]:
        """Another activation; the approximation, where one of the heads has the exact function."""
        reasons = differing(said, {arg: off for arg, off in OFF.items() if arg != "bias_gelu_fusion"})
        if _approximates(said) and not self.tanh:
            reasons.append(
                "bias_gelu_fusion: GELU by tanh in the layers and the exact one in the head, which differ by 5e-4 "
                "at most; no HuggingFace class has both (a config.json given with --hf-config settles on one)"
            )
        return reasons

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []


def _approximates(said: Said) -> bool:
    return flag(said, "bias_gelu_fusion", ARGS) or flag(said, "openai_gelu", ARGS)
