"""What ``sharded_state_dict()`` says of a running model: boxes of Megatron's global tensors.

Names, stacking and places are those of torch_dist, so that neither ranks' coordinates nor stages are asked for.
``replica_id`` is not either: what several ranks hold is one box, and proved equal. Source:
``megatron/core/dist_checkpointing/mapping.py``; looked up where the job has imported it, never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Final

from dconv.checkpoint import names
from dconv.errors import Refused
from dconv.sharding.parsed import is_list_or_tuple, is_mapping
from dconv.sharding.region import Index

_MAPPING: Final = "megatron.core.dist_checkpointing.mapping"


@dataclass(frozen=True, slots=True)
class Box:
    """What part of which global tensor a tensor is: the global key and shape, and where in it the part begins.

    Axes that the tensor lacks come first; it is one index long on them.
    """

    key: str
    shape: Index
    start: Index


def is_sharded(states: Iterable[Mapping[str, Any]]) -> bool:
    """Whether these are sharded state dicts."""
    mapping = sys.modules.get(_MAPPING)
    return mapping is not None and any(isinstance(v, mapping.ShardedBase) for state in states for v in state.values())


def boxes(states: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Box]]:
    """The tensors of sharded state dicts by a name of this rank's own, and the box that each is.

    Factories (gate and up in one matrix, all experts in one) are asked for what they would save; of grouped experts
    that is a copy. What Megatron would not save either (extra states, `LocalNonpersistentObject`) is passed over.

    Raises:
        Refused: a flattened range, a tensor without a place or without data, any other object.
    """
    mapping: Any = sys.modules[_MAPPING]
    tensors: dict[str, Any] = {}
    found: dict[str, Box] = {}
    for path, value in _leaves(mapping, states):
        if value is None or isinstance(value, str | int | float | mapping.LocalNonpersistentObject):
            continue
        if isinstance(value, mapping.ShardedObject) and names.is_state(value.key):
            continue
        if not isinstance(value, mapping.ShardedTensor):
            raise Refused(
                "a value of the sharded state dict that has no place in a model, nothing was written",
                where=path,
                expected="ShardedTensor, or a factory of some",
                found=short(value),
                do="hand over the model's own sharded_state_dict(), or a list of them, one a virtual chunk",
            )
        _check(value, path)
        name = f"{value.key}[{', '.join(map(str, value.global_offset))}]"
        while name in tensors:  # a rank may hold a box twice: a tied embedding
            name += " again"
        tensors[name] = value.data
        found[name] = Box(value.key, tuple(value.global_shape), tuple(value.global_offset))
    return tensors, found


def _leaves(mapping: Any, value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value, with what factories make, and the keys that lead to it."""
    if is_mapping(value):
        for key, item in value.items():
            yield from _leaves(mapping, item, f"{path}/{key}" if path else str(key))
    elif is_list_or_tuple(value):
        for item in value:
            yield from _leaves(mapping, item, path)
    elif isinstance(value, mapping.ShardedTensorFactory):
        _check_range(value, path)
        yield from _leaves(mapping, value.build(), path)
    else:
        yield path, value


def _check(tensor: Any, path: str) -> None:
    """Refuse a sharded tensor whose box is not said by its place and its data's shape."""
    _check_range(tensor, path)
    if tensor.data is None:
        raise Refused("a sharded tensor without data, nothing was written", where=path, found=tensor.key)
    shape, start, whole = tuple(tensor.data.shape), tuple(tensor.global_offset), tuple(tensor.global_shape)
    box = (1,) * tensor.prepend_axis_num + shape
    inside = len(box) == len(start) == len(whole) and all(
        at >= 0 and at + size <= length for at, size, length in zip(start, box, whole, strict=True)
    )
    if shape != tuple(tensor.local_shape) or not inside:
        raise Refused(
            "a sharded tensor that does not lie in its global tensor, nothing was written",
            where=f"{path}, {tensor.key}",
            expected=f"a part of {whole}",
            found=f"{shape} (said to be {tuple(tensor.local_shape)}) at {start}",
        )


def _check_range(value: Any, path: str) -> None:
    flattened = getattr(value, "flattened_range", None)
    if flattened is not None:
        raise Refused(
            "a flattened range of a tensor, as a distributed optimizer has them, nothing was written",
            where=path,
            expected="the model's own tensors",
            found=f"{value.key}, elements {flattened.start} to {flattened.stop}",
            do="hand over the model's sharded_state_dict(), without the optimizer's",
        )
