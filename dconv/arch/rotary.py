"""Rotary position embedding as an aspect of a family: which kinds it has, and which part of a head it rotates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.fields import number, table, whole
from dconv.arch.rope import LONGROPE, TABLE, longrope, rope_from_args, rope_parameters, rope_to_args
from dconv.arch.translate import CONFIG, Said
from dconv.sharding.parsed import is_mapping

#: What mainline megatron-core would have to compute with a carried longrope.
LONGROPE_NEEDS: Final = "rope_type longrope: a factor for each frequency, short and long"


@dataclass(frozen=True)
class Rope:
    """How positions are rotated.

    Attributes:
        kinds: the only ``rope_type`` that transformers' class understands as the others do; none means all.
        part: the key that says which part of a head is rotated, the first ones: a fraction
            (``partial_rotary_factor``), or a number of them where the key ends in ``_dim``; none means whole heads.
        interleaved: whether neighbours are rotated together instead of the two halves of a head.
        longrope: whether a longrope's table is carried along in the args (`needs` says that Megatron lacks it).
        stretched: whether transformers' class scales by itself where config.json has no table that says otherwise.
    """

    kinds: tuple[str, ...] = ()
    part: str = ""
    interleaved: bool = False
    longrope: bool = False
    stretched: bool = False

    @property
    def owns(self) -> tuple[str, ...]:
        """Which part of a head is rotated, which elements together, and a longrope's table."""
        return ("rotary_percent", "rotary_interleaved", *((TABLE,) if self.longrope else ()))

    @property
    def compared(self) -> Mapping[str, str]:
        """Base, scaling, and the key of the part that is rotated."""
        keys = {"rope_theta": "rotary_base", "rope_scaling": "use_rope_scaling"}
        return {**keys, self.part: "rotary_percent"} if self.part else keys

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Base, scaling and the part that is rotated, as a fraction; a scaling that the class has not is lost."""
        said, percent = {**said}, 1.0
        if self.part and said.get(self.part) is not None:
            given = number(said, self.part, CONFIG)
            said["partial_rotary_factor"] = given / facts["head_dim"] if self.part.endswith("_dim") else given
        rope = rope_parameters(said)
        if self.part:
            percent = number({"of": rope.pop("partial_rotary_factor", 1.0)}, "of", CONFIG)
        kind, carried = str(rope["rope_type"]), {}
        if self.longrope and kind == LONGROPE:
            carried[TABLE] = longrope(said, round(facts["head_dim"] * percent), CONFIG)
            rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        args, lost = rope_to_args(rope)
        return {
            **args,
            "rotary_percent": percent,
            "rotary_interleaved": self.interleaved,
            **carried,
        }, lost + self._kind(kind)

    def to_hf(self, said: Said) -> dict[str, object]:
        """Base and scaling, the part under the family's key, a longrope's table where the args carry one."""
        hf = rope_from_args(said)[0]
        if self.stretched and hf["rope_scaling"] is None:
            hf["rope_parameters"] = {"rope_type": "default", "rope_theta": hf["rope_theta"]}
        if self.longrope and said.get(TABLE) is not None:
            rotated = number(said, "rotary_percent", ARGS) * whole(said, "kv_channels", ARGS)
            hf[TABLE] = longrope(said, round(rotated), ARGS)
        if self.part:
            percent = number(said, "rotary_percent", ARGS)
            whole_head = whole(said, "kv_channels", ARGS)
            hf[self.part] = round(percent * whole_head) if self.part.endswith("_dim") else percent
        return hf

    def mismatches(self, said: Said) -> list[str]:
        """Another part or other elements together, or a scaling that the class has not."""
        rope, odd = rope_from_args(said)
        scaling = rope["rope_scaling"]
        kind = str(scaling.get("rope_type")) if is_mapping(scaling) else "default"
        whole_heads = {} if self.part else {"rotary_percent": 1.0}
        return differing(said, {**whole_heads, "rotary_interleaved": self.interleaved}) + odd + self._kind(kind)

    def needs(self, said: Said) -> list[str]:
        """A longrope's factors, where they are carried."""
        carried = self.longrope and rope_parameters(said)["rope_type"] == LONGROPE
        return [LONGROPE_NEEDS] if carried else []

    def _kind(self, kind: str) -> list[str]:
        known = not self.kinds or kind in self.kinds
        return [] if known else [f"rope_type {kind}: this family has {', '.join(self.kinds)}"]


_SLIDES, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class TwoBases:
    """Rotation of whole heads with one base, perhaps scaled, and in layers with a window with another, unscaled.

    A config.json of transformers 5 has a table for each kind of layer in ``rope_parameters``; older ones have ``key``
    beside ``rope_theta`` and ``rope_scaling`` (``Gemma3TextConfig.convert_rope_params_to_dict``).

    Attributes:
        key: the key of the other base, and the arg that carries it: Megatron-LM has none.
    """

    key: str = "rope_local_base_freq"

    @property
    def owns(self) -> tuple[str, ...]:
        """Those of `Rope`, and the other base."""
        return *Rope().owns, self.key

    @property
    def compared(self) -> Mapping[str, str]:
        """Those of `Rope`, and the key of the other base."""
        return {**Rope().compared, self.key: self.key}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Those of `Rope`, and the other base; scaling in the layers with a window is lost."""
        tables = table(said, "rope_parameters", CONFIG)
        full = {**table(tables, _FULL, CONFIG), **table(said, "rope_scaling", CONFIG)}
        slides = table(tables, _SLIDES, CONFIG)
        args, lost = Rope().to_args({**said, "rope_parameters": None, "rope_scaling": full}, facts)
        base = number({self.key: slides.pop("rope_theta", said.get(self.key))}, self.key, CONFIG)
        kind = slides.pop("rope_type", slides.pop("type", "default"))
        if foreign := sorted(tables.keys() - {_SLIDES, _FULL}):
            lost.append(f"rope_parameters has {', '.join(foreign)}: this family has a table for each kind of layer")
        if kind != "default" or slides:
            lost.append(f"rope_parameters of {_SLIDES}: rope_type {kind} {slides!r:.60}: nothing is scaled there")
        return {**args, self.key: base}, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """Those of `Rope`, and the other base in its older spelling."""
        base = None if said.get(self.key) is None else number(said, self.key, ARGS)
        return {**Rope().to_hf(said), self.key: base}

    def mismatches(self, said: Said) -> list[str]:
        """Those of `Rope`, and args without the other base."""
        unset = [] if said.get(self.key) is not None else [f"{self.key} is not set, this family has one"]
        return Rope().mismatches(said) + unset

    def needs(self, _said: Said) -> list[str]:
        """The other base."""
        return [f"{self.key}: layers with a window are rotated with a base of their own, unscaled"]
