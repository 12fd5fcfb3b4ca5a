"""Names of modules folded without a loss: in ranges of which every combination is a name, siblings side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from dconv.errors import group_names

#: As in `dconv.errors.group_names`, which folds each number by itself.
_NUMBER: Final = re.compile(r"(?<!\d)\d{1,9}(?!\d)")
#: Patterns of a notice.
_FEW: Final = 4
_Box = tuple[frozenset[str], ...]


def folded(names: Iterable[str]) -> list[str]:
    """``model.layers.{0..31}.self_attn.{q,k,v}_proj``: exactly the names, each once, less a last ``.weight``."""
    return list(_side_by_side(_exact(name.removesuffix(".weight") for name in names)))


def some(names: Iterable[str]) -> str:
    """`folded` on one line, for a notice: a few of them, and how many more there are."""
    found = folded(names)
    return ", ".join(found[:_FEW]) + (f", … and {len(found) - _FEW} more patterns" if len(found) > _FEW else "")


def _exact(names: Iterable[str]) -> Iterator[str]:
    """Names folded by their numbers into ranges of which every combination is a name."""
    templates: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        templates.setdefault(_NUMBER.sub("\0", name), set()).add(tuple(_NUMBER.findall(name)))
    for template, members in templates.items():
        boxes: list[_Box] = [tuple(frozenset((number,)) for number in member) for member in sorted(members)]
        for column in reversed(range(template.count("\0"))):
            joined: dict[tuple[_Box, _Box], frozenset[str]] = {}
            for box in boxes:
                around = box[:column], box[column + 1 :]
                joined[around] = joined.get(around, frozenset()) | box[column]
            boxes = [(*before, numbers, *after) for (before, after), numbers in joined.items()]
        yield from (_filled(template, box) for box in boxes)


def _filled(template: str, box: _Box) -> str:
    ranges = (group_names(numbers, limit=1) for numbers in box)
    for numbers in ranges:
        template = template.replace("\0", numbers, 1)
    return template


def _side_by_side(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in their last part alone as one: ``self_attn.{q,k,v}_proj``."""
    modules: dict[str, list[str]] = {}
    for name in names:
        before, dot, last = name.rpartition(".")
        modules.setdefault(before + dot, []).append(last)
    for before, lasts in modules.items():
        end = "_proj" if all(last.endswith("_proj") for last in lasts) else ""
        stems = [last.removesuffix(end) for last in lasts]
        yield before + (f"{{{','.join(stems)}}}{end}" if len(stems) > 1 else lasts[0])
