"""Where the parameters of a transformers model lie in a source, as boxes: what a plan copies, no weight held.

`dconv.net.weights` reads the same parameters into memory. A rule of transformers that is no map of boxes (it computes,
or permutes within a box) is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dconv.errors import Damaged, Refused, group_names
from dconv.net.weights import Recipe, recipes
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Slot, TensorSpec

if TYPE_CHECKING:
    import torch

#: torch's dtypes by dconv's names, those that parameters have.
_SHORT: Final = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int64": "i64"}


@dataclass(frozen=True)
class Parameter:
    """A parameter or saved buffer of a model.

    Attributes:
        spec: its name in the model, its shape and dtype there.
        slots: where its elements come from.
        alike: other names of the same tensor: tied ones.
    """

    spec: TensorSpec
    slots: tuple[Slot, ...]
    alike: tuple[str, ...] = ()


def parameters(logical: Logical, model: Any) -> tuple[tuple[Parameter, ...], dict[str, str]]:
    """All that a model's ``state_dict`` has, each tensor once, in its order; and what transformers does without.

    Args:
        logical: the source.
        model: of transformers; its parameters may have no storage.

    Returns:
        parameters, and the reason for each logical tensor that none of them has.

    Raises:
        Damaged: the source lacks one, or has it in another shape.
        Refused: transformers makes one in a way that is no copy of boxes, or has it in a dtype of another kind.
    """
    found, unused = recipes(logical, model)
    known = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or r"(?!)")
    if odd := [name for name in unused if not known.search(name)]:
        raise Refused(
            "the model that transformers builds has no place for these tensors, nothing was written",
            where=group_names(odd),
            do="--drop leaves them out",
        )
    first: dict[int, str] = {}
    alike: dict[str, list[str]] = {}
    values: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, value in values.items():
        alike.setdefault(first.setdefault(id(value), name), []).append(name)
    made = tuple(_parameter(logical, name, names, values[name], found[name]) for name, names in alike.items())
    return made, dict.fromkeys(unused, "transformers' class does not have it")


def _parameter(logical: Logical, name: str, names: list[str], value: torch.Tensor, recipe: Recipe) -> Parameter:
    how, sources = recipe
    shape, dtype = tuple(value.shape), _SHORT.get(str(value.dtype).removeprefix("torch."))
    if dtype is None:
        raise Refused("a parameter of a dtype that nothing is written in", where=name, found=str(value.dtype))
    if how is None:
        spec = logical.specs[sources[0][1]]
        split = None if spec.file_shape == spec.shape else spec.file_shape
        slots: tuple[Slot, ...] = (_whole(spec, (0,) * len(spec.shape)),)
        made, stored = spec.file_shape, TensorSpec(name, spec.shape, dtype, split)
    else:
        slots = _joined(logical, name, how, sources)
        made = tuple(max(ends) for ends in zip(*(slot.stored.stop for slot in slots), strict=True))
        stored = TensorSpec(name, made, dtype)
    if made != shape:
        raise Damaged("a weight has another shape than the model's", where=name, expected=f"{list(shape)}",
                      found=f"{list(made)}")  # fmt: skip
    return Parameter(stored, slots, tuple(names[1:]))


def _joined(logical: Logical, name: str, how: Any, sources: list[tuple[str, str]]) -> tuple[Slot, ...]:
    """The slots of a parameter that is made of several tensors, or of one that is turned.

    Tensors stand behind each other along one axis, pattern by pattern; where each pattern has many (experts), those of
    one expert are one row of an axis more.
    """
    each: dict[str, list[str]] = {}
    for pattern, source in sources:
        each.setdefault(pattern, []).append(source)
    stacks, along = False, 0
    turn: tuple[int, int] | None = None
    for step in how.operations:
        kind, place = type(step).__name__, step.__dict__
        if kind == "MergeModulelist" and place["dim"] == 0 and turn is None:
            stacks = True
        elif kind == "Concatenate" and turn is None:
            along = place["dim"]
        elif kind == "Transpose" and turn is None:
            turn = place["dim0"], place["dim1"]
        else:
            raise Refused(
                "transformers makes this parameter in a way that is no copy of boxes, nothing was written",
                where=name,
                found=", ".join(type(step).__name__ for step in how.operations),
            )
    slots: list[Slot] = []
    at = 0
    for group in each.values():
        width = 0
        for index, source in enumerate(group):
            spec = logical.specs[source]
            axes = (-1,) * stacks + tuple(range(len(spec.shape)))
            start = [0] * len(axes)
            if stacks:
                start[0] = index
            start[along] += at
            width = spec.shape[axes[along]]
            slots.append(_turned(_whole(spec, tuple(start), axes), turn))
        at += width
    return tuple(slots)


def _whole(spec: TensorSpec, start: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Slot:
    return Slot(spec.name, Region.whole(spec.shape), start, tuple(range(len(spec.shape))) if axes is None else axes)


def _turned(slot: Slot, turn: tuple[int, int] | None) -> Slot:
    """The same in a tensor of which two axes change places."""
    if turn is None:
        return slot
    order = list(range(len(slot.axes)))
    order[turn[0]], order[turn[1]] = order[turn[1]], order[turn[0]]
    return Slot(slot.tensor, slot.region, tuple(slot.start[i] for i in order), tuple(slot.axes[i] for i in order))
