"""Experts as a feed-forward layer of their own: a softmax router, its best experts, and what all tokens pass.

Named and laid out as transformers' own (``MixtralExperts`` and its like), so that whatever reads, listens to and
replaces experts takes these for one more family's. Only what builds a model imports this: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP


class Router(nn.Module):
    """Finds a token's experts.

    Args:
        chosen: experts of a token.
        normalised: whether their weights sum to 1; else they are the softmax over all experts.
    """

    def __init__(self, experts: int, hidden: int, chosen: int, normalised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.chosen, self.normalised = chosen, normalised

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights, both [tokens, chosen]."""
        weights, index = linear(x, self.weight).float().softmax(-1).topk(self.chosen, -1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return index, weights.to(x.dtype)


class Experts(nn.Module):
    """down(act(gate(x)) · up(x)) of each expert that has tokens, times their weights."""

    def __init__(self, experts: int, hidden: int, width: int, act: str) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.act_fn: Callable[[Tensor], Tensor] = ACT2FN[act]

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Their answers [tokens, hidden].

        Args:
            x: [tokens, hidden].
            index: of each token's experts, [tokens, chosen].
            weights: theirs, [tokens, chosen].
        """
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            tokens, place = torch.where(index == expert)
            if len(tokens):
                gate, up = linear(x[tokens], self.gate_up_proj[expert]).chunk(2, -1)
                answer = linear(self.act_fn(gate) * up, self.down_proj[expert])
                out.index_add_(0, tokens, answer * weights[tokens, place, None])
        return out


class Moe(nn.Module):
    """Experts, and where there are shared ones, these for every token."""

    def __init__(self, router: Router, experts: Experts, shared: nn.Module | None) -> None:
        super().__init__()
        self.gate, self.experts = router, experts
        if shared is not None:
            self.shared_experts = shared

    def forward(self, x: Tensor) -> Tensor:
        """What the feed-forward layer adds to hidden states [samples, length, hidden], of their shape."""
        flat = x.reshape(-1, x.shape[-1])
        out = self.experts(flat, *self.gate(flat)).view_as(x)
        return out + self.shared_experts(x) if hasattr(self, "shared_experts") else out


def put_experts(net: Any, facts: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Give a decoder experts, in the layers that have them, on torch's current device and with no values.

    Args:
        net: a model of transformers with ``model.layers``.
        facts: `dconv.arch.experts.Experts.facts`.
        args: `dconv.arch.routing.Router.to_args`, of a router by softmax.
    """
    hidden, act = net.config.hidden_size, net.config.hidden_act
    count, width, shared = facts["experts"], facts["moe_ffn"], facts["shared_ffn"]
    for layer, here in zip(net.model.layers, facts["moe"], strict=True):
        if here:
            sizes = SimpleNamespace(hidden_size=hidden, intermediate_size=shared, mlp_bias=False, hidden_act=act)
            layer.mlp = Moe(
                Router(count, hidden, args["moe_router_topk"], not args["moe_router_pre_softmax"]),
                Experts(count, hidden, width, act),
                LlamaMLP(sizes) if shared else None,
            )
