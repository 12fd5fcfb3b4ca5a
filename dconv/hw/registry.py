"""The hardware compilers that a model can be handed to, those of entry points (``dconv.hw``) included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Final, cast

from dconv.request import FORMATS

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from dconv.hw.target import Adapter

_GROUP: Final = "dconv.hw"
#: FORMAT -> its target's module in this room, which has ``ADAPTER``.
_OURS: Final = {"mtk": "mtk", "rk": "rk", "qnn": "qnn", "ax": "ax", "neuron": "neuron"}
#: Other spellings.
_SPELLED: Final = {f"hf2{name}": name for name in _OURS}
#: FORMATs of a checkpoint as well, which is what they mean where no chip is named.
TWO_MEANINGS: Final = ("neuron",)
#: Layout options that a target's compiler takes.
LAYOUTS: Final[Mapping[str, tuple[str, ...]]] = {"neuron": ("tp",)}


def target_of(format: str, *, named: bool = True) -> str | None:
    """The target that a FORMAT means; None where it is no hardware compiler's.

    Args:
        format: as it was asked for, in any of its spellings.
        named: whether a chip is.
    """
    name = _SPELLED.get(format, format)
    if name in TWO_MEANINGS and not named:
        return None
    if name in _OURS:
        return name
    if name in FORMATS:  # a rank does not pay for a look at what is installed
        return None
    return name if any(point.name == name for point in _points()) else None


def adapter(target: str) -> Adapter:
    """The adapter of a target of `target_of`; its module is imported now."""
    if target in _OURS:
        return cast("Adapter", import_module(f"dconv.hw.{_OURS[target]}").ADAPTER)
    (point,) = (point for point in _points() if point.name == target)
    return cast("Adapter", point.load())


def adapters() -> Mapping[str, Adapter]:
    """All adapters, by target: ours, then those of entry points, whose names do not replace ours."""
    outside = [point.name for point in _points() if point.name not in _OURS]
    return {name: adapter(name) for name in (*_OURS, *outside)}


def _points() -> Sequence[EntryPoint]:
    from importlib.metadata import entry_points

    return tuple(entry_points(group=_GROUP))
