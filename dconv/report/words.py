"""The precision report for a terminal: labelled values, a few lines each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from dconv.errors import group_names
from dconv.report.precision import Class, Precision, ranges
from dconv.report.statistics import Statistics

#: Lines of classes and of faults that a person reads; ``--json`` has all.
_MANY: Final = 40
#: Roles whose classes are one line together, as long as they agree.
_TOGETHER: Final = {"norm": "norms", "bias": "biases", "embedding": "embeddings"}
_NAME: Final = 34
_LISTED: Final = 12
_NOT: Final = "not in fp8"


def rows(report: Precision, *, full: bool = True) -> list[tuple[str, str]]:
    """Labels and values; ``full`` has the classes and what is wrong, too, which a page shows by themselves."""
    said = [("precision", "\n".join(_classes(report.classes)))] if full else []
    if report.blocks is None and report.method:
        said.append(("quantised", f"{report.method}, as config.json says"))
    if report.blocks or report.with_scales:
        counts = f"{len(report.with_scales):,} linear modules with scales, {len(report.without_scales):,} without"
        said.append(("fp8", counts))
    if report.blocks:
        agree = "and the shapes of all scales agree" if not report.blocks.disagree else "and shapes of scales disagree"
        agree = agree if report.with_scales else "and there are no scales"
        said.append(("blocks", f"{report.blocks.words} ({report.blocks.said_by}), {agree}"))
    if report.scales:
        said.append(("scales", scale_words(report.scales)))
    if report.blocks:
        said += _listed(report)
    for fault in report.faults if full else ():
        lines = [fault.what, *(f"  {line}" for line in fault.where.split("\n") if line)]
        lines += [f"  leads to: {fault.leads_to}"] * bool(fault.leads_to) + [f"  do: {fault.do}"] * bool(fault.do)
        said.append(("wrong", "\n".join(lines)))
    return said


def _listed(report: Precision) -> Iterable[tuple[str, str]]:
    listed = report.listing.entries if report.listing else None
    if report.listing and listed is not None:
        texts = group_names((entry.text[:200] for entry in listed), _LISTED).split("\n") if listed else ["nothing"]
        yield _NOT, f"{report.listing.key} lists {', '.join(texts)}"
    else:
        yield _NOT, "no list: the output layer by default"
    right = group_names(report.right, _LISTED).split("\n")
    yield "", f"right would be {', '.join(right)}" if report.right else "none need be listed"


def scale_words(scales: Statistics) -> str:
    """Count and range, and how many values are odd."""
    text = f"{scales.count:,} values"
    if scales.low is not None and scales.high is not None:
        text += f" from {scales.low:.3g} to {scales.high:.3g}"
    odd = {"zero": scales.zeros, "below 0": scales.negative, "infinite or no number": scales.broken}
    return text + "".join(f", {n:,} {what}" for what, n in odd.items() if n)


def _classes(classes: Sequence[Class]) -> Iterable[str]:
    lines: list[str] = []
    together: dict[str, list[Class]] = {}
    for each in classes:
        if each.role in _TOGETHER:
            together.setdefault(each.role, []).append(each)
        else:
            lines.append(_line(each.kind, each.states, each))
    for role, members in together.items():
        states = sum((Counter(dict(each.states)) for each in members), Counter[str]())
        one = members[0].kind if len(members) == 1 else f"{len(members)} classes of {_TOGETHER[role]}"
        lines.append(_line(one, states, members[0] if len(members) == 1 else None))
    more = [f"… and {len(lines) - _MANY} more classes, --json has all"] if len(lines) > _MANY else []
    return [*lines[:_MANY], *more]


def _line(name: str, states: Mapping[str, int], one: Class | None) -> str:
    parts: list[str] = []
    for state, n in states.items():
        where = ""
        if one and len(states) > 1 and one.layers.get(state):
            layers = one.layers[state]
            where = f" (layer{'s' * (len(layers) != 1)} {ranges(layers)})"
        parts.append(f"{n:,} {state}{where}")
    return f"{name[:100]:<{_NAME}} {', '.join(parts)}"
