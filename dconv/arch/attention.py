"""What decoders with grouped queries differ in around attention: heads, norms of query and key, biases, windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dconv.arch.args import ARGS, biases, window
from dconv.arch.fields import count, deep, flag, heads, multiple, positive, whole
from dconv.arch.translate import CONFIG, Said
from dconv.errors import Damaged
from dconv.sharding.parsed import is_list

_HEADS: Final = {
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
}


@dataclass(frozen=True)
class Grouped:
    """Query heads in groups that share a key and a value (multi-head and multi-query attention are its ends).

    Attributes:
        qk_norm: whether query and key are normalised (``qk_layernorm``): each head by itself, or "full": all heads of
            a token at once, which mainline megatron-core lacks.
        sinks: whether each head has a learned logit beside the scores (``softmax_type``).
        qk_norm_key: the key that says whether each head is normalised, where models of a family differ in it.
    """

    qk_norm: bool | Literal["full"] = False
    sinks: bool = False
    qk_norm_key: str = ""

    @property
    def owns(self) -> tuple[str, ...]:
        """Args of the heads, and the switches of norms and sinks."""
        return *_HEADS.values(), "group_query_attention", *self._switches(False)

    @property
    def compared(self) -> Mapping[str, str]:
        """The three sizes, and the key of the norms where models of a family differ in it."""
        return {**_HEADS, self.qk_norm_key: "qk_layernorm"} if self.qk_norm_key else _HEADS

    def facts(self, said: Said) -> dict[str, Any]:
        """heads, groups, head_dim, q (heads * head_dim), kv (groups * head_dim); qk_norm, sinks."""
        queries = heads(said, "num_attention_heads", CONFIG)
        groups = queries if said.get("num_key_value_heads") is None else heads(said, "num_key_value_heads", CONFIG)
        if said.get("head_dim") is None:
            hidden = whole(said, "hidden_size", CONFIG)
            head_dim = multiple("hidden_size", hidden, "num_attention_heads", queries, CONFIG)
        else:
            head_dim = whole(said, "head_dim", CONFIG)
        multiple("num_attention_heads", queries, "num_key_value_heads", groups, CONFIG)
        multiple("head_dim", head_dim, "the two halves that are rotated", 2, CONFIG)
        sizes = {"heads": queries, "groups": groups, "head_dim": head_dim}
        wide = {"q": queries * head_dim, "kv": groups * head_dim}
        normalised = flag(said, self.qk_norm_key, CONFIG) if self.qk_norm_key else bool(self.qk_norm)
        return {**sizes, **wide, "qk_norm": normalised, "sinks": self.sinks, "mla": False}

    def to_args(self, _said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Sizes and switches; nothing is lost."""
        return {
            "num_attention_heads": facts["heads"],
            "num_query_groups": facts["groups"],
            "kv_channels": facts["head_dim"],
            # a namespace of MHA says num_query_groups 1; the number of heads is right for every reader
            "group_query_attention": facts["groups"] != facts["heads"],
            **self._switches(facts["qk_norm"]),
        }, []

    def to_hf(self, said: Said) -> dict[str, object]:
        """The three sizes, and the key of the norms where models of a family differ in it."""
        hf: dict[str, object] = {key: whole(said, arg, ARGS) for key, arg in _HEADS.items()}
        return {**hf, self.qk_norm_key: flag(said, "qk_layernorm", ARGS)} if self.qk_norm_key else hf

    def mismatches(self, said: Said) -> list[str]:
        """Norms or sinks that the family has not, or has otherwise."""
        either = flag(said, "qk_layernorm", ARGS) if self.qk_norm_key else bool(self.qk_norm)
        return differing(said, self._switches(either))

    def needs(self, _said: Said) -> list[str]:
        """Norms over all heads at once."""
        full = "norms of query and key over all heads at once (qk_layernorm normalises each head by itself)"
        return [full] if self.qk_norm == "full" else []

    def _switches(self, normalised: bool) -> dict[str, object]:
        return {
            "qk_layernorm": normalised,
            "qk_layernorm_full_width": True if self.qk_norm == "full" else None,  # no argument of Megatron-LM
            "softmax_type": "learnable" if self.sinks else "vanilla",
        }


_ARGS_OF_BIAS: Final = "add_qkv_bias for q, k, v, or add_bias_linear for every linear layer"


