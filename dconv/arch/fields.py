"""Typed reading of a config that somebody else wrote: a wrong type or size stops here, by name, and never later."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dconv.errors import Damaged

#: No tensor that exists has an axis this long; a damaged number must not size a plan.
_LARGEST = 2**31
#: Far above every decoder; lists of one entry a layer are built from it.
_DEEPEST = 100_000


def whole(said: Mapping[str, object], key: str, where: str) -> int:
    """A positive whole number (``true`` is none, and neither is ``4096.0``).

    Raises:
        Damaged: it is not.
    """
    value = said.get(key)
    if type(value) is not int or not 0 < value < _LARGEST:
        raise _damaged(key, where, "a positive whole number", value)
    return value


def deep(said: Mapping[str, object], key: str, where: str) -> int:
    """A number of layers.

    Raises:
        Damaged: it is not.
    """
    layers = whole(said, key, where)
    if layers > _DEEPEST:
        raise _damaged(key, where, f"at most {_DEEPEST} layers", layers)
    return layers


def count(said: Mapping[str, object], key: str, where: str) -> int:
    """A whole number, zero included.

    Raises:
        Damaged: it is not.
    """
    return 0 if said.get(key) == 0 else whole(said, key, where)


def number(said: Mapping[str, object], key: str, where: str) -> float:
    """A finite number.

    Raises:
        Damaged: it is not.
    """
    value = said.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _damaged(key, where, "a finite number", value)
    return float(value)


def flag(said: Mapping[str, object], key: str, where: str) -> bool:
    """True or false; ``null`` and an absent key are false.

    Raises:
        Damaged: it is none of these.
    """
    value = said.get(key)
    if value is not None and not isinstance(value, bool):
        raise _damaged(key, where, "true or false", value)
    return bool(value)


def table(said: Mapping[str, object], key: str, where: str) -> dict[str, object]:
    """A JSON object; ``null`` and an absent key are the empty one.

    Raises:
        Damaged: it is something else.
    """
    value = said.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _damaged(key, where, "an object", value)
    return dict(value or {})


def multiple(of: str, size: int, by: str, divisor: int, where: str) -> int:
    """``size // divisor``.

    Raises:
        Damaged: it does not divide.
    """
    if size % divisor:
        raise _damaged(of, where, f"a multiple of {by} ({divisor})", size)
    return size // divisor


def _damaged(key: str, where: str, expected: str, found: object) -> Damaged:
    return Damaged(
        f"{key} is {found!r:.80}, not {expected}", where=f"{where}: {key}", expected=expected, found=f"{found!r:.80}"
    )
