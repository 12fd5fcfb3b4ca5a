"""What a parsed file holds, as types: of JSON that others wrote nothing is known before it is looked at.

``isinstance(value, dict)`` alone leaves the type checker with keys and values of unknown type; these say the same and
leave ``Any``, which each use has to check for itself.
"""

from __future__ import annotations

from typing import Any, TypeGuard


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    """Whether it is a dict, of whatever keys: what parsers make of an object of JSON."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether it is a list, of whatever entries."""
    return isinstance(value, list)


def is_texts(value: object) -> TypeGuard[list[str]]:
    """Whether it is a list of nothing but texts; an empty one is."""
    return is_list(value) and all(isinstance(entry, str) for entry in value)
