"""Mixed precision as it is written down: a default, and overrides by pattern, of which later ones win.

    {"default": {"wq": "int4", "aq": "bf16", "group_size": 128},
     "overrides": [{"pattern": "*.mlp.experts.*", "wq": "mxfp4", "group_size": 32},
                   {"pattern": "*.mlp.gate", "skip": true, "comment": "the router"}]}

The form is AlphaQuant's (``alphaquant/utils/replacement.py``), whose files are read as they are.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import translate
from functools import cached_property
from typing import Any, Final

from dconv.errors import Refused, UsageError
from dconv.quant.kinds import ACTIVATIONS, KINDS, ROW
from dconv.sharding.parsed import is_list, is_mapping

_MOST: Final = 1000
#: Longer ones are no pattern of names.
_LONGEST: Final = 300
_FIELDS: Final = ("wq", "aq", "group_size", "skip", "extra")
#: Other tools' words for the same.
_ALIASES: Final = {"q_group_size": "group_size", "groupsize": "group_size"}


@dataclass(frozen=True)
class Fields:
    """What the default or one override says; None where it says nothing.

    Attributes:
        wq: type of the weights.
        aq: type of the activations.
        group: how many columns share a scale.
        skip: whether the weights stay as they are, whatever ``wq`` is.
        element: ``extra.format``, the format of a floating code.
    """

    wq: str | None = None
    aq: str | None = None
    group: int | None = None
    skip: bool | None = None
    element: str | None = None

    def describe(self) -> dict[str, object]:
        """What is said, by the names above."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True)
class Override:
    """Fields for the names that a pattern fits."""

    pattern: str
    fields: Fields

    @cached_property
    def _fits(self) -> re.Pattern[str]:
        return re.compile(translate(self.pattern))

    def fits(self, name: str) -> bool:
        """Whether the pattern (``*``, ``?``, ``[…]``) is the whole name of a weight or of its module."""
        return self._fits.match(name) is not None or self._fits.match(name.removesuffix(".weight")) is not None


@dataclass(frozen=True)
class Table:
    """The default and the overrides, in their order."""

    default: Fields
    overrides: tuple[Override, ...] = ()

    def describe(self) -> dict[str, object]:
        """The same in plain JSON, without comments."""
        overrides = [{"pattern": override.pattern, **override.fields.describe()} for override in self.overrides]
        return {"default": self.default.describe(), "overrides": overrides}


def overrides_of(said: object, where: str) -> tuple[Override, ...]:
    """The list under ``overrides``, in its order; ``where`` is what errors call it.

    Raises:
        UsageError: it is no list, or too long, or one has no pattern; see `fields_of` besides.
        Refused: see `fields_of`.
    """
    if not is_list(said) or len(said) > _MOST:
        raise UsageError(
            "overrides is no list", where=where, expected=f"at most {_MOST} of {{pattern, …}}", found=f"{said!r:.80}"
        )
    made: list[Override] = []
    for number, entry in enumerate(said):
        at = f"overrides[{number}] in {where}"
        pattern = entry.get("pattern") if is_mapping(entry) else None
        if not isinstance(pattern, str) or not 0 < len(pattern) <= _LONGEST:
            raise UsageError(
                "an override has no pattern of names",
                where=at,
                expected='{"pattern": "*.mlp.experts.*", "wq": …}',
                found=f"{entry!r:.120}",
            )
        made.append(Override(pattern, fields_of({k: v for k, v in entry.items() if k != "pattern"}, at)))
    return tuple(made)


def fields_of(said: object, where: str) -> Fields:
    """The fields of the default or of an override; ``comment`` is read over.

    Raises:
        UsageError: a field that there is not, or a value that it cannot have.
        Refused: activations in a type that no dynamic scheme is for.
    """
    if not is_mapping(said):
        raise UsageError("no mapping of fields", where=where, expected=", ".join(_FIELDS), found=f"{said!r:.80}")
    found: dict[str, Any] = {}
    for key, value in said.items():
        name = _ALIASES.get(str(key), str(key))
        if name != "comment" and name not in _FIELDS:
            raise unknown(str(key), (*_FIELDS, "pattern", "comment"), where)
        if name in found:
            raise UsageError(f"{name} stands there twice", where=where, found=", ".join(map(str, said)))
        found[name] = value
    for name in found.keys() - {"comment"}:
        if found[name] is None:
            raise UsageError(f"{name} has no value", where=where, do="leave it out where nothing is meant")
    wq, aq, skip = found.get("wq"), found.get("aq"), found.get("skip")
    if wq is not None and (not isinstance(wq, str) or wq not in KINDS):
        raise UsageError(
            "there is no such type of weights",
            where=f"wq in {where}",
            expected=", ".join(KINDS),
            found=f"{wq!r:.80}",
            do=meant(str(wq), KINDS),
        )
    if aq is not None and (not isinstance(aq, str) or aq not in ACTIVATIONS):
        raise Refused(
            "activations are not quantised in this type, nothing was written",
            where=f"aq in {where}",
            expected=f"{', '.join(ACTIVATIONS)}: as they are, or rounded as they come",
            found=f"{aq!r:.80}",
        )
    if skip is not None and not isinstance(skip, bool):
        raise UsageError("skip is true or false", where=where, found=f"{skip!r:.80}")
    return Fields(wq, aq, group_of(found.get("group_size"), where), skip, _element(found.get("extra"), wq, where))


def group_of(said: object, where: str) -> int | None:
    """A group size as such; which of them a type has is seen where the type is known.

    Raises:
        UsageError: it is none.
    """
    if said is not None and (type(said) is not int or not (said == ROW or 0 < said <= 1 << 20)):
        raise UsageError(
            "group_size makes no sense",
            where=where,
            expected="how many columns share a scale; -1 for all of a row",
            found=f"{said!r:.80}",
        )
    return said if isinstance(said, int) else None


def _element(said: object, wq: str | None, where: str) -> str | None:
    if said is None or said == {}:
        return None
    every = sorted({element for kind in KINDS.values() for element in kind.elements})
    known = KINDS[wq].elements if wq is not None else every
    if not is_mapping(said) or set(said) != {"format"} or said["format"] not in known:
        raise UsageError(
            "extra says the format of a floating code, and nothing else",
            where=f"extra in {where}",
            expected=" or ".join(f'{{"format": "{element}"}}' for element in known) or f"no extra: {wq} has one format",
            found=f"{said!r:.80}",
        )
    return str(said["format"])


def unknown(key: str, known: Collection[str], where: str, do: str = "") -> UsageError:
    """For a key that is not known: the nearest that is."""
    return UsageError(
        f"there is no key {key!r:.80}",
        where=where,
        expected=", ".join(known),
        do=do or meant(key, known),
    )


def meant(word: str, known: Collection[str]) -> str:
    """A question after the nearest of the known words, for an error's ``do``; empty where none is near."""
    close = get_close_matches(word.lower(), [name.lower() for name in known], 1)
    return f"did you mean {next(name for name in known if name.lower() == close[0])}?" if close else ""
