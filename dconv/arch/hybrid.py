"""Stacks of Mamba mixers, attention, feed-forward layers and experts as aspects of a family: one module a layer.

Sources: Megatron-LM's ``megatron/core/ssm/mamba_mixer.py`` (whose norm has the epsilon 1e-5, and whose convolution is
four wide), ``mamba_block.py``, ``mamba_hybrid_layer_allocation.py`` (the letters), ``training/arguments.py``;
transformers' ``modeling_mamba2.py`` and ``modeling_nemotron_h.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.experts import Experts
from dconv.arch.fields import deep, flag, heads, multiple, not_negative, number, whole
from dconv.arch.translate import CONFIG, Said
from dconv.errors import Damaged
from dconv.sharding.parsed import is_list, is_list_or_tuple

#: A layer's letter on both sides, and what ``layers_block_type`` calls it, first what is written.
LAYERS: Final[Mapping[str, tuple[str, ...]]] = {
    "M": ("linear_attention", "mamba"),
    "*": ("full_attention", "attention"),
    "-": ("mlp",),
    "E": ("moe",),
}
PATTERN: Final = "hybrid_override_pattern"
#: Until 2026 a stack could be drawn from ratios; since then only a pattern says that there is one.
_RATIOS: Final = ("hybrid_attention_ratio", "hybrid_mlp_ratio")
_SPEC: Final = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]
_CONVOLUTION: Final = 4
_EPSILON: Final = 1e-5
#: A least time step that changes nothing: Megatron has none, and transformers takes the logarithm of its own.
_ANY_STEP: Final = 1e-9
#: What follows the 0 of ``time_step_limit``, as versions of transformers write it.
_NO_LIMIT: Final = ([math.inf], ["Infinity"], [{"__float__": "Infinity"}])


@dataclass(frozen=True)
class Mixer:
    """Mamba-2 mixers. A family's fields are the keys of its config.json.

    Attributes:
        least: the key of the least time step that transformers' class has (NVIDIA's own code has none).
        expand: the key that says how many times the hidden size the heads are wide together.
        residual: the key that says whether the residuals are in fp32.
        alone: whether the family has nothing else: then the args that Megatron demands of attention and feed-forward
            follow the mixer.
    """

    heads: str
    head_dim: str
    state: str
    act: str
    groups: str = "n_groups"
    kernel: str = "conv_kernel"
    conv_bias: str = "use_conv_bias"
    bias: str = "use_bias"
    epsilon: str = "layer_norm_epsilon"
    least: str = ""
    expand: str = ""
    residual: str = "residual_in_fp32"
    alone: bool = False

    @property
    def owns(self) -> tuple[str, ...]:
        """Sizes, the dtype of the residuals, and the least time step where the family has one."""
        return *self._sizes().values(), "fp32_residual_connection", *((self.least,) if self.least else ())

    @property
    def compared(self) -> Mapping[str, str]:
        """Sizes, and the least time step where the family has one."""
        return {**self._sizes(), **({self.least: self.least} if self.least else {})}

    def facts(self, said: Said) -> dict[str, Any]:
        """Sizes of the mixers.

        Returns:
            mamba_heads, mamba_head_dim, mamba_inner (their product), mamba_groups, mamba_state, mamba_bc (groups times
            state), mamba_conv.

        Raises:
            Damaged: a size that is impossible, or does not fit the others.
        """
        count, width = heads(said, self.heads, CONFIG), whole(said, self.head_dim, CONFIG)
        groups, state = heads(said, self.groups, CONFIG), whole(said, self.state, CONFIG)
        multiple(self.heads, count, self.groups, groups, CONFIG)
        if self.expand and number(said, self.expand, CONFIG) * whole(said, "hidden_size", CONFIG) != count * width:
            raise Damaged(
                f"{self.expand} times hidden_size is not what the heads are wide together",
                where=f"{CONFIG}: {self.expand}",
                expected=f"{self.heads} x {self.head_dim}, {count * width}",
                found=f"{said[self.expand]} x {said['hidden_size']}",
            )
        return {
            "mamba_heads": count,
            "mamba_head_dim": width,
            "mamba_inner": count * width,
            "mamba_groups": groups,
            "mamba_state": state,
            "mamba_bc": groups * state,
            "mamba_conv": whole(said, self.kernel, CONFIG),
        }

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Sizes and the dtype of residuals; another convolution, activation, bias or limit is lost."""
        lost: list[str] = []
        if facts["mamba_conv"] != _CONVOLUTION:
            lost.append(f"{self.kernel} {facts['mamba_conv']}: Megatron's is {_CONVOLUTION} wide")
        limit = said.get("time_step_limit")
        if limit is not None and (not isinstance(limit, list) or limit[:1] != [0.0] or limit[1:] not in _NO_LIMIT):
            lost.append(f"time_step_limit {limit!r:.60}: Megatron limits no time step")
        if said.get(self.act, "silu") not in ("silu", "swish"):
            lost.append(f"{self.act} {said[self.act]}: Megatron's mixer has silu")
        lost += [
            f"{key} {value}: Megatron's mixer has {'a' if not value else 'no'} such bias"
            for key, value in (
                (self.conv_bias, flag({self.conv_bias: True, **said}, self.conv_bias, CONFIG)),
                (self.bias, flag(said, self.bias, CONFIG)),
            )
            if value != (key == self.conv_bias)
        ]
        absent: dict[str, object] = {
            "num_attention_heads": facts["mamba_heads"],
            "num_query_groups": facts["mamba_heads"],
            "group_query_attention": False,
            "kv_channels": facts["mamba_head_dim"],
            "ffn_hidden_size": 4 * facts["hidden"],
        }
        return {
            **(absent if self.alone else {}),
            **({self.least: not_negative(said, self.least, CONFIG)} if self.least else {}),
            **{arg: facts[fact] for fact, arg in _ARG_OF.items()},
            "fp32_residual_connection": flag(said, self.residual, CONFIG),
        }, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """Sizes, and what is a constant of Megatron's mixer, under the family's keys."""
        count, width = self._heads(said), whole(said, "mamba_head_dim", ARGS)
        hf: dict[str, object] = {
            self.heads: count,
            self.head_dim: width,
            self.state: whole(said, "mamba_state_dim", ARGS),
            self.groups: whole(said, "mamba_num_groups", ARGS),
            self.kernel: _CONVOLUTION,
            self.act: "silu",
            self.conv_bias: True,
            self.bias: False,
        }
        if self.least:
            hf[self.least] = not_negative({self.least: _ANY_STEP, **said}, self.least, ARGS)
        if self.residual:
            hf[self.residual] = flag(said, "fp32_residual_connection", ARGS)
        if self.expand:
            hf[self.expand] = multiple("mamba_num_heads", count * width, "hidden_size", self._hidden(said), ARGS)
        return hf

    def mismatches(self, said: Said) -> list[str]:
        """Sizes that are not set, and heads that ``expand`` cannot say the width of."""
        lacking = [arg for arg in _ARG_OF.values() if said.get(arg) is None and arg != "mamba_num_heads"]
        if lacking:
            return [f"{', '.join(lacking)} not set, this family has Mamba mixers"]
        wide = self._heads(said) * whole(said, "mamba_head_dim", ARGS)
        if self.expand and wide % self._hidden(said):
            return [f"the Mamba heads are {wide} wide together, no multiple of hidden_size {self._hidden(said)}"]
        return []

    def needs(self, said: Said) -> list[str]:
        """Another epsilon than Megatron's, and a least time step."""
        epsilon = number(said, self.epsilon, CONFIG)
        lines: list[str] = []
        if epsilon != _EPSILON:
            lines.append(f"an epsilon of {epsilon} in the mixer's norm (megatron-core: 1e-5)")
        if self.least and number(said, self.least, CONFIG) > 0:
            lines.append(f"time steps of {self.least} {said[self.least]} or more, as transformers computes them")
        return lines

    def _sizes(self) -> dict[str, str]:
        keys = (self.heads, self.head_dim, self.groups, self.state)
        return dict(zip(keys, _ARG_OF.values(), strict=True))

    def _heads(self, said: Said) -> int:
        """Without the arg, Megatron's mixer is twice as wide as the model."""
        if said.get("mamba_num_heads") is not None:
            return whole(said, "mamba_num_heads", ARGS)
        width = whole(said, "mamba_head_dim", ARGS)
        return multiple("twice hidden_size", 2 * self._hidden(said), "mamba_head_dim", width, ARGS)

    def _hidden(self, said: Said) -> int:
        return whole(said, "hidden_size", ARGS)