@dataclass(frozen=True)
class Biases:
    """Which linear layers have a bias: a constant of the family each, or the key of config.json that says so.

    Attributes:
        qkv: q_proj, k_proj, v_proj.
        out: o_proj.
        mlp: gate_proj, up_proj, down_proj, of experts as well; a router has one where they have.
    """

    qkv: bool | str = False
    out: bool | str = False
    mlp: bool | str = False

    @property
    def owns(self) -> tuple[str, ...]:
        """The two args that Megatron has for biases."""
        return "add_qkv_bias", "add_bias_linear"

    @property
    def compared(self) -> Mapping[str, str]:
        """The keys that decide, each with the arg of the first that it decides."""
        args = zip((self.qkv, self.out, self.mlp), ("add_qkv_bias", "add_bias_linear", "add_bias_linear"), strict=True)
        return {key: arg for key, arg in reversed([*args]) if isinstance(key, str)}

    def facts(self, said: Said) -> dict[str, Any]:
        """qkv_bias, out_bias, mlp_bias."""
        return {part: flag(said, it, CONFIG) if isinstance(it, str) else it for part, it in self._parts().items()}

    def to_args(self, _said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Biases of query, key and value, or of every linear layer; any other choice is lost."""
        lost = []
        if facts["out_bias"] != facts["mlp_bias"] or (facts["out_bias"] and not facts["qkv_bias"]):
            spelt = ", ".join(f"{part} {facts[part]}" for part in self._parts())
            lost = [f"{spelt}: Megatron has {_ARGS_OF_BIAS}"]
        every = facts["out_bias"] and facts["mlp_bias"]
        return {"add_qkv_bias": facts["qkv_bias"], "add_bias_linear": every}, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """The keys that decide, if there are some."""
        found: dict[str, object] = {}
        for part, here in biases(said).items():
            if isinstance(key := self._parts()[part], str):
                found.setdefault(key, here)
        return found

    def mismatches(self, said: Said) -> list[str]:
        """A bias that this family has not, or no bias where it has one."""
        reasons: list[str] = []
        keys: dict[str, bool] = {}
        for part, here in biases(said).items():
            declared = self._parts()[part]
            there = keys.setdefault(declared, here) if isinstance(declared, str) else declared
            if there != here:
                reasons.append(f"{part} is {here}, this family has {there} ({_ARGS_OF_BIAS})")
        return reasons

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []

    def _parts(self) -> dict[str, bool | str]:
        return {"qkv_bias": self.qkv, "out_bias": self.out, "mlp_bias": self.mlp}


@dataclass(frozen=True)
class Window:
    """Which layers see only the last ``sliding_window`` tokens.

    Attributes:
        layers: none (the key is not read), all, "late" (from ``max_window_layers`` on, or as ``layer_types`` says), or
            "types" (as ``layer_types`` says).
        switch: whether nothing slides unless ``use_sliding_window``.
        every: with "types", each so many-th layer is a full one where ``layer_types`` is not given; 0: it must be.
        pattern: a key that may say otherwise than ``every``.
    """

    layers: Literal["none", "all", "late", "types"] = "none"
    switch: bool = False
    every: int = 0
    pattern: str = ""

    @property
    def owns(self) -> tuple[str, ...]:
        """Width, and which layers have it."""
        return "window_size", "window_attn_skip_freq"

    @property
    def compared(self) -> Mapping[str, str]:
        """Width, and the kinds of the layers."""
        return {"sliding_window": "window_size", "layer_types": "window_attn_skip_freq"}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The width less one: transformers counts the token itself (``masking_utils.py``), Megatron does not.

        Lost are kinds of layers that the family has not, and ``layer_types`` that versions of transformers differ in.

        Raises:
            Damaged: ``layer_types`` has not one entry a layer, or a width or step is no positive whole number.
        """
        layers = facts["layers"]
        width = None
        if self.layers != "none" and (not self.switch or flag(said, "use_sliding_window", CONFIG)):
            width = whole(said, "sliding_window", CONFIG) if said.get("sliding_window") is not None else None
        types = said.get("layer_types")
        lost: list[str] = []
        if types is None:
            types, lost = self._usual(said, width, layers)
        if not is_list(types) or len(types) != layers:
            raise Damaged("layer_types does not have one entry a layer", where=CONFIG, expected=f"{layers} entries")
        lost += [
            f"layer_types has {kind}: this family and Megatron have no such layers here"
            for kind in sorted({str(kind) for kind in types})
            if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and not width)
        ]
        slides = [int(kind == "sliding_attention") for kind in types]
        if self.layers == "all" and width and not all(slides):
            lost.append("layer_types names full layers: this family slides in all of them")
        if not width or not any(slides):
            return {"window_size": None, "window_attn_skip_freq": None}, lost
        return {"window_size": [width - 1, 0], "window_attn_skip_freq": None if all(slides) else slides}, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """Width, switch and kinds of layers, under the keys that this family's class reads."""
        width, slides = window(said)
        if self.layers == "none":
            return {}
        # the classes where a layer's type decides take no null, though then none slides
        hf: dict[str, object] = (
            {} if self.layers == "types" and not (self.switch or width) else {"sliding_window": width}
        )
        if self.switch:
            hf["use_sliding_window"] = width is not None
        if self.layers == "late" and width:
            hf["max_window_layers"] = slides.index(True)
        if self.layers != "all" and (width or self.every):  # else the class would take it that some layers slide
            slides = slides or [False] * deep(said, "num_layers", ARGS)
            hf["layer_types"] = ["sliding_attention" if slide else "full_attention" for slide in slides]
        return hf

    def mismatches(self, said: Said) -> list[str]:
        """A window where this family has none; layers without one where all of its have one."""
        width, slides = window(said)
        if width and (self.layers == "none" or (self.layers == "all" and not all(slides))):
            return [f"window_size is {said['window_size']}, this family has {self.layers} such layers"]
        return []

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []

    def _usual(self, said: Said, width: int | None, layers: int) -> tuple[list[str], list[str]]:
        """``layer_types`` as transformers' class would fill it in."""
        slides = [width is not None] * layers
        if self.layers == "late":
            first = count(said, "max_window_layers", CONFIG)
            slides = [width is not None and layer >= first for layer in range(layers)]
        elif self.layers == "types" and self.every:
            every = whole(said, self.pattern, CONFIG) if said.get(self.pattern) is not None else self.every
            slides = [width is not None and (layer + 1) % every != 0 for layer in range(layers)]
        unclear = self.layers == "types" and not self.every and width is not None
        lost = ["layer_types is absent: versions of transformers disagree on which layers slide"] if unclear else []
        return ["sliding_attention" if slide else "full_attention" for slide in slides], lost


