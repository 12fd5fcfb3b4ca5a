"""The feed-forward activations, as config.json names them and as Megatron's switches say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.fields import positive
from dconv.arch.translate import CONFIG, Said

#: Every arg that says something about it, as it is without (``core_transformer_config_from_args``).
OFF: Final[Mapping[str, object]] = {
    "swiglu": False,
    "squared_relu": False,
    "quick_geglu": False,
    "gated_linear_unit": None,  # a field of TransformerConfig; --swiglu and --quick-geglu set it
    "bias_gelu_fusion": None,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
}


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        names: what config.json may call it, first what is written.
        args: the switches that are not off.
        key: its key in config.json.
        limit: the key of the value that both halves are clamped to.
        lacking: what mainline Megatron-LM lacks for it, in words.
    """

    names: tuple[str, ...]
    args: Mapping[str, object] = field(hash=False)
    key: str = "hidden_act"
    lacking: str = ""
    limit: str = ""

    @property
    def owns(self) -> tuple[str, ...]:
        """Every switch of an activation."""
        return tuple(OFF)

    @property
    def compared(self) -> Mapping[str, str]:
        """The key of the clamp, where the family has one."""
        return {self.limit: "activation_func_clamp_value"} if self.limit else {}

    def facts(self, _said: Said) -> dict[str, Any]:
        """None: no shape follows from it."""
        return {}

    def to_args(self, said: Said, _facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """The family's switches and its clamp; a function of another name is lost."""
        named = said.get(self.key, self.names[0])
        lost = [] if named in self.names else [f"{self.key} {named}: the args of this family say {self.names[0]}"]
        written = {"swiglu": False, "squared_relu": False} if self.args.get("swiglu") else OFF
        clamp = {"activation_func_clamp_value": positive(said, self.limit, CONFIG)} if self.limit else {}
        return {**written, **self.args, **clamp}, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """The first of the names, and the clamp."""
        hf: dict[str, object] = {self.key: self.names[0]}
        clamp = said.get("activation_func_clamp_value")
        return {**hf, self.limit: clamp} if self.limit else hf

    def mismatches(self, said: Said) -> list[str]:
        """Switches that are not the family's; no clamp where it has one."""
        # whether the bias is added in the same kernel is no difference to a gated SiLU
        judged = {arg: off for arg, off in OFF.items() if arg != "bias_gelu_fusion" or arg in self.args}
        if self.args.get("swiglu"):
            del judged["gated_linear_unit"]
        clamped = said.get("activation_func_clamp_value") is not None
        if self.limit and clamped:
            judged["activation_func_clamp_value"] = positive(said, "activation_func_clamp_value", ARGS)
        reasons = differing(said, {**judged, **self.args})
        unclamped = self.limit and not clamped
        return [*reasons, "activation_func_clamp_value is not set, this family has one"] if unclamped else reasons

    def needs(self, _said: Said) -> list[str]:
        """What mainline lacks for it."""
        return [self.lacking] if self.lacking else []


SILU: Final = Activation(("silu", "swish"), {"swiglu": True})
#: Gated tanh-GELU (Gemma): ``fused_bias_geglu.py`` computes it, but no argument turns it on.
GEGLU: Final = Activation(
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    {"gated_linear_unit": True, "bias_gelu_fusion": True},
    lacking="a gated tanh-GELU: TransformerConfig.gated_linear_unit without --swiglu has no argument",
)