#: A fact and the arg that says it.
_ARG_OF: Final = {
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_groups": "mamba_num_groups",
    "mamba_state": "mamba_state_dim",
}


@dataclass(frozen=True)
class Stack:
    """Which module each layer is.

    Attributes:
        letters: the kinds of layers that the family has (`LAYERS`).
        experts: what layers of experts have.
    """

    letters: str = "M"
    experts: Experts | None = None

    @property
    def owns(self) -> tuple[str, ...]:
        """The pattern under each of its names, and what the experts judge."""
        own = (PATTERN, "hybrid_layer_pattern", "is_hybrid_model", "spec", *_RATIOS)
        return (*own, *self.experts.owns) if self.experts else own

    @property
    def compared(self) -> Mapping[str, str]:
        """The pattern, if there are several kinds of layers, and the experts' keys."""
        own = {PATTERN: PATTERN} if len(self.letters) > 1 else {}
        return {**own, **self.experts.compared} if self.experts else own

    def facts(self, said: Said) -> dict[str, Any]:
        """For each layer: mamba, conv_bias, attention, mlp, fc_bias; where there are experts their facts."""
        pattern = layers_of(said)
        if set(pattern) - set(self.letters):
            raise Damaged(
                "a kind of layer that this family does not have",
                where=CONFIG,
                expected=f"letters {self.letters}",
                found=pattern[:120],
            )
        mamba, mlp, moe = (tuple(here == letter for here in pattern) for letter in "M-E")
        found: dict[str, Any] = {}
        if self.experts and any(moe):
            own = self.experts.facts(said)
            found = {key: moe if is_list_or_tuple(value) and any(value) else value for key, value in own.items()}
        bias, wide = flag(said, "mlp_bias", CONFIG), said.get("moe_latent_size") is not None
        return {
            **found,
            "uniform_layers": False,
            "mamba": mamba,
            "conv_bias": mamba if flag({"use_conv_bias": True, **said}, "use_conv_bias", CONFIG) else False,
            "attention": tuple(here == "*" for here in pattern),
            "mlp": mlp,
            "fc_bias": mlp if bias else False,
            "moe": moe,
            "latent": moe if wide else False,
            "moe_in": whole(said, "moe_latent_size" if wide else "hidden_size", CONFIG),
        }

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The pattern and the experts'; biases beside experts are lost."""
        args: dict[str, object] = {}
        lost: list[str] = []
        if self.experts and any(facts["moe"]):
            args, lost = self.experts.to_args(said, facts)
            args |= {"moe_layer_freq": 1, "moe_latent_size": said.get("moe_latent_size")}
            if facts["fc_bias"]:
                lost.append("mlp_bias with experts: Megatron's have biases only where all linear layers have")
        return {
            **args,
            PATTERN: layers_of(said),
            "is_hybrid_model": True,
            **dict.fromkeys(_RATIOS, 0.0),
            "spec": list(_SPEC),
        }, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """The pattern, if there are several kinds of layers, and the experts' keys if a layer has some."""
        pattern, _ = _pattern_of(said)
        hf: dict[str, object] = {PATTERN: pattern} if len(self.letters) > 1 else {}
        if self.experts and "E" in pattern:
            latent = said.get("moe_latent_size")
            hf |= {**self.experts.to_hf(said), "n_shared_experts": 1, "moe_latent_size": latent}
        return hf

    def mismatches(self, said: Said) -> list[str]:
        """No pattern, a kind of layer that the family has not, or other experts."""
        pattern, reason = _pattern_of(said)
        if reason:
            return [reason]
        strange = sorted(set(pattern) - set(self.letters))
        if strange:
            return [f"the pattern has {', '.join(strange)}, this family has {', '.join(self.letters)}"]
        if self.experts and "E" in pattern:
            return self.experts.mismatches({**said, "moe_latent_size": None})
        return differing(said, {"num_experts": None})

    def needs(self, said: Said) -> list[str]:
        """What the experts need, if a layer has some."""
        return self.experts.needs(said) if self.experts and "E" in layers_of(said) else []


