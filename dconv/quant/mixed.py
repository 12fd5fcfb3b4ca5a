"""A table laid over a model's names: what each weight gets, decided before any work.

Linear layers get what the table says. The output layer gets it where an override of its own says so, or ``lm_head``;
routers and gates of one row are left as they are, since no loader takes them in codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd

from dconv.coded.places import loaded_as, place_of
from dconv.errors import Refused, UsageError, group_names
from dconv.quant.kinds import KINDS, PLAIN, ROW
from dconv.quant.names import some
from dconv.quant.settings import Quantization
from dconv.quant.table import Fields, Override, Table

SKIPPED, ROUTER, HEAD, ODD = "skipped", "router", "output layer", "no whole groups"


@dataclass(frozen=True)
class Choice:
    """What one weight gets.

    Attributes:
        wq: its type, a key of `dconv.quant.kinds.KINDS`.
        group: columns that share a scale, `ROW` for all of a row, 0 where there are no scales. Of ``fp8``, rows as
            well.
        element: the format of a floating code; "" of whole numbers.
        aq: the type to which activations are rounded as they come; `PLAIN` for none.
        why: why it is left as it is, where that is not the table's ``wq``.
    """

    wq: str
    group: int = 0
    element: str = ""
    aq: str = PLAIN
    why: str = ""

    @property
    def bits(self) -> int:
        """Bits of a weight's code; 16 where it stays as it is."""
        return KINDS[self.wq].bits

    @property
    def plain(self) -> bool:
        """Whether it stays as it is."""
        return self.wq == PLAIN

    @property
    def integer(self) -> bool:
        """Whether codes are whole numbers, see `dconv.quant.kinds.Kind.integer`."""
        return KINDS[self.wq].integer

    @property
    def words(self) -> str:
        """For a person: ``int4 g128``."""
        if self.plain:
            return f"as it is ({self.why})" if self.why else "as it is"
        kind = KINDS[self.wq]
        name = f"{self.wq}_{self.element}" if len(kind.elements) > 1 else self.wq
        shared = "rows" if self.group == ROW else f"{self.group}x{self.group}" if kind.blocks else f"g{self.group}"
        return f"{name} {shared}" + (f", activations {self.aq}" if self.aq != PLAIN else "")


@dataclass(frozen=True)
class Resolved:
    """What every weight of a model gets.

    Attributes:
        choices: by the HuggingFace name of the tensor: every matrix of a linear layer, of a router and of the output.
        notices: what was corrected or left out, for a person; a line or more each.
    """

    choices: Mapping[str, Choice]
    notices: tuple[str, ...] = ()

    @property
    def coded(self) -> dict[str, Choice]:
        """Those that do not stay as they are."""
        return {name: choice for name, choice in self.choices.items() if not choice.plain}

    def describe(self) -> dict[str, str]:
        """In plain JSON: every weight's choice in words."""
        return {name: choice.words for name, choice in self.choices.items()}


@dataclass
class _Notices:
    """Names by what there is to say of them."""

    names: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def say(self, words: str, name: str) -> None:
        self.names.setdefault(words, []).append(name)

    def lines(self) -> list[str]:
        return [f"{words}: {some(names)}" for words, names in self.names.items()]


@dataclass(frozen=True)
class _Merged:
    """Fields merged so far; ``asked``: the group was said for this very type."""

    said: Fields
    asked: bool = False

    def with_(self, new: Fields) -> _Merged:
        other = new.wq is not None and new.wq != self.said.wq  # a format of the old type is none of the new
        element = new.element if new.element is not None or other else self.said.element
        merged = Fields(
            new.wq if new.wq is not None else self.said.wq,
            new.aq if new.aq is not None else self.said.aq,
            new.group if new.group is not None else self.said.group,
            new.skip if new.skip is not None else self.said.skip,
            element,
        )
        return _Merged(merged, new.group is not None or (self.asked and not other))


def resolve(
    config: Quantization,
    shapes: Mapping[str, tuple[int, ...]],
    linears: Collection[str] | None = None,
    *,
    strict: bool = False,
) -> Resolved:
    """What every weight of a model gets.

    Args:
        config: the table, and the method that has to take what it says. A ready made table is for models of many
            sizes: what does not fit a shape is corrected, and said, instead of refused.
        shapes: of the model's tensors by their HuggingFace names, ``.weight`` and all; what is no matrix of a linear
            layer, of a router or of the output layer is read over.
        linears: the weights that may be quantised (`dconv.coded.encode.linears`); where None, all matrices that names
            alone tell for linear layers, a vision tower's and an encoder's among them.
        strict: a pattern that matches nothing is an error.

    Raises:
        UsageError: the config contradicts itself.
        Refused: a pattern matches nothing and ``strict``; a group that does not divide a weight's columns; nothing is
            left to quantise; experts that are one tensor for all.
    """
    preset = bool(config.preset)
    found = _Notices()
    choices: dict[str, Choice] = {}
    hits = [0] * len(config.table.overrides)
    stacked: list[str] = []
    for name, shape in shapes.items():
        fitting = [at for at, override in enumerate(config.table.overrides) if override.fits(name)]
        place = place_of(name, shape)
        if place.role not in ("linear", "router", "head") or name.endswith(".bias"):
            continue
        if place.role == "linear" and linears is not None and name not in linears and shape[0] > 1:
            continue
        for at in fitting:
            hits[at] += 1
        if place.role == "linear" and len(shape) > 2:
            stacked.append(name)
            continue
        if len(shape) != 2:
            continue
        overrides = [config.table.overrides[at] for at in fitting]
        if place.role == "router" or shape[0] == 1:
            choices[name] = Choice(PLAIN, why=ROUTER)
            continue
        if place.role == "head" and not _head_is_meant(overrides, config.lm_head, name):
            choices[name] = Choice(PLAIN, why=HEAD)
            continue
        choice = _choice(config.table, overrides, name, found)
        choices[name] = choice
    idle = [override for override, count in zip(config.table.overrides, hits, strict=True) if not count]
    notices = _idle(idle, strict, preset)
    choices |= _refitted(choices, shapes, preset, found)
    if stacked and any(not choice.plain for choice in choices.values()):
        raise Refused(
            "experts are one tensor for all, which is not quantised by weight, nothing was written",
            where=group_names(stacked),
            expected="a matrix for each expert",
        )
    if not any(not choice.plain for choice in choices.values()):
        raise Refused(
            "nothing is left to quantise, nothing was written",
            expected="a default or an override with a type other than bf16, for linear layers that there are",
            found=f"{len(choices)} matrices, all of them left as they are"
            if choices
            else "no matrix of a linear layer",
        )
    return Resolved(choices, (*notices, *found.lines()))


