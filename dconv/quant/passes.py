"""Passes of calibration samples through one layer, and what its linear layers are given on the way.

Linear layers that get the very same input are a group; groups are found by watching one sample, in the order in which
the layer comes to them. A pass goes no further than what it is for. Outputs of linear layers that are quantised already
do not change any more: what the memory budget has room for is kept for the later passes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dconv.net.untyped import own_forward
from dconv.quant.experts import END, INNER, OUTER, Hear
from dconv.quant.network import Enough, Layer
from dconv.quant.peers import AWAY, Peers

if TYPE_CHECKING:
    import torch

#: Takes inputs [tokens, columns] and the routing weights of the tokens, where they have any.
Sink = Callable[["torch.Tensor", "torch.Tensor | None"], None]


@dataclass(frozen=True)
class Group:
    """Linear layers with one input.

    Attributes:
        names: of their weights.
        columns: of the input.
        expert: which one's they are, -1 for none.
        module: of the experts that it is one of, "" for none.
        outer: whether the input is the expert's own, between its projections.
    """

    names: tuple[str, ...]
    columns: int
    expert: int = -1
    module: str = ""
    outer: bool = False


@dataclass
class _Here:
    """A thread's place."""

    block: int = -1
    left: int = 0
    shared: Any = None


@dataclass
class _Memo:
    """Outputs that do not change any more, by block and name, as long as there is room."""

    room: int
    held: dict[tuple[int, str], Any] = field(default_factory=dict[tuple[int, str], Any])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, block: int, name: str, value: Any) -> None:
        size = _size(value)
        with self.lock:
            if block != AWAY and size and size <= self.room and (block, name) not in self.held:
                self.room -= size
                self.held[block, name] = value

    def drop(self, block: int, names: Iterable[str]) -> None:
        with self.lock:
            for name in names:
                self.room += _size(self.held.pop((block, name), None))


def _size(value: torch.Tensor | tuple[torch.Tensor | None, ...] | None) -> int:
    parts = value if isinstance(value, tuple) else (value,)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


