"""Shapes that a person wishes for a made-up model, turned into the config's own sizes, or refused with the rule.

Which key decides an axis is asked of the table itself: one key at a time is changed a little, and the axes that move
are its.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Set
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, Final

from dconv.checkpoint.fake_config import Wishes, numbers, told
from dconv.errors import DconvError, UsageError, group_names
from dconv.sharding.region import Index

#: The shapes of all tensors under a config.
Shapes = Callable[[Mapping[str, Any]], Mapping[str, Index]]
#: A size is made so many times itself to see what follows it: others must still divide it, or it them.
_FACTORS: Final = (Fraction(2), Fraction(3), Fraction(1, 2))


def settled(config: Mapping[str, Any], wishes: Wishes, shapes_of: Shapes) -> dict[str, Any]:
    """The config under which every wished-for shape holds.

    Raises:
        UsageError: a pattern that matches no tensor; a shape that no size of the config gives.
    """
    made = dict(config)
    pinned = set(wishes.dimensions)
    while (wrong := _first_wrong(shapes_of(made), wishes)) is not None:
        key, made = _moved(made, *wrong, wishes, pinned, shapes_of)
        pinned.add(key)
    return made


def _first_wrong(shapes: Mapping[str, Index], wishes: Wishes) -> tuple[str, Index] | None:
    for pattern, wished in wishes.shapes.items():
        names = [name for name in shapes if fnmatchcase(name, pattern)]
        if not names:
            raise UsageError(
                "--fake-weight-config gives a shape to no tensor",
                where=f"{told(pattern)} in {wishes.file}",
                expected="a name or pattern such as " + group_names(list(shapes)[-1:]),
            )
        for name in names:
            if shapes[name] != wished:
                return name, wished
    return None


def _moved(
    config: dict[str, Any], name: str, wished: Index, wishes: Wishes, pinned: Set[str], shapes_of: Shapes
) -> tuple[str, dict[str, Any]]:
    """The one key that decides the first wrong axis, and the config with it changed."""
    shape = shapes_of(config)[name]
    if len(shape) != len(wished):
        raise _refused(wishes, name, shape, wished, f"it has {len(shape)} axes")
    axis = next(i for i, (a, b) in enumerate(zip(shape, wished, strict=True)) if a != b)
    keys = _deciding(config, name, axis, shapes_of)
    free = [key for key in keys if key not in pinned]
    found: list[tuple[str, dict[str, Any]]] = []
    for key in free:
        size = _get(config, key) * wished[axis]
        if size % shape[axis] == 0 and (changed := _try(config, key, size // shape[axis], shapes_of)) is not None:
            after = changed[1][name]
            if after[axis] == wished[axis]:
                found.append((key, changed[0]))
    if len(found) == 1:
        return found[0]
    rule = " x ".join(f"{key} {_get(config, key)}" for key in keys) or "fixed by the architecture"
    do = f"give {', '.join(free)} under dimensions" if len(found) > 1 else ""
    raise _refused(wishes, name, shape, wished, f"axis {axis} is {shape[axis]}: {rule}", do)


def _deciding(config: dict[str, Any], name: str, axis: int, shapes_of: Shapes) -> list[str]:
    """The config's keys that this axis follows."""
    before = shapes_of(config)[name][axis]
    keys: list[str] = []
    for key in numbers(config):
        for factor in _FACTORS:
            tried = _try(config, key, math.ceil(_get(config, key) * factor), shapes_of)
            if tried is not None and name in tried[1]:
                if tried[1][name][axis] != before:
                    keys.append(key)
                break
    return keys


def _try(
    config: dict[str, Any], key: str, size: int, shapes_of: Shapes
) -> tuple[dict[str, Any], Mapping[str, Index]] | None:
    made = copy.deepcopy(config)
    *path, last = key.split(".")
    held = made
    for part in path:
        held = held[part]
    held[last] = size
    try:
        return made, shapes_of(made)
    except DconvError:  # a size that does not go with the others
        return None


def _get(config: Mapping[str, Any], key: str) -> int:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def _refused(wishes: Wishes, name: str, shape: Index, wished: Index, rule: str, do: str = "") -> UsageError:
    return UsageError(
        "a wished-for shape contradicts the architecture, nothing was written",
        where=f"{name} in {wishes.file}",
        expected=f"{list(shape)}; {rule}",
        found=str(list(wished)),
        do=do or "change the shape, or the sizes under dimensions",
    )
