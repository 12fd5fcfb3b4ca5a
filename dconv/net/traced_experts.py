"""Experts as a graph can have them: each one on all tokens, times its weight, which is 0 where it was not chosen.

transformers' own forms either loop over the experts that tokens chose, which no tracer can follow, or gather a copy of
an expert's matrices for each token, which takes more memory than the model. Only what traces a model imports this: it
needs torch.
"""

from __future__ import annotations

from importlib import import_module
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from dconv.net.experts import Experts

#: Under this name transformers takes it (``experts`` of `dconv.net.skeleton.built`).
NAME: Final = "dconv_every_expert"


def register() -> str:
    """Make it known to transformers; returns `NAME`."""
    import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS.register(NAME, every_expert)
    return NAME


def use(net: Any) -> None:
    """Give it to the experts of `dconv.net.experts`, which transformers knows nothing of."""
    for module in net.modules():
        if isinstance(module, Experts):
            module.forward = MethodType(every_expert, module)


def every_expert(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What the tokens' experts make of them.

    Args:
        self: a module of experts, transformers' or our own.
        hidden: [tokens, hidden].
        index: of each token's experts, [tokens, chosen].
        weights: theirs, [tokens, chosen].
    """
    bias, gated = getattr(self, "has_bias", False), getattr(self, "has_gate", True)
    turned = getattr(self, "is_transposed", False)
    first = "gate_up_proj" if gated else "up_proj"

    def through(x: Tensor, name: str, expert: int) -> Tensor:
        matrix = getattr(self, name)[expert]
        extra = getattr(self, f"{name}_bias")[expert] if bias else None
        return linear(x, matrix.transpose(0, 1) if turned else matrix, extra)

    out = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        share = (weights * (index == expert)).sum(-1, keepdim=True)
        inner = through(hidden, first, expert)
        if hasattr(self, "_apply_gate") and gated:
            inner = self._apply_gate(inner)
        elif gated:
            gate, up = inner.chunk(2, -1)
            inner = self.act_fn(gate) * up
        else:
            inner = self.act_fn(inner)
        answer = through(inner, "down_proj", expert)
        if getattr(self, "has_post_expert_norm", False):
            answer = self.post_expert_norm(answer)
        # not answer * 0: of a token that is not its own an expert may make infinity
        out = out + torch.where(share != 0, answer * share, 0).to(out.dtype)
    return out
