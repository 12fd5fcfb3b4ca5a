"""How a router turns scores into the experts of a token and their weights, as both sides say it.

Sources: ``topk_routing_with_score_function`` and ``group_limited_topk`` in Megatron-LM's
``core/transformer/moe/moe_utils.py``; the ``*TopKRouter`` classes of transformers' ``modeling_*.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from dconv.arch.args import ARGS
from dconv.arch.attention import differing
from dconv.arch.fields import flag, number, whole
from dconv.arch.translate import CONFIG, Said
from dconv.sharding.parsed import is_list_or_tuple

#: Own arg: by how many of its experts a group is judged, where Megatron would take topk // group_topk.
_GROUP_SCORE: Final = "moe_router_group_score_topk"


@dataclass(frozen=True)
class Router:
    """The router of a family.

    Attributes:
        score: softmax or sigmoid.
        normalised: whether the weights of the chosen experts sum to 1: a constant of the family, or its key.
        scaling: the key of a factor on all weights; none means that there is none.
        expert_bias: whether a learned bias takes part in the choice but not in the weight.
        groups_judged_by: by how many of its best experts a group is judged (``n_group``, ``topk_group``); 0: the
            family chooses no groups.
        grouped_if: a key, its value where groups are chosen, and where not; none means that they always are.
        dtype: ``moe_router_dtype`` as transformers computes the scores.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool | str = True
    scaling: str = ""
    expert_bias: bool = False
    groups_judged_by: int = 0
    grouped_if: tuple[str, str, str] | None = None
    dtype: str | None = None

    @property
    def owns(self) -> tuple[str, ...]:
        """How many experts a token has, and how scores become weights."""
        return "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"

    @property
    def compared(self) -> Mapping[str, str]:
        """The keys that this family has of it."""
        keys = {"num_experts_per_tok": "moe_router_topk"}
        if isinstance(self.normalised, str):
            keys[self.normalised] = "moe_router_pre_softmax"
        if self.scaling:
            keys[self.scaling] = "moe_router_topk_scaling_factor"
        if self.groups_judged_by:
            keys |= {"n_group": "moe_router_num_groups", "topk_group": "moe_router_group_topk"}
        return keys

    def to_args(self, said: Said, facts: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
        """Args, and what they cannot say: numbers that do not fit, and weights that Megatron makes otherwise.

        Args:
            said: config.json.
            facts: ``experts``, how many there are.
        """
        topk, normalised = whole(said, "num_experts_per_tok", CONFIG), self._normalised(said)
        lost: list[str] = []
        if topk > facts["experts"]:
            lost.append(f"num_experts_per_tok {topk}: there are {facts['experts']} experts")
        if topk == 1 and normalised:
            lost.append("num_experts_per_tok 1 with weights that sum to 1: Megatron leaves one expert its own score")
        if self.score == "sigmoid" and not normalised:
            lost.append(f"{self.normalised} False: Megatron's sigmoid scores are made to sum to 1")
        args: dict[str, object] = {
            "moe_router_topk": topk,
            "moe_router_score_function": self.score,
            "moe_router_pre_softmax": self.score == "softmax" and not normalised,
            "moe_router_enable_expert_bias": self.expert_bias,
            "moe_router_topk_scaling_factor": number(said, self.scaling, CONFIG) if self.scaling else None,
            "moe_router_dtype": self.dtype,
        }
        if args["moe_router_topk_scaling_factor"] == 0:
            lost.append(f"{self.scaling} 0: Megatron takes it for 1")
        groups, reasons = self._groups(said, topk, facts["experts"])
        return {**args, **groups}, lost + reasons

    def to_hf(self, said: Said) -> dict[str, object]:
        """The keys that this family has of it, for args that match."""
        hf: dict[str, object] = {"num_experts_per_tok": whole({"moe_router_topk": 2, **said}, "moe_router_topk", ARGS)}
        if isinstance(self.normalised, str):
            hf[self.normalised] = self.score == "sigmoid" or not flag(said, "moe_router_pre_softmax", ARGS)
        if self.scaling:
            factor = said.get("moe_router_topk_scaling_factor") or 1.0
            hf[self.scaling] = number({self.scaling: factor}, self.scaling, ARGS)
        if self.groups_judged_by:
            grouped = said.get("moe_router_group_topk") is not None
            hf["n_group"] = whole(said, "moe_router_num_groups", ARGS) if grouped else 1
            hf["topk_group"] = whole(said, "moe_router_group_topk", ARGS) if grouped else 1
            if self.grouped_if:
                key, with_groups, without = self.grouped_if
                hf[key] = with_groups if grouped else without
        return hf

    def mismatches(self, said: Said) -> list[str]:
        """Another score, bias, factor or choice of groups, and a weight of one expert that Megatron makes otherwise."""
        topk = whole({"moe_router_topk": 2, **said}, "moe_router_topk", ARGS)
        wanted: dict[str, object] = {
            "moe_router_score_function": self.score,
            "moe_router_enable_expert_bias": self.expert_bias,
        }
        if self.score == "softmax" and isinstance(self.normalised, bool):
            wanted["moe_router_pre_softmax"] = not self.normalised
        if not self.groups_judged_by:
            wanted |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
        reasons = differing({"moe_router_score_function": "softmax", **said}, wanted)
        pre_softmax = flag(said, "moe_router_pre_softmax", ARGS)
        if topk == 1 and (self.score == "sigmoid" or not pre_softmax):
            reasons.append("moe_router_topk is 1: its weight is its score in Megatron, 1 in this family")
        if not self.scaling and said.get("moe_router_topk_scaling_factor") not in (None, 0, 1):
            reasons.append(f"moe_router_topk_scaling_factor is {said['moe_router_topk_scaling_factor']}, it has none")
        balancing = said.get("moe_router_load_balancing_type")
        for kind in balancing if is_list_or_tuple(balancing) else (balancing,):
            if kind in ("sinkhorn", "quantile_balancing"):
                reasons.append(f"moe_router_load_balancing_type is {kind}, this family takes the best scores")
        if said.get("moe_router_topk_limited_devices") is not None:
            reasons.append("moe_router_topk_limited_devices is set: name the groups with moe_router_num_groups")
        if self.groups_judged_by and said.get("moe_router_group_topk") is not None:
            by = said.get(_GROUP_SCORE) or topk // whole(said, "moe_router_group_topk", ARGS)
            if by != self.groups_judged_by:
                reasons.append(
                    f"moe_router_topk // moe_router_group_topk is {by}, this family judges a group by its best "
                    f"{self.groups_judged_by}"
                )
        return reasons

    def needs(self, said: Said) -> list[str]:
        """Groups that are judged by another number of experts than Megatron's."""
        topk = whole(said, "num_experts_per_tok", CONFIG)
        by = self._groups(said, topk, topk)[0].get(_GROUP_SCORE)
        return [f"groups of experts judged by their best {by} (Megatron: topk // group_topk)"] if by else []

    def _normalised(self, said: Said) -> bool:
        return flag(said, self.normalised, CONFIG) if isinstance(self.normalised, str) else self.normalised

    def _groups(self, said: Said, topk: int, experts: int) -> tuple[dict[str, object], list[str]]:
        """Groups and how many are chosen; none where all are."""
        none: dict[str, object] = {"moe_router_num_groups": None, "moe_router_group_topk": None}
        if self.grouped_if and said.get(self.grouped_if[0]) != self.grouped_if[1]:
            key, with_groups, without = self.grouped_if
            known = said.get(key) == without
            return none, [] if known else [f"{key} {said.get(key)}: this family has {without} and {with_groups}"]
        if not self.groups_judged_by or said.get("n_group") is None or said.get("topk_group") is None:
            return none, []
        groups, chosen = whole(said, "n_group", CONFIG), whole(said, "topk_group", CONFIG)
        if groups == chosen:
            return none, []
        lost = []
        if chosen > groups or experts % groups or topk > experts // groups * chosen:
            lost = [f"n_group {groups}, topk_group {chosen}: {topk} of {experts} experts cannot be chosen so"]
        args: dict[str, object] = {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
        if topk // chosen != self.groups_judged_by:
            args[_GROUP_SCORE] = self.groups_judged_by
        return args, lost
