"""Experts that transformers keeps in one tensor, as linear layers of their own: each can be listened to and replaced.

The same function as transformers' own loop over experts (``Qwen2MoeExperts`` and its like): an expert's answer to a
token is multiplied by the token's routing weight, whatever top-k and normalisation the family's router has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dconv.errors import Refused

if TYPE_CHECKING:
    import torch

    from dconv.net.weights import Weights

#: Called with an expert's number, what comes to its projection [tokens, in], and the tokens' routing weights [tokens].
#: Says whether that was all that this expert had to do.
Listen = Callable[[int, "torch.Tensor", "torch.Tensor"], bool]


def is_experts(module: Any) -> bool:
    """Whether a module of transformers holds a layer's experts, each as a slice of its parameters."""
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))


class Experts:
    """A layer's experts.

    Attributes:
        inner: names of the logical weights of each expert that its input goes to: gate and up.
        outer: and of the one that its output comes from.
        weights: the weights by name, [out, in].
        on_inner, on_outer: called before an expert's inner projections, and before its outer one.
        after: called when all experts have had their tokens.
        recall: given nothing, finds an answer that does not change any more; given the answer, may keep it.

    Raises:
        Refused: they compute something else than down(act(gate(x)) · up(x)).
    """

    def __init__(self, module: Any, name: str, weights: Weights, device: str) -> None:
        import torch

        self.inner = weights.sources(f"{name}.gate_up_proj")
        self.outer = [names[0] for names in weights.sources(f"{name}.down_proj") if len(names) == 1]
        self._module = module
        alike = len(self.inner) == len(self.outer) and all(len(names) == 2 for names in self.inner)
        extra = [key for key, _ in module.named_parameters() if key not in ("gate_up_proj", "down_proj")]
        if not alike or not self.outer or extra or not callable(getattr(module, "act_fn", None)):
            raise Refused(
                "these experts are not calibrated, nothing was written",
                where=name,
                expected="for each expert a gate, an up and a down projection, without biases",
                found=f"{type(module).__name__} with {', '.join(extra) or 'other weights'}",
                do="FORMAT mx and fp8 need no calibration",
            )
        joined = weights.expert(f"{name}.gate_up_proj", 0)
        self.weights = {
            source: weights.logical(source).to(device) for names in (*self.inner, tuple(self.outer)) for source in names
        }
        if not torch.equal(joined.to(device), torch.cat([self.weights[source] for source in self.inner[0]])):
            raise Refused(
                "these experts' matrices are turned, which is not calibrated, nothing was written", where=name
            )
        self.on_inner: Listen = lambda *_: False
        self.on_outer: Listen = lambda *_: False
        self.after: Callable[[], None] = lambda: None
        self.recall: Callable[[torch.Tensor | None], torch.Tensor | None] = lambda _: None
        module.__dict__["forward"] = self._forward

    def remove(self) -> None:
        """Give the module its own forward pass back."""
        self._module.__dict__.pop("forward", None)
        self.weights.clear()

    def _forward(self, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn.functional import linear

        if (kept := self.recall(None)) is not None:
            return kept
        out = torch.zeros_like(hidden)
        for expert, (gate, up) in enumerate(self.inner):
            tokens, place = torch.where(index == expert)
            if not len(tokens):
                continue
            x, weight = hidden[tokens], routing[tokens, place]
            if self.on_inner(expert, x, weight):
                continue
            x = self._module.act_fn(linear(x, self.weights[gate])) * linear(x, self.weights[up])
            if self.on_outer(expert, x, weight):
                continue
            out.index_add_(0, tokens, linear(x, self.weights[self.outer[expert]]) * weight[:, None])
        self.after()
        self.recall(out)
        return out
