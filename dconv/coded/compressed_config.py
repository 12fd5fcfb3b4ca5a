"""``quantization_config`` of compressed-tensors: which weights are in which codes.

Sources: compressed-tensors 0.20.0, ``quantization/quant_config.py``, ``quant_scheme.py``, ``quant_args.py`` for what is
said, ``utils/match.py`` for which module a target means: the first that is its whole name, then the first regular
expression that fits its beginning, then its class. Files do not say classes: every matrix counts as ``Linear``, and as
another class only where no group has that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, Final

from dconv.coded.patterns import REPEATS, check_length, compiled, is_tame
from dconv.coded.places import place_of
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import is_list, is_mapping, is_texts

KEY: Final = "config.json: quantization_config"
METHOD: Final = "compressed-tensors"
FORMATS: Final = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized",
    "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized",
)  # fmt: skip
#: Says that each group has one of its own.
MIXED: Final = "mixed-precision"
STRATEGIES: Final = ("tensor", "channel", "group", "block", "tensor_group")
_REGEX: Final = "re:"
_LINEAR: Final = "Linear"
#: A config may be hostile, and matching takes time: more entries are no model's.
_MOST: Final = 50_000


@dataclass(frozen=True)
class Args:
    """How a group's weights are coded.

    Attributes:
        kind: ``int`` or ``float``.
        strategy: what shares a scale, one of `STRATEGIES`.
        group: columns of a group; 0 where the strategy has none.
        block: rows and columns of a block, where the strategy has them.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int = 0
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    """One of ``config_groups`` that codes weights."""

    name: str
    targets: tuple[str, ...]
    args: Args
    format: str


@dataclass(frozen=True)
class Target:
    """A target, or an entry of ``ignore``."""

    text: str

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Its expression, compiled once.

        Raises:
            Refused: it is no regular expression, or one that is not tried.
        """
        text = self.text.removeprefix(_REGEX)
        with suppress(ValueError):
            if is_tame(text):
                return compiled(text)
        raise Refused(
            "a target is a regular expression that is not tried, nothing was written",
            where=KEY,
            found=f"{self.text!r:.100}",
            expected=f"at most {REPEATS} repeats, none of a group",
        )

    def names(self, module: str) -> bool:
        """Whether it is the module's whole name, or an expression that fits its beginning."""
        if not self.text.startswith(_REGEX):
            return self.text == module
        return self._pattern.match(module) is not None

    def is_class_of(self, module: str) -> bool:
        """Whether it can be the module's class."""
        if not self.text.isidentifier() or self.text == module:
            return False
        embedding = place_of(f"{module}.weight", (1, 1)).role == "embedding"
        return (self.text == "Embedding") == embedding


@dataclass(frozen=True)
class Config:
    """What the config says.

    Attributes:
        groups: those that code weights.
        ignore: entries that leave modules out.
    """

    groups: tuple[Group, ...]
    ignore: tuple[Target, ...] = ()
    _found: dict[str, Group] = field(default_factory=dict[str, Group], compare=False, repr=False)

    @cached_property
    def _targets(self) -> list[tuple[Target, Group]]:
        """As compressed-tensors tries them; where two groups have one target, the last group has it."""
        named = {target: group for group in self.groups for target in group.targets}
        return [(Target(t), named[t]) for t in sorted(named, key=lambda text: (_REGEX in text, text))]

    def group_of(self, module: str, where: str) -> Group:
        """The group of a module whose weight is stored in codes.

        Args:
            module: the module's name, without ``.weight``.
            where: a stored tensor that shows that it is.

        Raises:
            Damaged: none has it, or it is to be left out.
        """
        check_length(module, where)
        if out := next((entry for entry in self.ignore if entry.names(module)), None):
            raise Damaged(
                "a weight is stored in codes that the config leaves out",
                where=f"{where}\n{KEY}.ignore: {out.text}",
                do="the config belongs to other files",
            )
        by_name = (group for target, group in self._targets if target.names(module))
        classes = [(target.text != _LINEAR, group) for target, group in self._targets if target.is_class_of(module)]
        group = next(by_name, None) or next((group for _, group in sorted(classes, key=itemgetter(0))), None)
        if group is None:
            raise Damaged(
                "a weight is stored in codes that no group of the config speaks of",
                where=where,
                expected=f"a target of {KEY}.config_groups that means {module}",
                do="the config belongs to other files",
            )
        return group


