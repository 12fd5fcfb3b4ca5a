"""Experts that transformers keeps in one tensor, as linear layers of their own: each can be listened to and replaced.

The same function as transformers' own loop over experts (``Qwen2MoeExperts`` and its like): an expert's answer to a
token is multiplied by the token's routing weight, whatever top-k and normalisation the family's router has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dconv.errors import Refused
from dconv.net.untyped import listed
from dconv.quant.peers import AWAY, Peers

if TYPE_CHECKING:
    import torch

    from dconv.net.weights import Weights

#: Called with an expert's number, what comes to its projection [tokens, in], the tokens' routing weights [tokens], and
#: the item (block, sample) that they are of.
Hear = Callable[[int, "torch.Tensor", "torch.Tensor", Any], None]

#: How far a pass goes: to what comes to the inner projections, to what comes to the outer one, to the end.
INNER, OUTER, END = range(3)


def is_experts(module: Any) -> bool:
    """Whether a module of transformers holds a layer's experts, each as a slice of its parameters."""
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))


def _unheard(_expert: int, _x: torch.Tensor, _weights: torch.Tensor, _item: Any) -> None:
    pass


class Experts:
    """A layer's experts, or of several ranks' those that are this one's.

    Attributes:
        inner: names of the logical weights of each expert that its input goes to: gate and up.
        outer: and of the one that its output comes from.
        names: all of these.
        mine: the experts that are here.
        weights: those of this rank's experts by name, [out, in].
        on_inner, on_outer: called before an expert's inner projections, and before its outer one.
        until: asked how far to go.
        after: called when all experts have had their tokens.
        recall: given nothing, finds an answer that does not change any more; given the answer, may keep it.

    Raises:
        Refused: they compute something else than down(act(gate(x)) · up(x)).
    """

    def __init__(self, module: Any, name: str, weights: Weights, device: str, peers: Peers) -> None:
        import torch

        self.inner = weights.sources(f"{name}.gate_up_proj")
        self.outer = [names[0] for names in weights.sources(f"{name}.down_proj") if len(names) == 1]
        self.names = frozenset(source for names in (*self.inner, self.outer) for source in names)
        self._module, self._peers = module, peers
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
        self.mine = peers.mine(len(self.inner))
        joined = weights.expert(f"{name}.gate_up_proj", self.mine[0])
        self.weights = {
            source: weights.logical(source).to(device)
            for expert in self.mine
            for source in (*self.inner[expert], self.outer[expert])
        }
        if not torch.equal(joined.to(device), torch.cat([self.weights[source] for source in self.inner[self.mine[0]]])):
            raise Refused(
                "these experts' matrices are turned, which is not calibrated, nothing was written", where=name
            )
        self.on_inner: Hear = _unheard
        self.on_outer: Hear = _unheard
        self.until: Callable[[], int] = lambda: END
        self.after: Callable[[], None] = lambda: None
        self.recall: Callable[[torch.Tensor | None], torch.Tensor | None] = lambda _: None
        module.__dict__["forward"] = self._forward

    def columns(self, outer: bool) -> int:
        """How wide what comes to the outer projections is, or to the inner ones: columns of their weights."""
        first = self.mine[0]
        return self.weights[self.outer[first] if outer else self.inner[first][0]].shape[1]

    def remove(self) -> None:
        """Give the module its own forward pass back."""
        self._module.__dict__.pop("forward", None)
        self.weights.clear()

    def _forward(self, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
        import torch

        kept = self.recall(None)
        if kept is not None and self._peers.size == 1:
            return kept
        out = torch.zeros_like(hidden)
        if self._peers.size == 1:
            for expert in self.mine:
                tokens, place = torch.where(index == expert)
                if (made := self._expert(expert, hidden[tokens], routing[tokens, place], self._peers.item)) is not None:
                    out.index_add_(0, tokens, made)
        else:
            self._divided(hidden, index, routing, out, idle=kept is not None or self._peers.item == AWAY)
        self.after()
        if kept is None:
            self.recall(out)
        return out if kept is None else kept

    def _divided(
        self, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor, out: torch.Tensor, *, idle: bool
    ) -> None:
        """Send this rank's tokens (none where it is ``idle``) to their experts, answer those that come, add up."""
        import torch

        lane, count, size = self._peers.lane, len(self.inner), self._peers.size
        routed = [torch.where(index == (AWAY if idle else expert)) for expert in range(count)]
        said = [*(len(tokens) for tokens, _ in routed), int(self._peers.stop.is_set()), self._peers.item]
        table = listed(lane.all_of(torch.tensor(said, device=hidden.device)))
        self._peers.hear(told=any(row[-2] for row in table))
        for first in range(0, count, size):
            some = range(first, min(first + size, count))
            sent = [table[lane.rank][expert] for expert in some] + [0] * (size - len(some))
            mine = first + lane.rank
            coming = [row[mine] if mine in some else 0 for row in table]
            rows = [torch.cat((hidden[tokens], routing[tokens, place][:, None]), 1) for tokens, place in
                    (routed[expert] for expert in some)]  # fmt: skip
            got = torch.split(lane.exchange(torch.cat(rows), sent, coming), coming)
            made = [
                self._expert(mine, part[:, :-1].contiguous(), part[:, -1].contiguous(), row[-1])
                for part, row in zip(got, table, strict=True)
                if len(part)
            ]
            if self.until() != END:
                continue
            answers = [one for one in made if one is not None] or [hidden[:0]]
            for expert, part in zip(
                some, torch.split(lane.exchange(torch.cat(answers), coming, sent), sent), strict=False
            ):
                out.index_add_(0, routed[expert][0], part)

    def _expert(self, expert: int, x: torch.Tensor, weight: torch.Tensor, item: Any) -> torch.Tensor | None:
        """An expert's answers to its tokens, times their routing weights; None where none is wanted."""
        from torch.nn.functional import linear

        if not len(x):
            return None
        self.on_inner(expert, x, weight, item)
        if self.until() == INNER:
            return None
        gate, up = self.inner[expert]
        x = self._module.act_fn(linear(x, self.weights[gate])) * linear(x, self.weights[up])
        self.on_outer(expert, x, weight, item)
        return None if self.until() == OUTER else linear(x, self.weights[self.outer[expert]]) * weight[:, None]
