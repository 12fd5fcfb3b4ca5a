"""``quantization_config`` of a GPTQ checkpoint: what all of its weights have in common, and what single ones do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from dconv.codec.bitpack import Layout
from dconv.codec.gptq import Version
from dconv.coded.integers import Grid, chosen_by
from dconv.coded.patterns import LONGEST, compiled, is_tame
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import is_mapping, mapping_or_empty

METHOD: Final = "gptq"
_WHERE: Final = "quantization_config"
#: ``checkpoint_format`` -> how zeros are stored, how codes are packed, and of how many bits they may be.
_FORMATS: Final[dict[str, tuple[Version, Layout, tuple[int, ...]]]] = {
    "gptq": ("v1", "stream", (2, 3, 4, 8)),
    "gptq_v2": ("v2", "stream", (2, 3, 4, 8)),
    "gptq_p": ("v2", "planar", (2, 3, 4, 5, 6, 7, 8)),
}
_SKIP: Final = "-:"
#: A config may be hostile, and matching takes time: more entries are no model's.
_MOST: Final = 10_000
#: A repeat at the end of an expression takes no time.
_REST: Final = re.compile(r"(?<!\\)\.\*\$?$")


@dataclass(frozen=True)
class Rule:
    """One entry of ``dynamic``: a regular expression for the beginning of a module's name, and what it changes.

    Source: GPTQModel 7.7.0, ``quantization/config.py``, ``_resolve_dynamic_override``; vLLM's is the same.
    """

    text: str
    pattern: re.Pattern[str]
    skip: bool
    changes: Mapping[str, object]


@dataclass(frozen=True)
class Config:
    """What the config says.

    Attributes:
        version: how zeros are stored.
        layout: of codes in words.
        carry: GPTQModel wrote it, so that its reading of zeros is the right one (`dconv.codec.gptq`).
        rules: the first that fits a module counts.
    """

    grid: Grid
    version: Version
    layout: Layout
    carry: bool
    rules: tuple[Rule, ...]
    allowed: tuple[int, ...]

    def grid_of(self, module: str) -> Grid:
        """The grid of one module.

        Raises:
            Damaged: it is left out of quantisation, or changed to what makes no sense.
        """
        rule = next((rule for rule in self.rules if rule.pattern.match(module[:LONGEST])), None)
        if rule is None:
            return self.grid
        if rule.skip:
            raise Damaged(
                "a weight is in codes that the config leaves out of quantisation",
                where=f"{module}.qweight",
                found=f"dynamic {rule.text!r:.80}",
                do="the config belongs to other files",
            )
        base = {"bits": self.grid.bits, "group_size": self.grid.group}
        claims = {"sym": self.grid.symmetric, "desc_act": self.grid.ordered}
        grid = _grid({**base, **claims, **rule.changes}, self.allowed, f"{_WHERE}.dynamic {rule.text!r:.80}")
        return replace(grid, chosen_by=self.grid.chosen_by)


def config_of(said: Mapping[str, object]) -> Config:
    """Read ``quantization_config``, or the ``quantize_config.json`` beside it.

    Raises:
        Refused: a format or a width that is not known.
        Damaged: a value that makes no sense, or one that is missing.
    """
    names = {str(said[key]).lower() for key in ("checkpoint_format", "format") if said.get(key) is not None}
    if said.get("is_marlin_format"):
        names.add("marlin")
    name = names.pop() if len(names) == 1 else "" if names else "gptq"
    if name not in _FORMATS:
        found = name or ", ".join(f"{key} {said[key]!r:.40}" for key in ("checkpoint_format", "format") if key in said)
        raise Refused(
            "the source's GPTQ format is not one that this version decodes, nothing was written",
            where=f"{_WHERE}.checkpoint_format",
            found=f"{found:.80}",
            expected=" or ".join(_FORMATS),
            do="formats of one kernel (marlin, exllama, bitblas) are made from these when a model is loaded",
        )
    if said.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise Refused(
            "codes are packed in words that this version does not read, nothing was written",
            where=f"{_WHERE}.pack_dtype",
            found=f"{said['pack_dtype']!r:.80}",
            expected="int32",
        )
    version, layout, allowed = _FORMATS[name]
    grid = _grid(said, allowed, _WHERE)
    carry = any(program.lower().startswith("gptqmodel:") for program in grid.chosen_by)
    return Config(grid, version, layout, carry, _rules(said.get("dynamic")), allowed)


def _grid(said: Mapping[str, object], allowed: tuple[int, ...], where: str) -> Grid:
    bits, group = said.get("bits"), said.get("group_size")
    if type(bits) is not int or type(group) is not int or not (group == -1 or 0 < group < 1 << 31):
        key, value = ("bits", bits) if type(bits) is not int else ("group_size", group)
        expected = "a whole number" if key == "bits" else "-1, or how many columns share a scale"
        raise Damaged(f"{key} makes no sense", where=f"{where}.{key}", expected=expected, found=f"{value!r:.80}")
    if bits not in allowed:
        raise Refused(
            f"no GPTQ format that is known has {bits} bits so, nothing was written",
            where=f"{where}.bits",
            expected=", ".join(map(str, allowed)),
        )
    return Grid(bits, group, said.get("sym") is True, said.get("desc_act") is True, chosen_by(said))


def _rules(said: object) -> tuple[Rule, ...]:
    where = f"{_WHERE}.dynamic"
    if said is None or said is False:
        return ()
    if not is_mapping(said) or len(said) > _MOST:
        raise Damaged("dynamic is no table of modules", where=where, found=f"{said!r:.80}")
    return tuple(_rule(str(text), changes, where) for text, changes in said.items())


def _rule(text: str, changes: object, where: str) -> Rule:
    skip = text.startswith(_SKIP)
    raw = text[2:] if text.startswith((_SKIP, "+:")) else text
    if not is_mapping(changes) and not (skip and changes is None):
        raise Damaged("dynamic is no table of modules", where=f"{where} {text!r:.80}", found=f"{changes!r:.80}")
    if len(raw) > LONGEST or not is_tame(_REST.sub("", raw)):
        raise Refused(
            "an expression for modules is too long a search to be tried",
            where=f"{where} {text!r:.80}",
            do="write it with fewer repeats",
        )
    try:
        pattern = compiled(raw)
    except ValueError as error:
        raise Damaged("no regular expression", where=f"{where} {text!r:.80}", found=str(error)) from error
    return Rule(text, pattern, skip, mapping_or_empty(changes))