def config_of(said: Mapping[str, object]) -> Config:
    """``quantization_config``, read.

    Raises:
        Damaged: it is not of the form that compressed-tensors writes.
        Refused: a format, a strategy or a transform that this version does not decode.
    """
    _refuse_more(said)
    top = str(said.get("format") or "")
    groups = _mapping(said.get("config_groups"), "config_groups")
    ignore = said.get("ignore") or list[str]()
    if not is_list(ignore) or len(ignore) > _MOST or not is_texts(ignore):
        raise _odd("ignore", f"a list of at most {_MOST:,} names", ignore)
    found = [_group(str(name), group, top) for name, group in groups.items()]
    return Config(tuple(group for group in found if group), tuple(map(Target, dict.fromkeys(ignore))))


def _refuse_more(said: Mapping[str, object]) -> None:
    """Refuse what makes weights of codes by more than a scale.

    Raises:
        Refused: weights are sparse, or are right only behind a transform.
    """
    sparsity = said.get("sparsity_config")
    kind = sparsity.get("format") if is_mapping(sparsity) else None
    if kind not in (None, "", "dense"):
        raise Refused(
            "the weights are stored sparse, which this version does not decode, nothing was written",
            where=f"{KEY}.sparsity_config.format",
            found=f"{kind!r:.80}",
            expected="dense",
            do="decompress them with the compressed-tensors that wrote them (0.14 at the latest)",
        )
    transform = said.get("transform_config")
    if is_mapping(transform) and transform.get("config_groups"):
        raise Refused(
            "the weights were rotated, and are right only behind transforms that a plain model lacks, "
            "nothing was written",
            where=f"{KEY}.transform_config",
        )


def _group(name: str, said: object, top: str) -> Group | None:
    """A group, or None where it does not code weights."""
    at = f"config_groups.{name:.60}"
    if isinstance(said, list):
        raise Refused(
            "a group is a preset's name, whose meaning is the writer's, nothing was written",
            where=f"{KEY}.{at}",
            expected="targets, weights and format spelled out, as compressed-tensors saves them",
        )
    group = _mapping(said, at)
    targets = group.get("targets")
    if not is_list(targets) or len(targets) > _MOST or not is_texts(targets):
        raise _odd(f"{at}.targets", f"a list of at most {_MOST:,} names", targets)
    if group.get("weights") is None:
        return None
    form = str(group.get("format") or top)
    if form not in FORMATS:
        raise Refused(
            "weights are in a format that this version does not decode, nothing was written",
            where=f"{KEY}.{at}.format" if group.get("format") or top == MIXED else f"{KEY}.format",
            found=f"{form!r:.80}",
            expected=", ".join(FORMATS),
        )
    return Group(name, tuple(targets), _args(_mapping(group["weights"], f"{at}.weights"), f"{at}.weights"), form)


def _args(said: Mapping[str, Any], at: str) -> Args:
    bits, kind, size = said.get("num_bits", 8), said.get("type", "int"), said.get("group_size")
    if type(bits) is not int or not 1 <= bits <= 8:
        raise _odd(f"{at}.num_bits", "1 to 8", bits)
    if kind not in ("int", "float"):
        raise _odd(f"{at}.type", "int or float", kind)
    if size is not None and type(size) is not int:
        raise _odd(f"{at}.group_size", "a whole number", size)
    strategy = said.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in STRATEGIES:
        raise Refused(
            "weights share scales in a way that this version does not decode, nothing was written",
            where=f"{KEY}.{at}.strategy",
            found=f"{strategy!r:.80}",
            expected=", ".join(STRATEGIES),
        )
    grouped = strategy in ("group", "tensor_group")
    if grouped and (size is None or size < 1):
        raise _odd(f"{at}.group_size", "a positive whole number", size)
    return Args(
        bits,
        kind,
        said.get("symmetric", True) is not False,
        strategy,
        size if grouped and size else 0,
        _block(said.get("block_structure"), f"{at}.block_structure") if strategy == "block" else None,
    )


def _block(said: object, at: str) -> tuple[int, int]:
    if isinstance(said, str) and re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", said, re.ASCII):
        said = [int(part) for part in said.split("x")]  # as it was written once
    if not is_list(said) or len(said) != 2 or not all(type(n) is int and n > 0 for n in said):
        raise _odd(at, "a pair of positive whole numbers", said)
    return said[0], said[1]


def _mapping(said: object, at: str) -> Mapping[str, Any]:
    if not is_mapping(said):
        raise _odd(at, "a mapping", said)
    return said


def _odd(at: str, expected: str, found: object) -> Damaged:
    return Damaged(
        "the quantization config is not of the form that compressed-tensors writes",
        where=f"{KEY}.{at}",
        expected=expected,
        found=f"{found!r:.80}",
    )
