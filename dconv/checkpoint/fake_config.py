"""``--fake-weight-config FILE``: sizes and fills of a model that is to be made up.

    dimensions: {num_hidden_layers: 4, hidden_size: 256}     config keys; a dotted one reaches into a nested config
    shapes: {"model.layers.*.mlp.down_proj.weight": [256, 1024]}
    fill: position                                           zeros | position | {constant: 0.5} | {normal: {std, seed}}
    fills: {"*norm.weight": {constant: 1}}                   the first pattern that matches a name counts

A shape is not taken on trust: the key of the config that decides it is found and changed, or the shape is refused with
the rule that it breaks.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.small_config import read_mapping
from dconv.codec.fill import KINDS, Fill
from dconv.errors import UsageError
from dconv.sharding.parsed import is_dict, is_list

_KEYS: Final = ("dimensions", "shapes", "fill", "fills")


@dataclass(frozen=True)
class Wishes:
    """What the file asks for.

    Attributes:
        file: where it is from, for errors.
        shapes: by pattern of tensor names.
        fills: by pattern, before ``fill``.
    """

    file: Path = Path()
    dimensions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    fill: Fill = Fill()
    fills: Mapping[str, Fill] = field(default_factory=dict[str, Fill])

    def pattern_of(self, name: str) -> str | None:
        """The pattern of ``fills`` that counts for a tensor."""
        return next((pattern for pattern in self.fills if fnmatchcase(name, pattern)), None)

    def fill_of(self, name: str) -> Fill:
        """What fills a tensor: by the pattern that its name fits, else ``fill``."""
        pattern = self.pattern_of(name)
        return self.fill if pattern is None else self.fills[pattern]

    def changed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with the wished-for dimensions; a list with an entry for each layer is cut to fewer layers.

        Raises:
            UsageError: a key that the config does not have.
        """
        made = copy.deepcopy(dict(config))
        for key, value in self.dimensions.items():
            *path, last = key.split(".")
            held: Any = made
            for part in path:
                held = held.get(part) if is_dict(held) else None
            if not is_dict(held) or last not in held:
                raise UsageError(
                    "a dimension that config.json does not have",
                    where=f"{told(key)} in {self.file}",
                    expected="a key of config.json: " + ", ".join(numbers(config)),
                )
            before, held[last] = held[last], value
            if last == "num_hidden_layers" and _is_size(before) and _is_size(value):
                for other, entries in held.items():
                    if is_list(entries) and len(entries) == before > value:
                        held[other] = entries[:value]
        return made


def numbers(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The config's keys that are sizes, dotted."""
    found: list[str] = []
    for key, value in config.items():
        if is_dict(value):
            found += numbers(value, f"{prefix}{key}.")
        elif _is_size(value):
            found.append(prefix + key)
    return found


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_wishes(path: Path) -> Wishes:
    """Read a JSON or YAML file.

    Raises:
        UsageError: no such file, or not of the form above.
        Damaged: JSON that is none.
    """
    said = read_mapping(path, "--fake-weight-config", expected="JSON or YAML: " + ", ".join(_KEYS))
    unknown = [key for key in said if key not in _KEYS]
    if unknown:
        raise UsageError(
            "--fake-weight-config has keys that it does not know",
            where=str(path),
            expected=", ".join(_KEYS),
            found=", ".join(map(str, unknown)),
        )
    shapes = {pattern: _shape(path, pattern, shape) for pattern, shape in _mapping(path, said, "shapes").items()}
    fills = {pattern: _fill(path, pattern, fill) for pattern, fill in _mapping(path, said, "fills").items()}
    fill = _fill(path, "fill", said.get("fill", "zeros"))
    return Wishes(path, _mapping(path, said, "dimensions"), shapes, fill, fills)


def _mapping(path: Path, said: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = said.get(key, {})
    if not is_dict(value) or not all(isinstance(name, str) for name in value):
        raise _wrong(path, key, "a mapping by name", value)
    return value


def _shape(path: Path, pattern: str, value: object) -> tuple[int, ...]:
    if not is_list(value) or not value or not all(map(_is_size, value)):
        raise _wrong(path, pattern, "a list of sizes such as [4096, 11008]", value)
    return tuple(value)


def _fill(path: Path, name: str, value: object) -> Fill:
    kind, options = value, dict[str, Any]()
    if is_dict(value) and len(value) == 1:
        ((kind, options),) = value.items()
        options = {"value": options} if kind == "constant" else options
    known = {"constant": {"value"}, "normal": {"std", "seed"}}.get(str(kind), set[str]())
    if (
        kind not in KINDS
        or (kind == "constant" and not options)
        or not is_dict(options)
        or not known.issuperset(options)
        or not all(map(_is_number, options.values()))
        or not isinstance(options.get("seed", 0), int)
        or options.get("std", 0) < 0
    ):
        raise _wrong(path, name, "zeros, position, {constant: NUMBER} or {normal: {std: NUMBER, seed: N}}", value)
    return Fill(str(kind), **options)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )  # false of NaN, too


def told(key: str) -> str:
    """A key or a pattern of the file as an error names it: on one line, and not at any length."""
    return key if key.isprintable() and len(key) <= 200 else f"{key!r:.200}"


def _wrong(path: Path, name: str, expected: str, found: object) -> UsageError:
    return UsageError(
        f"--fake-weight-config: {told(name)} is wrong", where=str(path), expected=expected, found=f"{found!r:.80}"
    )
