"""What a parsed file holds, as types: JSON, YAML and pickles read inertly give values of which nothing is known.

``isinstance(value, dict)`` alone leaves the type checker with keys and values of unknown type; these say the same and
leave ``Any``, which each use has to check for itself. Loops over many values say ``isinstance`` and name the types of
their variables instead: a call for each would cost more than the look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeGuard

#: A value of JSON, as far as its kind tells; true and false are whole numbers to Python.
Json: TypeAlias = dict[str, Any] | list[Any] | str | int | float | None


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Whether it is a mapping, of whatever keys: JSON's are texts, those of YAML and pickles need not be."""
    return isinstance(value, Mapping)


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    """Whether it is a dict, of whatever keys: what parsers make of an object of JSON."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether it is a list, of whatever entries."""
    return isinstance(value, list)


def is_list_or_tuple(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether it is a list or a tuple, of whatever entries."""
    return isinstance(value, list | tuple)


def is_texts(value: object) -> TypeGuard[list[str]]:
    """Whether it is a list of nothing but texts; an empty one is."""
    return is_list(value) and all(isinstance(entry, str) for entry in value)


def mapping_or_empty(value: object) -> Mapping[str, Any]:
    """The mapping itself, or an empty one for anything else: a section of a config that may be missing."""
    return value if is_mapping(value) else {}
