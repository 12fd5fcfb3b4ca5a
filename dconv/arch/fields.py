"""Typed reading of a config that somebody else wrote: a wrong type or size stops here, by name, and never later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

from dconv.errors import Damaged
from dconv.sharding.parsed import is_list, is_mapping

#: No tensor that exists has an axis this long; a damaged number must not size a plan.
_LARGEST = 2**31
#: Far above every decoder; lists of one entry a layer are built from it.
_DEEPEST = 10_000
#: The same for lists of one entry a query group.
_MOST_HEADS = 65_536


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


def heads(said: Mapping[str, object], key: str, where: str) -> int:
    """A number of attention heads, or of their groups.

    Raises:
        Damaged: it is not.
    """
    found = whole(said, key, where)
    if found > _MOST_HEADS:
        raise _damaged(key, where, f"at most {_MOST_HEADS} heads", found)
    return found


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
    real = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number of hundreds of digits
            real = float(value)
    if not math.isfinite(real):
        raise _damaged(key, where, "a finite number", value)
    return real


def plain(said: Mapping[str, object], key: str, where: str) -> object:
    """What JSON can say: nested tables and lists of text, numbers and switches, finite and not too deep.

    Raises:
        Damaged: it is something else.
    """
    value = said.get(key)
    if not _is_plain(value, 16):
        raise _damaged(key, where, "plain data", value)
    return value


def _is_plain(value: object, depth: int) -> bool:
    if is_mapping(value):
        return depth > 0 and all(isinstance(k, str) and _is_plain(v, depth - 1) for k, v in value.items())
    if is_list(value):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def not_negative(said: Mapping[str, object], key: str, where: str) -> float:
    """A finite number of 0 or more.

    Raises:
        Damaged: it is not.
    """
    real = number(said, key, where)
    if real < 0:
        raise _damaged(key, where, "0 or more", real)
    return real


def positive(said: Mapping[str, object], key: str, where: str) -> float:
    """A finite number above 0.

    Raises:
        Damaged: it is not.
    """
    real = number(said, key, where)
    if real <= 0:
        raise _damaged(key, where, "above 0", real)
    return real


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
    if value is None:
        return {}
    if not is_mapping(value):
        raise _damaged(key, where, "an object", value)
    return dict(value)


def multiple(of: str, size: int, by: str, divisor: int, where: str) -> int:
    """``size // divisor``.

    Raises:
        Damaged: it does not divide.
    """
    if size % divisor:
        raise _damaged(of, where, f"a multiple of {by} ({divisor})", size)
    return size // divisor


def _damaged(key: str, where: str, expected: str, found: object) -> Damaged:
    try:
        shown = f"{found!r:.80}"
    except ValueError:  # Python prints no whole number of more than 4300 digits
        shown = "thousands of digits"
    return Damaged(f"{key} is {shown}, not {expected}", where=f"{where}: {key}", expected=expected, found=shown)
