"""``--quantization-config`` of a hardware compiler: which keys there are, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dconv.checkpoint.files import parse_json
from dconv.checkpoint.small_config import read_mapping
from dconv.errors import Damaged, UsageError
from dconv.hw.target import Ask
from dconv.quant.table import meant

OPTION: Final = "--quantization-config"
PLATFORM: Final = "platform"
#: ``--task`` of a model that takes words alone.
TEXT: Final = "text-generation"


@dataclass(frozen=True)
class Setting:
    """A key.

    Attributes:
        otherwise: its value where it is not given.
        words: what it may be.
        fits: whether a value is that.
        values: all that it may be, where these are a few.
    """

    otherwise: object
    words: str
    fits: Callable[[object], bool]
    values: tuple[str, ...] = ()


def among(otherwise: object, *values: object) -> Setting:
    """A key that has one of some values; ``true`` is not 1, nor ``4.0`` 4: a compiler would be told another word."""
    words = tuple(map(str, values))
    known = [(type(value), value) for value in values]
    return Setting(otherwise, ", ".join(words), lambda said: (type(said), said) in known, words)


def whole(otherwise: int | None, low: int, high: int) -> Setting:
    """A key that has a whole number from ``low`` to ``high``, both included; ``true`` is none."""
    words = f"a whole number from {low} to {high}"
    return Setting(otherwise, words, lambda said: type(said) is int and low <= said <= high)


def number(otherwise: float | None, low: float, high: float) -> Setting:
    """A key that has a number from ``low`` to ``high``, both included; ``true`` is none."""

    def fits(said: object) -> bool:
        if isinstance(said, bool) or not isinstance(said, int | float):
            return False
        return math.isfinite(said) and low <= said <= high

    return Setting(otherwise, f"a number from {low:g} to {high:g}", fits)


def text(otherwise: str | None = None) -> Setting:
    """A key that has any words, but not none."""
    return Setting(otherwise, "text", lambda said: isinstance(said, str) and bool(said))


def flag(otherwise: bool) -> Setting:
    """A key that is true or false."""
    return Setting(otherwise, "true or false", lambda said: isinstance(said, bool))


def read(said: str | None) -> tuple[Mapping[str, object], str]:
    """The keys, and where they are from.

    Args:
        said: JSON, or the name of a JSON or YAML file.

    Raises:
        UsageError: neither.
        Damaged: a JSON file that is none.
    """
    if said is None:
        return {}, OPTION
    if said.lstrip().startswith("{"):
        try:
            return parse_json(said.encode("utf-8", "surrogatepass"), where=OPTION, what="the text"), OPTION
        except Damaged as fault:
            raise UsageError(f"{OPTION} is no JSON", where=f"{said:.200}", found=fault.found or fault.what) from fault
    return read_mapping(Path(said), OPTION, expected="JSON that begins with {, a JSON or YAML file"), said


def asked(ask: Ask, key: str, setting: Setting) -> dict[str, object]:
    """The settings that were given, ``--quant`` among them as the key that says the same.

    Args:
        ask: what a person said.
        key: of the precision.
        setting: what that may be.

    Raises:
        UsageError: ``--quant`` is nothing that the key can be, or the settings say something else.
    """
    quant, inside = ask.quant, ask.settings.get(key)
    if quant is None:
        return dict(ask.settings)
    if not setting.fits(quant):
        raise UsageError(
            f"{key} cannot be this, nothing was written",
            where=f"--quant {quant:.40}",
            expected=setting.words,
            do=meant(quant, setting.values),
        )
    if inside not in (None, quant):
        raise UsageError("two precisions are named, nothing was written", where=f"--quant {quant}",
                         found=f"{key}: {inside!s:.40}")  # fmt: skip
    return {**ask.settings, key: quant}


def require_of_use(ask: Ask, title: str, *idle: str) -> None:
    """Raise for options that a compiler would not hear of.

    Args:
        ask: what a person said.
        title: the compiler's, for the error.
        idle: those that it has no use for, of ``--calibration``, ``--task`` and ``--toolchain-python``; the task of a
            text is no such thing.

    Raises:
        UsageError: one of them was given.
    """
    given = {
        "--calibration": ask.calibration is not None,
        "--task": ask.task not in (None, TEXT),
        "--toolchain-python": ask.python is not None,
    }
    if found := [option for option in idle if given[option]]:
        raise UsageError(f"{title} has no use for this, nothing was written", where=", ".join(found),
                         do="leave it out")  # fmt: skip


def settled(given: Mapping[str, object], known: Mapping[str, Setting], where: str) -> dict[str, object]:
    """All keys with their values, ``platform`` aside (see `chip`).

    Raises:
        UsageError: a key that is not known, or a value that it cannot have.
    """
    for key in given:
        if key not in known and key != PLATFORM:
            raise UsageError(f"there is no key {key!r:.80}, nothing was written", where=where,
                             expected=", ".join(known), do=meant(str(key), known))  # fmt: skip
    found: dict[str, object] = {}
    for key, setting in known.items():
        value = given.get(key, setting.otherwise)
        if key in given and not setting.fits(value):
            raise UsageError(
                f"{key} cannot be this, nothing was written",
                where=where,
                expected=setting.words,
                found=f"{value!r:.80}",
                do=meant(str(value), setting.values),
            )
        found[key] = value
    return found


def chip(asked: str | None, settings: Mapping[str, object], known: Mapping[str, str], target: str) -> str:
    """The chip that is meant, as the compiler spells it.

    Args:
        asked: ``--platform``; ``platform`` of the settings says the same.
        settings: as they were given.
        known: the chips, and what they are.
        target: the compiler's title, for errors.

    Raises:
        UsageError: none is named, an unknown one, or two.
    """
    inside = settings.get(PLATFORM)
    if asked is not None and inside is not None and str(inside).upper() != asked.upper():
        raise UsageError(
            "two chips are named, nothing was written", where=f"--platform {asked}", found=f"platform: {inside!s:.40}"
        )
    said = asked if asked is not None else inside
    spelled = {name.upper(): name for name in known}
    if said is None and len(known) == 1:
        return next(iter(known))
    if said is None or str(said).upper() not in spelled:
        raise UsageError(
            f"{target} compiles for one chip, nothing was written",
            where="--platform" if said is None else f"--platform {said!s:.40}",
            expected="\n".join(f"{name}  {what}" for name, what in known.items()),
            found="none is named" if said is None else "",
            do="" if said is None else meant(str(said), known),
        )
    return spelled[str(said).upper()]