@dataclass(frozen=True)
class Scaled:
    """A softmax scale that config.json states, where others take 1 / sqrt(head size).

    ``TransformerConfig.softmax_scale`` has no argument in Megatron-LM, which reads it from a namespace all the same.

    Attributes:
        key: the key of config.json.
        power: the scale is the key's value to this power (``query_pre_attn_scalar``: -0.5).
    """

    key: str
    power: float = 1.0

    @property
    def owns(self) -> tuple[str, ...]:
        """The scale."""
        return ("softmax_scale",)

    @property
    def compared(self) -> Mapping[str, str]:
        """The key that states it."""
        return {self.key: "softmax_scale"}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The key's value to the power; nothing is lost."""
        return {"softmax_scale": positive(said, self.key, CONFIG) ** self.power}, []

    def to_hf(self, said: Said) -> dict[str, object]:
        """The key's value, a whole number where it is one to 1e-9 of itself; null without a scale."""
        if said.get("softmax_scale") is None:
            return {self.key: None}
        exact = positive(said, "softmax_scale", ARGS) ** (1 / self.power)
        near = round(exact)  # a power and its inverse leave a whole number by a few units in the last place
        return {self.key: near if abs(exact - near) < 1e-9 * exact else exact}

    def mismatches(self, said: Said) -> list[str]:
        """Args that state no scale."""
        return [] if said.get("softmax_scale") is not None else ["softmax_scale is not set, this family states one"]

    def needs(self, _said: Said) -> list[str]:
        """The scale: a field of TransformerConfig without an argument."""
        return ["softmax_scale: TransformerConfig has it, no argument sets it"]


def differing(said: Said, wanted: Mapping[str, object]) -> list[str]:
    """A reason for each arg that is not as wanted; unset, false and 0 are the same."""
    return [
        f"{arg} is {said.get(arg)}, this family has {value}"
        for arg, value in wanted.items()
        if said.get(arg) != value and (said.get(arg) or value)
    ]
