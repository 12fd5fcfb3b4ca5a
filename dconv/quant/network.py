"""A model one decoder layer at a time: transformers' own code, weights of any source, read as a layer's turn comes."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dconv.errors import Refused, ToolMissing
from dconv.net.lazy import hold, own, put
from dconv.net.skeleton import built, fill_computed, layers_of
from dconv.net.untyped import first_of
from dconv.net.weights import Weights
from dconv.quant.experts import Experts, is_experts
from dconv.quant.peers import Peers
from dconv.sharding.parsed import is_dict, is_list_or_tuple

if TYPE_CHECKING:
    import torch

    from dconv.arch.family import Family
    from dconv.sharding.tensor import Logical

#: Arguments of a layer beside the hidden states, in the layers' order.
_Given = list[tuple[tuple[Any, ...], dict[str, Any]]]


class Enough(Exception):
    """A pass has what it was for."""


class Network:
    """The decoder layers of a model, none of them loaded.

    Args:
        config: of the model, as config.json has it.
        logical: its weights.
        device: torch's name of where layers compute.
        budget: bytes that weights outside of the layers may take at a time.
        peers: that have the experts of a layer between them.
        family: of the model, for one that transformers lacks (`dconv.net.own`), or one that sees: the layers are then
            those of its language model.

    Raises:
        ToolMissing: transformers does not build the model.
        Damaged: weights are missing.
        Refused: its layers are not those of a decoder.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        logical: Logical,
        device: str,
        budget: int,
        peers: Peers,
        family: Family | None = None,
    ) -> None:
        import torch

        sees = family is not None and family.sees
        auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
        plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
        with tempfile.TemporaryDirectory(prefix="dconv-run-") as scratch:
            (Path(scratch) / "config.json").write_text(json.dumps(plain))
            try:
                net = built(Path(scratch), auto, logical.root, "sdpa", family)
            except ToolMissing:  # some attention is written out alone (Gemma 2 caps its scores)
                net = built(Path(scratch), auto, logical.root, "eager", family)
        self._net = net.eval().requires_grad_(False)
        with torch.no_grad():
            fill_computed(self._net, self._net)
        self.device, self._peers = device, peers
        self.weights = Weights(logical, self._net)
        found = dict(layers_of(self._net))
        if sees:  # calibrated with words: no image, so that the tower's layers are never run
            words = f"{_name_of(self._net.get_decoder(), self._net)}."
            found = {name: layer for name, layer in found.items() if name.startswith(words)}
        stacks = {name.rpartition(".")[0] for name in found}
        if len(stacks) != 1:
            raise Refused(
                "only the layers of one decoder are calibrated, nothing was written",
                where=str(logical.root),
                found=", ".join(sorted(stacks)) or "no layers",
                expected="one list of decoder layers",
            )
        self._layers = list(found.items())
        prefixes = tuple(f"{name}." for name in found)
        for name, module in self._net.named_modules():
            if name not in found and not name.startswith(prefixes):
                hold(module, name, self.weights, budget, alone=True)
        self._given: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._empty: dict[tuple[int, str], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def hidden(self) -> int:
        """Channels of the hidden states."""
        return self._net.get_input_embeddings().weight.shape[1]

    def names(self) -> dict[str, int]:
        """The checkpoint's names of all linear layers' weights in the layers: which expert's they are, -1 for none."""
        import torch

        found: dict[str, int] = {}
        for name, layer in self._layers:
            for inside, member in layer.named_modules():
                full = f"{name}.{inside}" if inside else name
                if is_experts(member):
                    for part in (f"{full}.gate_up_proj", f"{full}.down_proj"):
                        each = enumerate(self.weights.sources(part))
                        found |= {source: expert for expert, names in each for source in names}
                elif isinstance(member, torch.nn.Linear) and (source := self.weights.source(f"{full}.weight")):
                    found[source] = -1
        return found

    def close(self) -> None:
        """Let the source's files go."""
        self.weights.close()

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """What comes to the first layer: float32 [samples, length, hidden] of tokens [samples, length]."""
        try:
            first, given = self._caught(tokens, lambda hidden: hidden)
        except (ValueError, TypeError):  # some models take what a layer says apart: hidden states, scores (Bamba)
            first, given = self._caught(tokens, lambda hidden: (hidden, None))
        self._given[tuple(tokens.shape)] = _moved(given, self.device)
        return first.float()

    def _caught(self, tokens: torch.Tensor, answer: Callable[[Any], Any]) -> tuple[torch.Tensor, _Given]:
        """The hidden states that come to the first layer, and what else comes to each; ``answer`` is what they say."""
        import torch

        given: _Given = []
        first: list[torch.Tensor] = []

        def catch(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            first[:] = first or [hidden]
            given.append((args, kwargs))
            if len(given) == len(self._layers):
                raise Enough
            return answer(hidden)

        for _, layer in self._layers:
            layer.__dict__["forward"] = catch
        try:
            with torch.no_grad(), contextlib.suppress(Enough):
                self._net(input_ids=tokens, use_cache=False)
        finally:
            for _, layer in self._layers:
                del layer.__dict__["forward"]
        return first[0], given

    def load(self, index: int) -> Layer:
        """Read a layer's weights onto the device, float32; `forget` lets go of them.

        Raises:
            Damaged: a weight has another shape than the model's.
            Refused: see `dconv.quant.experts.Experts`.
        """
        name, module = self._layers[index]
        experts: dict[str, Experts] = {}
        for inside, member in module.named_modules():
            full = f"{name}.{inside}" if inside else name
            if is_experts(member):
                experts[full] = Experts(member, full, self.weights, self.device, self._peers)
                continue
            for key, value in own(member).items():
                self._empty[id(member), key] = value
                put(member, key, self.weights.whole(f"{full}.{key}").to(self.device))
        return Layer(module, name, experts, self)

    def forget(self, layer: Layer) -> None:
        """Let go of a layer's weights; its module is as before `load`."""
        for experts in layer.experts.values():
            experts.remove()
        for member in layer.module.modules():
            for key in list(own(member)):
                if (empty := self._empty.pop((id(member), key), None)) is not None:
                    put(member, key, empty)

    def given(self, index: int, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a layer beside the hidden states, for tokens of this shape [samples, length]; kept."""
        if shape not in self._given:
            import torch

            self.embedded(torch.zeros(shape, dtype=torch.long))
        return self._given[shape][index]


class Layer:
    """A decoder layer with its weights.

    Attributes:
        experts: those that transformers has in one tensor, taken apart, by the name of their module.
    """

    def __init__(self, module: Any, name: str, experts: dict[str, Experts], net: Network) -> None:
        self.module, self.name, self.experts, self._net = module, name, experts, net
        self._index = int(name.rpartition(".")[2])

    def linears(self) -> dict[str, Any]:
        """The linear layers that are modules of their own, by the name of their weight in the checkpoint."""
        import torch

        found: dict[str, Any] = {}
        for inside, member in self.module.named_modules():
            if isinstance(member, torch.nn.Linear):
                source = self._net.weights.source(f"{self.name}.{inside}.weight")
                if source is not None:
                    found[source] = member
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, as they are here."""
        every = [value for member in self.module.modules() for value in own(member).values() if not value.is_meta]
        every += [value for experts in self.experts.values() for value in experts.weights.values()]
        return sum(value.numel() * value.element_size() for value in every)

    @property
    def widest(self) -> int:
        """Channels of the widest input or output that one of its linear layers has."""
        shapes = [tuple(linear.weight.shape) for linear in self.linears().values()]
        shapes += [tuple(value.shape) for experts in self.experts.values() for value in experts.weights.values()]
        return max(max(shape) for shape in shapes)

    def tensors(self) -> dict[str, tuple[Any, str]]:
        """Where each tensor of the checkpoint is a parameter as it is: the module, and its name for it."""
        found: dict[str, tuple[Any, str]] = {}
        for inside, member in self.module.named_modules():
            full = f"{self.name}.{inside}" if inside else self.name
            if full not in self.experts:
                for key in own(member):
                    if (source := self._net.weights.source(f"{full}.{key}")) is not None:
                        found[source] = (member, key)
        return found

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the layer, [samples, length, hidden].

        Raises:
            Enough: what listens to its modules needs no more.
        """
        import torch

        args, kwargs = self._net.given(self._index, tuple(hidden.shape[:2]))
        with torch.no_grad():
            return first_of(self.module(hidden, *args, **kwargs))


def _name_of(member: Any, net: Any) -> str:
    return next(name for name, module in net.named_modules() if module is member)


def _moved(value: Any, device: str) -> Any:
    """Tensors inside of lists, tuples and dicts, on a device; what is shared stays shared."""
    import torch

    seen: dict[int, Any] = {}

    def move(one: Any) -> Any:
        if isinstance(one, torch.Tensor):
            if id(one) not in seen:
                seen[id(one)] = one.to(device)
            return seen[id(one)]
        if is_list_or_tuple(one):
            return type(one)(map(move, one))
        if is_dict(one):
            return {key: move(item) for key, item in one.items()}
        return one

    return move(value)
