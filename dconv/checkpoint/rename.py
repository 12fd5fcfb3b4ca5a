"""House spellings: patterns from a file, laid over the stored names before any table sees them.

A pattern is plain text in which ``*`` stands for any stretch of characters, each taken as short as it can be from the
left. There are no regular expressions: matching takes one pass over a name, whatever the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

from dconv.checkpoint.small_config import read_mapping
from dconv.errors import Refused, UsageError, group_names

_T = TypeVar("_T")

#: Nobody writes more by hand.
_MOST_RULES: Final = 1000


@dataclass(frozen=True, slots=True)
class Rule:
    """``pattern`` -> ``result``, both with the same number of ``*``."""

    pattern: str
    result: str

    def apply(self, name: str) -> str | None:
        """The new name; None where the pattern does not match."""
        first, *rest = self.pattern.split("*")
        if not rest:
            return self.result if name == first else None
        last = rest.pop()
        end = len(name) - len(last)
        if not name.startswith(first) or not name.endswith(last) or end < len(first):
            return None
        taken: list[str] = []
        at = len(first)
        for literal in rest:
            found = name.find(literal, at, end)
            if found < 0:
                return None
            taken.append(name[at:found])
            at = found + len(literal)
        taken.append(name[at:end])
        parts = self.result.split("*")
        return parts[0] + "".join(text + part for text, part in zip(taken, parts[1:], strict=True))


@dataclass(frozen=True)
class Renaming:
    """Rules in their order: the first that matches a name renames it, once.

    Attributes:
        file: where they come from.
        used: the patterns that have matched something so far.
        submodel: which of a distillation checkpoint's two models is wanted, ``student`` or ``teacher``; "" where it
            must be no such checkpoint.
        seen: the submodels that have been met so far, with the prefix each has.
        taken: the one that was wanted, once a tensor of it has been met, with a prefix or without.
    """

    rules: tuple[Rule, ...] = ()
    file: Path = Path()
    used: set[str] = field(default_factory=set[str])
    submodel: str = ""
    seen: dict[str, str] = field(default_factory=dict[str, str])
    taken: set[str] = field(default_factory=set[str])

    def __call__(self, held: Mapping[str, _T], where: object) -> dict[str, _T]:
        """The same values under their new names.

        Args:
            held: anything by stored name.
            where: the file that holds the names, for an error.

        Raises:
            Refused: two names would become one.
        """
        renamed: dict[str, _T] = {}
        before: dict[str, str] = {}
        for name, value in held.items():
            new = self._of(name)
            if new in renamed:
                raise Refused(
                    "--rename gives two tensors one name, nothing was written",
                    where=f"{before[new]} and {name} in {where}",
                    expected="another name for each",
                    found=f"{new} twice",
                    do=f"change the patterns in {self.file}",
                )
            renamed[new], before[new] = value, name
        return self._chosen(renamed, where)

    def _chosen(self, held: Mapping[str, _T], where: object) -> dict[str, _T]:
        """The submodel's own under its own names."""
        chosen: dict[str, _T] = {}
        for name, value in held.items():
            match = _SUBMODEL.match(name)
            which = "student" if match is None or not match[1] else "teacher"  # ModelOpt's student has no prefix
            if match is not None and not self.submodel:
                raise _two_models(name, where)
            if match is not None:
                self.seen[which] = match[0]
            if not self.submodel or which == self.submodel:
                self.taken.add(which)
                own = name[match.end() :] if match else name
                if own in chosen:
                    raise _two_models(name, where)
                chosen[own] = value
        return chosen

    def left_out(self) -> dict[str, str]:
        """The submodel that was not asked for, with the reason."""
        return {
            f"{prefix}*": f"the {which}'s: --submodel {self.submodel}"
            for which, prefix in self.seen.items()
            if which != self.submodel
        }

    def check_submodel(self, where: object) -> None:
        """To be asked once all names of a checkpoint have passed.

        Raises:
            Refused: the wanted submodel is not there.
        """
        if self.submodel and (not self.seen or self.submodel not in self.taken):
            raise Refused(
                f"there is no {self.submodel} in this checkpoint, nothing was written",
                where=str(where),
                expected=f"tensors under {self.submodel}_model.",
                found=", ".join(f"{prefix}*" for prefix in self.seen.values()) or "one model alone",
                do=f"--submodel {next(iter(self.seen))}" if self.seen else "leave --submodel out",
            )

    def _of(self, name: str) -> str:
        for rule in self.rules:
            new = rule.apply(name)
            if new is not None:
                self.used.add(rule.pattern)
                return new
        return name

    def check_used(self, where: object) -> None:
        """To be asked once all names of a checkpoint have passed.

        Raises:
            Refused: a pattern matched none of them (or only such as an earlier pattern took).
        """
        idle = [rule.pattern for rule in self.rules if rule.pattern not in self.used]
        if idle:
            raise Refused(
                f"{len(idle)} of {len(self.rules)} patterns of --rename match no tensor, nothing was written",
                where=f"{group_names(idle)}\nin {self.file}",
                expected=f"names that are in {where}, and not taken by an earlier pattern",
                do="dconv inspect shows the names; take the pattern out or correct it",
            )


def _two_models(name: str, where: object) -> Refused:
    return Refused(
        "a distillation checkpoint, which holds models under names of their own, nothing was written",
        where=f"{name} in {where}",
        expected="one model",
        found=f"{name.partition('.')[0]}.*",
        do="--submodel student, or --submodel teacher, takes one out",
    )


#: What ``--submodel`` takes.
SUBMODELS: Final = ("student", "teacher")
#: ``student_model.`` and ``teacher_model.`` of training scripts; ModelOpt has an underscore before.
_SUBMODEL: Final = re.compile(r"_?(?:student|(teacher))(?:_model)?\.")
#: Every name stays as it is.
AS_STORED: Final = Renaming()


def renaming_of(rename: str | Path | None, submodel: str | None = None) -> Renaming:
    """What ``--rename`` and ``--submodel`` make of the stored names.

    Raises:
        UsageError, Damaged: see `read_renaming`.
    """
    rules = AS_STORED if rename is None else read_renaming(Path(rename))
    return replace(rules, submodel=submodel or "", used=set[str](), seen={}, taken=set[str]())


def read_renaming(path: Path) -> Renaming:
    """The rules of a JSON or YAML file: one mapping of patterns to patterns.

    Raises:
        UsageError: no such file, not a mapping of text to text, or a pattern that cannot be one.
        Damaged: JSON that is none.
    """
    said = read_mapping(path, "--rename", expected="JSON or YAML: pattern -> pattern", texts=True)
    if not said or len(said) > _MOST_RULES:
        raise UsageError(
            "--rename takes one mapping of patterns to patterns",
            where=str(path),
            expected=f"1 to {_MOST_RULES} lines such as  backbone.*: model.*",
            found=f"{len(said)} entries",
        )
    return Renaming(tuple(_rule(path, pattern, result) for pattern, result in said.items()), path)


def _rule(path: Path, pattern: object, result: object) -> Rule:
    if not isinstance(pattern, str) or not isinstance(result, str) or not pattern or not result:
        raise UsageError(
            "--rename takes text to text",
            where=str(path),
            expected="pattern: pattern",
            found=f"{pattern!r:.80}: {result!r:.80}",
        )
    if "**" in pattern or pattern.count("*") != result.count("*"):
        raise UsageError(
            "a pattern of --rename that cannot be applied",
            where=f"{pattern[:200]}: {result[:200]}\nin {path}",
            expected="as many * on the right as on the left, no two of them side by side",
        )
    return Rule(pattern, result)
