"""One layer, listened to and changed: what its linear layers are given, what its norms give, and calls of its modules.

What is changed is changed for all threads at once; blocks are computed one by one on each, so that no sum depends on
how many there are.
"""

from __future__ import annotations

import contextlib
import os.path
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dconv.errors import Refused
from dconv.net.lazy import put
from dconv.net.untyped import first_of, own_forward
from dconv.quant.experts import Hear
from dconv.quant.network import Layer
from dconv.quant.peers import AWAY, Peers

if TYPE_CHECKING:
    import torch

#: Given [tokens, channels], and the item (block, sample) that they are of.
Listen = Callable[["torch.Tensor", Any], None]
#: Given a module's arguments, and what it made of them.
Call = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


class Watch:
    """Listens to one layer.

    Args:
        norms: names of the norms' weights.
        threads: blocks that are computed at once.
        peers: that have the layer's experts between them.

    Attributes:
        inputs: by a weight's name, called with what comes to it; of weights with one input only the first is asked.
        outputs: by a norm's, called with what leaves it.
        calls: by a module's path inside the layer.
        item: what the calling thread is at.
    """

    def __init__(self, layer: Layer, norms: Iterable[str], threads: int, peers: Peers) -> None:
        self.layer, self._threads, self._peers = layer, threads, peers
        self.inputs: dict[str, Listen] = {}
        self.outputs: dict[str, Listen] = {}
        self.calls: dict[str, Call] = {}
        self._places = layer.tensors()
        self._paths = {id(module): path for path, module in layer.module.named_modules()}
        self._modules = dict(layer.module.named_modules())
        self._patched: list[Any] = []
        for name, module in layer.linears().items():
            self._patch(module, self._given(name, module))
        for name in norms:
            module, _ = self._places[name]
            self._patch(module, self._giving(name, module))
        for experts in layer.experts.values():
            experts.on_inner = self._expert([names[0] for names in experts.inner])
            experts.on_outer = self._expert(experts.outer)

    def close(self) -> None:
        """Stop listening."""
        for module in self._patched:
            module.__dict__.pop("forward", None)

    @property
    def item(self) -> Any:
        """What the calling thread is at: a block, a sample, or `AWAY`."""
        return self._peers.item

    def _patch(self, module: Any, forward: Callable[..., Any]) -> None:
        module.__dict__["forward"] = forward
        self._patched.append(module)

    def _given(self, name: str, module: Any) -> Callable[..., Any]:
        own = own_forward(module)

        def forward(x: torch.Tensor) -> torch.Tensor:
            self._peers.hear()
            if (listen := self.inputs.get(name)) and self.item != AWAY:
                listen(x.reshape(-1, x.shape[-1]), self.item)
            return own(x)

        return forward

    def _giving(self, name: str, module: Any) -> Callable[..., Any]:
        own = own_forward(module)

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = own(*args, **kwargs)
            if (listen := self.outputs.get(name)) and self.item != AWAY:
                listen(made.reshape(-1, made.shape[-1]), self.item)
            return made

        return forward

    def _expert(self, names: Sequence[str]) -> Hear:
        def listen(expert: int, x: torch.Tensor, weights: torch.Tensor, item: Any) -> None:
            del weights
            if listen := self.inputs.get(names[expert]):
                listen(x, item)

        return listen

    def has(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is in this layer, and on this rank."""
        return name in self._places or any(name in experts.weights for experts in self.layer.experts.values())

    def get(self, name: str) -> torch.Tensor:
        """A tensor as it is now, float32; of a matrix [out, in]."""
        for experts in self.layer.experts.values():
            if name in experts.weights:
                return experts.weights[name]
        module, key = self._places[name]
        return getattr(module, key).data

    def set(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Put these tensors, by name, in the place of the layer's, for all threads."""
        for name, value in changed.items():
            held = next((e.weights for e in self.layer.experts.values() if name in e.weights), None)
            if held is not None:
                held[name] = value
            else:
                put(*self._places[name], value)

    @contextlib.contextmanager
    def instead(self, changed: Mapping[str, torch.Tensor]) -> Generator[None, None, None]:
        """The same for a while: at the end those of before are put back."""
        before = {name: self.get(name) for name in changed}
        self.set(changed)
        try:
            yield
        finally:
            self.set(before)

    def parent(self, names: Iterable[str]) -> str:
        """The path, inside the layer, of the smallest module that has all of these weights."""
        paths: list[str] = []
        for name in names:
            module = next((m for m, experts in self.layer.experts.items() if name in experts.names), "")
            paths.append(
                module.removeprefix(f"{self.layer.name}.") if module else self._paths[id(self._places[name][0])]
            )
        return os.path.commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")

    def offset(self, norm: str) -> float:
        """What a norm adds to its weight: 0 or 1.

        Raises:
            Refused: it is neither, or the module is no norm.
        """
        import torch

        module, key = self._places[norm]
        own, weight = own_forward(module), getattr(module, key).data
        x = torch.linspace(-1, 1, len(weight), device=weight.device)[None].sin() + 0.1
        with torch.no_grad():
            with self.instead({norm: torch.zeros_like(weight)}):
                none = own(x)
            with self.instead({norm: torch.ones_like(weight)}):
                one = own(x)
        if (bias := getattr(module, "bias", None)) is not None:
            none, one = none - bias, one - bias
        unit = one - none
        found = float((none * unit).sum() / (unit * unit).sum())
        if not min(abs(found), abs(found - 1)) < 1e-3:
            raise Refused(
                "a norm of another kind than AWQ's scales are folded into, the output is not finished",
                where=norm,
                expected="x · w or x · (1 + w), normalised",
                found=type(module).__name__,
                do="FORMAT gptq folds nothing",
            )
        return float(round(found))

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """What the module at a path makes of these arguments; of several things the first."""
        return first_of(self._modules[path](*args, **kwargs))

    def catch(self, paths: Iterable[str]) -> None:
        """Have `calls` called for these modules."""
        for path in paths:
            module = self._modules[path]
            own = own_forward(module)

            def forward(*args: Any, path: str = path, own: Any = own, **kwargs: Any) -> Any:
                made = own(*args, **kwargs)
                if listen := self.calls.get(path):
                    listen(args, kwargs, made)
                return made

            self._patch(module, forward)

    def shared(self, hidden: torch.Tensor, names: Iterable[str]) -> list[tuple[str, ...]]:
        """The weights ``names`` by the input that they get; those with one input are together.

        Args:
            hidden: of one sample, [1, length, hidden].
            names: of weights to be quantised.

        Raises:
            Refused: the layer does not come to one of them.
        """
        seen: list[tuple[str, torch.Tensor]] = []  # kept, so that no two inputs have one address
        wanted = [name for name in names if not self.of_expert(name)]

        def noted(name: str) -> Listen:
            return lambda x, _: seen.append((name, x))

        self.inputs = {name: noted(name) for name in wanted}
        self.through([0], lambda _: self.layer(hidden))
        self.inputs = {}
        found: dict[tuple[Any, ...], list[str]] = {}
        for name, x in seen:
            found.setdefault((x.data_ptr(), tuple(x.shape)), []).append(name)
        if missed := sorted(set(wanted).difference(name for name, _ in seen)):
            raise Refused("a layer does not use a weight that is to be quantised", where=", ".join(missed))
        together = set(names)
        apart = [
            tuple(name for name in group if name in together)
            for experts in self.layer.experts.values()
            for expert in experts.mine
            for group in (experts.inner[expert], (experts.outer[expert],))
        ]
        return [*map(tuple, found.values()), *(group for group in apart if group)]

    def listener(self, name: str) -> str:
        """The name under which what comes to a weight is heard: of an expert's gate and up the first."""
        for experts in self.layer.experts.values():
            for group in experts.inner:
                if name in group:
                    return group[0]
        return name

    def of_expert(self, name: str) -> bool:
        """Whether a weight is an expert's."""
        return any(name in experts.names for experts in self.layer.experts.values())

    def through(self, items: Sequence[Any], one: Callable[[Any], Any]) -> list[Any]:
        """Do something that takes items through experts, and return what it makes; peers have equally many."""
        return self._peers.run(items, one, self._threads)

    def run(self, items: Sequence[Any], one: Callable[[Any], Any]) -> list[Any]:
        """Do something else for each item, so many at once as there are threads, and return what it makes."""
        import torch

        def alone(item: Any) -> Any:
            self._peers.hear()
            torch.set_num_threads(1)  # so that no sum depends on how many there are
            with torch.no_grad():
                return one(item)

        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(alone, items))