@dataclass(frozen=True)
class Unplaced:
    """No embedding of positions: the mixers know the order."""

    @property
    def owns(self) -> tuple[str, ...]:
        """The kind of positions."""
        return "position_embedding_type", "use_rotary_position_embeddings"

    @property
    def compared(self) -> Mapping[str, str]:
        """No key."""
        return {}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, _said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """That there are none."""
        return {"position_embedding_type": "none", "use_rotary_position_embeddings": False}, []

    def to_hf(self, _said: Said) -> dict[str, object]:
        """Nothing: the class has no key for it."""
        return {}

    def mismatches(self, said: Said) -> list[str]:
        """Positions of some kind."""
        return differing(said, {"position_embedding_type": "none"})

    def needs(self, _said: Said) -> list[str]:
        """Nothing: mainline megatron-core computes it."""
        return []


def layers_of(said: Said) -> str:
    """The letter of each layer, from ``layers_block_type`` or ``hybrid_override_pattern``; without either all ``M``.

    Raises:
        Damaged: an unknown kind, or another number of layers than ``num_hidden_layers`` says.
    """
    kinds, pattern = said.get("layers_block_type"), said.get(PATTERN)
    letter = {name: letter for letter, names in LAYERS.items() for name in names}
    if is_list(kinds) and all(isinstance(kind, str) and kind in letter for kind in kinds):
        pattern = "".join(letter[kind] for kind in kinds)
    elif kinds is not None:
        raise Damaged("an unknown kind of layer", where=f"{CONFIG}: layers_block_type", found=f"{kinds!r:.120}")
    if pattern is None:
        return "M" * deep(said, "num_hidden_layers", CONFIG)
    if not isinstance(pattern, str) or not pattern or set(pattern) - set(LAYERS):
        raise Damaged(f"{PATTERN} is no row of {' '.join(LAYERS)}", where=CONFIG, found=f"{pattern!r:.120}")
    layers = said.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise Damaged(
            "num_hidden_layers is not the number of layers that the pattern has",
            where=CONFIG,
            expected=str(len(pattern)),
            found=f"{layers!r:.60}",
        )
    return pattern


def _pattern_of(said: Said) -> tuple[str, str]:
    """The pattern that Megatron's args say, and why there is none that is understood here."""
    pattern = said.get("hybrid_layer_pattern") or said.get(PATTERN)
    layers = deep(said, "num_layers", ARGS)
    if pattern is None:
        if not said.get("is_hybrid_model") and "mamba" not in str(said.get("spec")):
            return "", f"neither {PATTERN} nor is_hybrid_model is set, this family has Mamba mixers"
        drawn = [ratio for ratio in _RATIOS if said.get(ratio)]
        return "M" * layers, f"{', '.join(drawn)}: layers drawn from ratios, without a pattern" if drawn else ""
    if not isinstance(pattern, str):
        return "", f"the hybrid pattern is {pattern!r:.60}, no text"
    letters = pattern.replace("|", "")  # where newer versions cut the pipeline
    if "/" in letters:
        return "", f"the hybrid pattern {letters!r:.120} has token predictors"
    return letters, "" if len(letters) == layers else f"the hybrid pattern has {len(letters)} layers of {layers}"
