"""Modules that read their weights as their turn comes, and forget them after it.

Experts are read when tokens are sent to them, one by one; of an embedding the rows of the tokens; and a matrix past its
share of a budget is multiplied by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from dconv.errors import Refused
from dconv.net.untyped import class_of, distinct, listed
from dconv.net.weights import Weights

if TYPE_CHECKING:
    import torch

#: Of the budget: what a layer may hold at a time, and one matrix of it. The rest is for what is computed.
_LAYER, _MATRIX = 2, 8


def hold(module: Any, name: str, weights: Weights, budget: int, alone: bool = False) -> None:
    """Read a module's parameters before it runs and forget them after it has.

    Args:
        module: of a model without storage.
        name: its own in the model; "" for the model.
        weights: of the model.
        budget: bytes that what is read for it may take at a time.
        alone: without those of its members, which are held by themselves.

    Raises:
        Refused: what must be there at once takes more than the budget.
    """
    taken: list[tuple[Any, str, str]] = []
    nbytes = 0
    members = [("", module)] if alone else list(module.named_modules())
    crowded = not alone and _bytes(own(member) for _, member in members) > budget // _LAYER
    for inside, member in members:
        full = ".".join(part for part in (name, inside) if part)
        for key, value in own(member).items():
            path = f"{full}.{key}" if full else key
            if not _in_parts(member, key, path, weights, budget, crowded or alone):
                taken.append((member, key, path))
                nbytes += value.numel() * 4
    if nbytes > budget:
        raise Refused(
            "the budget of memory is too small to run this model in",
            where=name,
            expected=f"{nbytes:,} bytes or more, which are needed at once",
            found=f"{budget:,}",
            do="a larger --max-memory",
        )
    if not taken:
        return
    empty = {(id(member), key): own(member)[key] for member, key, _ in taken}

    def read(*_: Any) -> None:
        for member, key, path in taken:
            put(member, key, weights.whole(path))

    def forget(*_: Any) -> None:
        for member, key, _path in taken:
            put(member, key, empty[id(member), key])

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget)


def fill(net: Any, weights: Weights) -> None:
    """Read all parameters of a model, for good."""
    for name, module in net.named_modules():
        for key in own(module):
            put(module, key, weights.whole(f"{name}.{key}" if name else key))


def own(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers that are a module's own, by name."""
    saved = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: value for key, value in {**module._parameters, **saved}.items() if value is not None}


def _bytes(modules: Iterator[dict[str, torch.Tensor]]) -> int:
    return sum(value.numel() * 4 for module in modules for value in module.values())


def put(module: Any, key: str, value: torch.Tensor) -> None:
    """Give a module another parameter (without gradient, where it is a plain tensor) or buffer."""
    import torch

    if key in module._buffers:
        module._buffers[key] = value
    else:
        module._parameters[key] = (
            value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, requires_grad=False)
        )


def _in_parts(module: Any, key: str, path: str, weights: Weights, budget: int, crowded: bool) -> bool:
    """Whether a parameter is from now on read in parts, by the module itself."""
    import torch

    value = own(module)[key]
    if weights.by_expert(path) and hasattr(module, "num_experts"):
        del module._parameters[key]
        setattr(module, key, _Experts(value, partial(weights.expert, path)))
        return True
    if key != "weight" or not weights.is_plain(path):
        return False
    forward = class_of(module).forward
    plain = forward is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, torch.nn.Embedding) and plain:
        module.padding_idx = None  # of no meaning but for training, and not among the rows that are read
        module.__dict__["forward"] = partial(_look_up, module, forward, partial(weights.rows, path))
        return True
    if crowded and forward is torch.nn.Linear.forward and value.numel() * 4 > budget // _MATRIX:
        rows = max(1, budget // _MATRIX // (value.shape[1] * 4))
        module.__dict__["forward"] = partial(_multiply, module, value.shape[0], rows, partial(weights.rows, path))
        return True
    return False


class _Experts:
    """A parameter of three axes that reads one expert's matrix when it is asked for it."""

    def __init__(self, like: torch.Tensor, read: Callable[[int], torch.Tensor]) -> None:
        self.shape, self.dtype, self._read = like.shape, like.dtype, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read(int(index))


def _look_up(module: Any, forward: Any, read: Callable[[int, int], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """An embedding's own forward pass over the rows of these tokens alone."""
    import torch

    rows, places = distinct(tokens)
    empty = module._parameters["weight"]
    put(module, "weight", torch.cat([read(row, row + 1) for row in listed(rows)]))
    try:
        return forward(module, places)
    finally:
        module._parameters["weight"] = empty


def _multiply(
    module: Any, length: int, step: int, read: Callable[[int, int], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """``nn.Linear`` by ``step`` rows of its weight at a time."""
    import torch

    out = torch.empty(*x.shape[:-1], length)
    for at in range(0, length, step):
        stop = min(at + step, length)
        bias = None if module.bias is None else module.bias[at:stop]
        out[..., at:stop] = torch.nn.functional.linear(x, read(at, stop), bias)
    return out