class Passes:
    """Listens to one layer.

    Args:
        wanted: names of the weights to be quantised, of this layer.
        weigh_shared: weigh a shared expert's tokens by its gate.
        peers: that have the layer's experts between them; they make the same passes in step.

    Attributes:
        threads: blocks that are computed at once.
    """

    def __init__(self, layer: Layer, wanted: set[str], *, weigh_shared: bool, peers: Peers) -> None:
        self.layer, self._weigh_shared, self._peers, self.threads = layer, weigh_shared, peers, 1
        self._linears = {name: module for name, module in layer.linears().items() if name in wanted}
        self._experts = wanted & {name for experts in layer.experts.values() for name in experts.names}
        self._final: set[str] = set()
        self._sinks: dict[str, Sink] = {}
        self._expert_sinks: dict[tuple[str, int, bool], Sink] = {}
        self._expert_stages: set[tuple[str, bool]] = set()
        self._through = False
        self._seen: list[tuple[str, Any]] | None = None
        self._memo = _Memo(0)
        self._last = False
        self._local = threading.local()
        self._patched: list[Any] = []
        gates = _shared_gates(layer.module)
        for name, module in self._linears.items():
            self._patch(module, self._tap(name, module, gates.get(id(module))))
        for module, experts in layer.experts.items():
            experts.on_inner = self._expert(module, False)
            experts.on_outer = self._expert(module, True)
            experts.until = self._until(module)
            experts.recall = self._recalled(module, [*experts.outer, *(n for names in experts.inner for n in names)])
            experts.after = self._after(module)
        inside = {id(module): name for name, module in self._linears.items()}
        for child_name, child in layer.module.named_children():
            names = [inside[id(member)] for member in child.modules() if id(member) in inside]
            if names:
                self._patch(child, self._child(child_name, child, names))

    def close(self) -> None:
        """Stop listening."""
        for module in self._patched:
            module.__dict__.pop("forward", None)
        self._memo.held.clear()  # at once, not when cycles are collected

    def keep(self, room: int) -> None:
        """Let outputs that do not change any more stay, as many as go into ``room`` bytes."""
        self._memo.room = room

    def _patch(self, module: Any, forward: Callable[..., Any]) -> None:
        module.__dict__["forward"] = forward
        self._patched.append(module)

    def groups(self, hidden: torch.Tensor) -> list[list[Group]]:
        """What is to be quantised, in the order in which the layer comes to it; the experts of a layer come at once.

        Args:
            hidden: of one sample, [1, length, hidden].
        """
        self._seen = []
        self._local.here = _Here()
        self.layer(hidden)
        seen, self._seen = self._seen, None
        found: list[list[Group]] = []
        by_input: dict[tuple[Any, ...], int] = {}
        for name, x in seen:
            if x is None:  # the experts of a module
                found += self._expert_groups(name)
                continue
            key = (x.data_ptr(), x.numel(), x.shape[-1])
            if key in by_input and len(found[by_input[key]]) == 1:
                (group,) = found[by_input[key]]
                if name not in group.names:
                    found[by_input[key]] = [Group((*group.names, name), group.columns)]
            else:
                by_input[key] = len(found)
                found.append([Group((name,), x.shape[-1])])
        return found

    def _expert_groups(self, module: str) -> list[list[Group]]:
        experts = self.layer.experts[module]
        inner = [
            Group(tuple(name for name in names if name in self._experts), experts.columns(False), i, module)
            for i, names in enumerate(experts.inner)
        ]
        outer = [
            Group((name,) if name in self._experts else (), experts.columns(True), i, module, True)
            for i, name in enumerate(experts.outer)
        ]
        found = [[group for group in stage if group.names] for stage in (inner, outer)]
        return [stage for stage in found if stage]

    def collect(
        self,
        blocks: Sequence[int],
        read: Callable[[int], torch.Tensor],
        sinks: dict[Group, Sink],
        experts: Collection[tuple[str, bool]],
        *,
        through: bool,
    ) -> None:
        """Run blocks and give the inputs of groups to their sinks.

        Args:
            blocks: this rank's, and `AWAY` where its peers have more.
            read: what comes to the layer, by block.
            sinks: what takes the inputs of each group.
            experts: modules, and whether their outer projections are meant, that the pass is for, on whichever rank.
            through: the groups depend on each other (they are not quantised one after the other), so that the pass
                goes on behind each.
        """
        self._sinks = {group.names[0]: sink for group, sink in sinks.items() if group.expert < 0}
        self._expert_sinks = {
            (group.module, group.expert, group.outer): sink for group, sink in sinks.items() if group.expert >= 0
        }
        self._through = through
        self._expert_stages = set(experts)
        left = len(self._sinks) + len({module for module, _ in experts})

        def one(block: int) -> None:
            self._local.here = _Here(block, left)
            with contextlib.suppress(Enough):
                self.layer(read(block))

        self._peers.run(blocks, one, self.threads)
        self._sinks, self._expert_sinks, self._expert_stages = {}, {}, set()

    def set(self, name: str, weight: torch.Tensor) -> None:
        """Put a weight [out, in], the quantised one, in the place of the layer's."""
        import torch

        if name in self._linears:
            self._linears[name].weight = torch.nn.Parameter(weight, requires_grad=False)
        else:
            next(e for e in self.layer.experts.values() if name in e.weights).weights[name] = weight

    def settle(self, names: Iterable[str]) -> None:
        """These weights do not change any more, on no rank."""
        self._final.update(names)

    def weight(self, name: str) -> torch.Tensor:
        """A weight as it is now, [out, in]."""
        if name in self._linears:
            return self._linears[name].weight.data
        return next(e for e in self.layer.experts.values() if name in e.weights).weights[name]

    def finish(
        self, blocks: Sequence[int], read: Callable[[int], torch.Tensor], write: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Run blocks through the whole layer.

        Args:
            blocks: this rank's, and `AWAY` where its peers have more.
            read: what comes to the layer, by block.
            write: called with each block and what leaves the layer, [samples, length, hidden].
        """
        self._last = True

        def one(block: int) -> None:
            self._local.here = _Here(block)
            made = self.layer(read(block))
            if block != AWAY:
                write(block, made)

        self._peers.run(blocks, one, self.threads)

    def _tap(self, name: str, module: Any, gate: Any) -> Callable[..., Any]:
        from torch.nn.functional import linear

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self._seen is not None:
                self._seen.append((name, x))
                return linear(x, module.weight, module.bias)
            self._peers.hear()
            here: _Here = self._local.here
            if gate is not None and self._weigh_shared:
                inner, router = gate
                if inner:
                    here.shared = linear(x, router.weight, router.bias).sigmoid().reshape(-1)
            if sink := self._sinks.get(name):
                weights = here.shared if gate is not None and self._weigh_shared else None
                if here.block != AWAY:
                    sink(x.reshape(-1, x.shape[-1]), weights)
                self._one_less(here)
            if (kept := self._memo.held.get((here.block, name))) is not None:
                return kept
            y = linear(x, module.weight, module.bias)
            if name in self._final and not self._last:
                self._memo.put(here.block, name, y)
            return y

        return forward

    def _one_less(self, here: _Here) -> None:
        here.left -= 1
        if not here.left:
            raise Enough

    def _expert(self, module: str, outer: bool) -> Hear:
        def listen(expert: int, x: torch.Tensor, weights: torch.Tensor, item: Any) -> None:
            del item
            self._peers.hear()
            if self._seen is None and (sink := self._expert_sinks.get((module, expert, outer))):
                sink(x, weights)

        return listen

    def _until(self, module: str) -> Callable[[], int]:
        def until() -> int:
            if self._seen is not None or self._through:
                return END
            if (module, False) in self._expert_stages:
                return INNER
            return OUTER if (module, True) in self._expert_stages else END

        return until

    def _after(self, module: str) -> Callable[[], None]:
        def after() -> None:
            if self._seen is not None:
                self._seen.append((module, None))
            elif self._expert_stages & {(module, False), (module, True)}:
                self._one_less(self._local.here)

        return after

    def _recalled(self, module: str, names: Sequence[str]) -> Callable[[Any], Any]:
        """What keeps and finds the experts' answer once all of them are quantised."""

        def recall(value: Any) -> Any:
            if self._seen is not None or self._through or not self._final.issuperset(self._experts.intersection(names)):
                return None
            here: _Here = self._local.here
            if here.block == AWAY:
                return None
            if value is not None and not self._last:
                self._memo.put(here.block, module, value)
            return self._memo.held.get((here.block, module))

        return recall

    def _child(self, name: str, child: Any, names: Sequence[str]) -> Callable[..., Any]:
        own = own_forward(child)
        key = f"//{name}"
        experts = [module for module in self.layer.experts if module.startswith(f"{self.layer.name}.{name}.")]

        def forward(*args: Any, **kwargs: Any) -> Any:
            done = not experts and self._seen is None and self._final.issuperset(names)
            here: _Here = self._local.here
            if done and (kept := self._memo.held.get((here.block, key))) is not None:
                return kept
            made = own(*args, **kwargs)
            if done and not self._last:
                self._memo.drop(here.block, names)
                self._memo.put(here.block, key, made)
            return made

        return forward


def _shared_gates(module: Any) -> dict[int, tuple[bool, Any]]:
    """The linear layers of experts that a gate weighs: whether the hidden states come to them, and the gate."""
    import torch

    found: dict[int, tuple[bool, Any]] = {}
    for parent in module.modules():
        gate, expert = getattr(parent, "shared_expert_gate", None), getattr(parent, "shared_expert", None)
        if isinstance(gate, torch.nn.Linear) and expert is not None:
            found |= {id(one): (one.in_features == gate.in_features, gate) for one in expert.modules()
                      if isinstance(one, torch.nn.Linear)}  # fmt: skip
    return found