def _choice(table: Table, overrides: Iterable[Override], name: str, found: _Notices) -> Choice:
    """The fields that hold for a name, as a type has them."""
    merged = _Merged(Fields()).with_(table.default)
    for override in overrides:
        merged = merged.with_(override.fields)
    said = merged.said
    if said.skip:
        return Choice(PLAIN, why=SKIPPED)
    kind = KINDS[said.wq or PLAIN]
    if kind.name == PLAIN:
        return Choice(PLAIN)
    if said.element is not None and said.element not in kind.elements:
        raise UsageError(
            "extra says a format that the type does not have",
            where=name,
            expected=f"{' or '.join(kind.elements) or 'no extra'} for {kind.name}",
            found=said.element,
        )
    group = said.group
    if group is None or group not in kind.groups:
        if group is not None and merged.asked:
            if kind.integer:
                raise UsageError(
                    "a group size that no loader takes",
                    where=name,
                    expected=", ".join(map(str, kind.groups)),
                    found=str(group),
                )
            found.say(f"{kind.name} has groups of {kind.group}, {group} was asked for", name)
        group = kind.group
    return Choice(kind.name, group, said.element or (kind.elements or ("",))[0], said.aq or PLAIN)


def _head_is_meant(overrides: Iterable[Override], lm_head: bool, name: str) -> bool:
    """Whether the output layer gets what the table says.

    Raises:
        UsageError: ``lm_head`` is asked for, and skipped.
    """
    said = Fields()
    for override in overrides:
        said = _Merged(said).with_(override.fields).said
    if lm_head and said.skip:
        raise UsageError(
            "the output layer is to be quantised and to be skipped", where=name, found="lm_head true, skip true"
        )
    return lm_head or (said.wq is not None and not said.skip)


def _idle(idle: list[Override], strict: bool, preset: bool) -> list[str]:
    """What to say of patterns that match no weight that could be quantised.

    Raises:
        Refused: there are some, and ``strict``.
    """
    if not idle:
        return []
    patterns = ", ".join(override.pattern for override in idle)
    if strict:
        raise Refused(
            f"{len(idle)} patterns match no linear layer, nothing was written",
            where=patterns,
            expected="patterns (*, ?, […]) of the checkpoint's own names, with .weight or without",
            do="dconv inspect shows the names; without --strict this is a notice",
        )
    return [f"{'patterns of the ready config' if preset else 'patterns'} that match no linear layer: {patterns}"]


def _refitted(
    choices: Mapping[str, Choice], shapes: Mapping[str, tuple[int, ...]], preset: bool, found: _Notices
) -> dict[str, Choice]:
    """Choices whose group does not divide the columns, with the largest smaller one that does.

    Of the experts of a layer, which loaders hold in one, all or none.

    Raises:
        Refused: the table is no preset.
    """
    columns = {name: shapes[name][1] for name, choice in choices.items() if _grouped(choice)}
    odd = [name for name, count in columns.items() if count % choices[name].group]
    if odd and not preset:
        first = choices[odd[0]]
        divide = [str(group) for group in _smaller(first, columns[odd[0]])]
        raise Refused(
            f"{len(odd)} weights have no whole groups, nothing was written",
            where=some(odd),
            expected=f"columns that are a multiple of {first.group}",
            found=f"{columns[odd[0]]} columns",
            do=f"group_size {' or '.join(divide)} divides them" if divide else 'leave them out with "skip": true',
        )
    together: dict[tuple[str, Choice], list[str]] = {}
    for name in columns:
        together.setdefault((loaded_as(name.removesuffix(".weight")), choices[name]), []).append(name)
    wrong = set(odd)
    made: dict[str, Choice] = {}
    for (_, choice), names in together.items():
        if wrong.isdisjoint(names):
            continue
        common = gcd(*(columns[name] for name in names))
        group = max(_smaller(choice, common), default=0)
        words = (
            f"columns are no whole groups of {choice.group}, {f'of {group} instead' if group else 'left as they are'}"
        )
        for name in names:
            made[name] = replace(choice, group=group) if group else Choice(PLAIN, why=ODD)
            found.say(words, name)
    return made


def _grouped(choice: Choice) -> bool:
    return choice.group > 0 and not KINDS[choice.wq].blocks


def _smaller(choice: Choice, columns: int) -> list[int]:
    return [group for group in KINDS[choice.wq].groups if 0 < group < choice.group and columns % group == 0]
