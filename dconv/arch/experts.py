"""Mixture of experts as an aspect of a family: how many, in which layers, shared ones, and how the router chooses.

Sources: Megatron-LM's ``core/transformer/moe/router.py``, ``moe_utils.py`` (``topk_routing_with_score_function``,
``group_limited_topk``), ``core/models/gpt/gpt_layer_specs.py`` (``moe_layer_freq``); the routers of transformers'
``modeling_*.py``. Precision of the router, balancing losses and jitter are of training, not of the function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.fields import count, deep, flag, whole
from dconv.arch.routing import Router
from dconv.arch.translate import CONFIG, Said
from dconv.errors import Damaged
from dconv.sharding.parsed import is_list, is_list_or_tuple

#: Args with which Megatron's experts compute something that no family here does.
_UNSET: Final[Mapping[str, object]] = {
    "moe_expert_capacity_factor": None,  # drops tokens
    "moe_expert_rank_capacity_factor": None,
    "moe_mlp_glu_interleave_size": None,  # gate and up alternate in blocks of so many rows
    "moe_shared_expert_glu_interleave_size": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
#: Four times Switch-C's; lists of one entry an expert are built from it.
_MOST: Final = 8192
_SHARED: Final = "moe_shared_expert_intermediate_size"


@dataclass(frozen=True)
class Experts:
    """The experts of a family.

    Attributes:
        router: how tokens find them.
        count: the keys that may say how many there are, first what is written.
        width: the key of an expert's feed-forward size; where it is ``intermediate_size``, no layer is dense.
        shared: the key of what is shared: the whole width where it ends in ``_size``, else a number of experts of
            ``width`` each; none means that nothing is.
        shared_gate: whether the shared expert's output is gated.
        layers: which layers have experts: all, "late" (from ``first_k_dense_replace`` on), or "step" (each
            ``decoder_sparse_step``-th, less ``mlp_only_layers``).
        bias: whether router and experts have biases (where all linear layers have).
    """

    router: Router
    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"
    shared: str = ""
    shared_gate: bool = False
    layers: Literal["all", "late", "step"] = "all"
    bias: bool = False

    @property
    def owns(self) -> tuple[str, ...]:
        """How many, how wide, in which layers, and what the router judges."""
        return "num_experts", "moe_ffn_hidden_size", "moe_layer_freq", *self.router.owns

    @property
    def compared(self) -> Mapping[str, str]:
        """Keys of sizes and layers, and the router's."""
        keys = {self.count[0]: "num_experts", self.width: "moe_ffn_hidden_size"}
        if self.shared:
            keys[self.shared] = "moe_shared_expert_intermediate_size"
        where = {"all": (), "late": ("first_k_dense_replace",), "step": ("decoder_sparse_step", "mlp_only_layers")}
        return {**keys, **dict.fromkeys(where[self.layers], "moe_layer_freq"), **self.router.compared}

    def facts(self, said: Said) -> dict[str, Any]:
        """Sizes, and which layers have which part.

        Returns:
            experts, moe_ffn, shared_ffn (0: none), uniform_layers; for each layer: moe, dense, shared, shared_gate,
            router_bias, expert_bias (what balances the router's choice), expert_mlp_bias.
        """
        experts, width = self._experts(said), whole(said, self.width, CONFIG)
        shared = 0
        if self.shared and said.get(self.shared) is not None:
            shared = count(said, self.shared, CONFIG) * (1 if self.shared.endswith("_size") else width)
        moe = self._which(said)
        off = (False,) * len(moe)
        return {
            "experts": experts,
            "moe_ffn": width,
            "shared_ffn": shared,
            "uniform_layers": all(moe),
            "moe": moe,
            "dense": tuple(not here for here in moe),
            "shared": moe if shared else off,
            "shared_gate": moe if shared and self.shared_gate else off,
            "router_bias": moe if self.bias else off,
            "expert_bias": moe if self.router.expert_bias else off,
            "expert_mlp_bias": moe if self.bias else off,
        }

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Sizes, layers and the router's; a width of 0 for the expert that all share is lost."""
        router, lost = self.router.to_args(said, facts)
        if self.shared.endswith("_size") and not facts["shared_ffn"]:
            lost = [*lost, f"{self.shared} {said.get(self.shared)}: this family has a shared expert"]
        return {
            "num_experts": facts["experts"],
            "moe_ffn_hidden_size": facts["moe_ffn"],
            "moe_shared_expert_intermediate_size": facts["shared_ffn"] or None,
            "moe_shared_expert_gate": self.shared_gate and facts["shared_ffn"] > 0,
            "moe_layer_freq": 1 if facts["uniform_layers"] else [int(here) for here in facts["moe"]],
            **router,
        }, lost

    def to_hf(self, said: Said) -> dict[str, object]:
        """Sizes, layers and the router's, under the family's keys; nothing where the args have no experts."""
        if not said.get("num_experts"):
            return {}
        width = self._width(said)
        hf: dict[str, object] = {self.count[0]: whole(said, "num_experts", ARGS), self.width: width}
        if self.shared:
            shared = count({_SHARED: 0, **said}, _SHARED, ARGS)
            hf[self.shared] = shared if self.shared.endswith("_size") else shared // width
        moe = moe_layers(said)
        if self.layers == "late":
            hf["first_k_dense_replace"] = moe.index(True) if any(moe) else len(moe)
        if self.layers == "step":
            step = moe.index(True) + 1 if any(moe) else 1
            regular = [(layer + 1) % step == 0 for layer in range(len(moe))] == moe
            hf["decoder_sparse_step"] = step if regular else 1
            hf["mlp_only_layers"] = [] if regular else [layer for layer, here in enumerate(moe) if not here]
        return hf | self.router.to_hf(said)

    def mismatches(self, said: Said) -> list[str]:
        """No experts, or ones that the family's keys cannot say: another function, other layers, another shared one.

        Raises:
            Damaged: a size that is no whole number, or layers as in `moe_layers`.
        """
        if not said.get("num_experts"):
            return ["num_experts is not set, this family has experts"]
        whole(said, "num_experts", ARGS)
        shared, width = said.get(_SHARED), self._width(said)
        gate = flag(said, "moe_shared_expert_gate", ARGS)
        reasons = differing(said, _UNSET)
        if shared and not self.shared:
            reasons.append(f"moe_shared_expert_intermediate_size is {shared}, this family shares no expert")
        if self.shared.endswith("_size") and not shared:
            reasons.append("moe_shared_expert_intermediate_size is not set, this family has a shared expert")
        if shared and self.shared and not self.shared.endswith("_size"):
            size = whole(said, _SHARED, ARGS)
            if size % width:
                reasons.append(f"moe_shared_expert_intermediate_size is {size}, no multiple of an expert's {width}")
        if shared and gate != self.shared_gate:
            reasons.append(f"moe_shared_expert_gate is {gate}, this family has {self.shared_gate}")
        moe = moe_layers(said)
        if (self.layers == "all" and not all(moe)) or (self.layers == "late" and moe != sorted(moe)):
            where = "all layers" if self.layers == "all" else "all layers after the first dense ones"
            reasons.append(f"moe_layer_freq is {said.get('moe_layer_freq')!r:.80}, this family has experts in {where}")
        return reasons + self.router.mismatches(said)

    def needs(self, said: Said) -> list[str]:
        """What the router needs."""
        return self.router.needs(said)

    def _experts(self, said: Said) -> int:
        # an alias that a file gives stands before the default of the name that is written
        key = next((key for key in reversed(self.count) if said.get(key) is not None), self.count[0])
        experts = whole(said, key, CONFIG)
        if experts > _MOST:
            raise Damaged(f"{key} is {experts}", where=f"{CONFIG}: {key}", expected=f"at most {_MOST} experts")
        return experts

    def _width(self, said: Said) -> int:
        arg = "moe_ffn_hidden_size" if said.get("moe_ffn_hidden_size") is not None else "ffn_hidden_size"
        return whole(said, arg, ARGS)

    def _which(self, said: Said) -> tuple[bool, ...]:
        layers = range(deep(said, "num_hidden_layers", CONFIG))
        if self.layers == "late":
            first = count(said, "first_k_dense_replace", CONFIG)
            return tuple(layer >= first for layer in layers)
        if self.layers == "step":
            step = whole(said, "decoder_sparse_step", CONFIG)
            dense: object = said.get("mlp_only_layers") or []
            if not is_list(dense) or not all(type(layer) is int for layer in dense):
                raise Damaged("mlp_only_layers is no list of layers", where=f"{CONFIG}: mlp_only_layers")
            return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)
        return (True,) * len(layers)


def moe_layers(said: Said) -> list[bool]:
    """Which layers have experts, by ``moe_layer_freq``: each so many-th from the first on, or one entry a layer.

    Raises:
        Damaged: it is neither.
    """
    layers, freq = deep(said, "num_layers", ARGS), said.get("moe_layer_freq", 1)
    if type(freq) is int and freq > 0:
        return [layer % freq == 0 for layer in range(layers)]
    if is_list_or_tuple(freq) and len(freq) == layers and all(here in (0, 1) for here in freq):
        return [bool(here) for here in freq]
    raise Damaged("moe_layer_freq is neither a step nor one entry a layer", where=ARGS, found=f"{freq!r:.80}")
