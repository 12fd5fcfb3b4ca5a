"""What a config claims of FP8 against what is stored: every contradiction named, with what it leads to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dconv.coded.listing import Listing
from dconv.coded.places import loaded_as
from dconv.errors import group_names
from dconv.report.blocks import Blocks

#: Pairs of an entry and a module that are tried against each other; a hostile list would take forever.
_PAIRS: Final = 30_000_000
_CODES: Final = "their codes mean nothing without scales"


@dataclass(frozen=True)
class Fault:
    """A contradiction.

    Attributes:
        kind: one word for programs: ``excluded``, ``not_excluded``, ``absent``, ``list``, ``experts``, ``block``,
            ``unsaid``, ``nothing``, ``unscaled``, ``idle``, ``values``.
        what: what is wrong, in a sentence.
        names: modules, tensors or entries concerned.
        leads_to: what happens when such a checkpoint is loaded.
        do: what to do about it.
    """

    kind: str
    what: str
    names: tuple[str, ...]
    leads_to: str = ""
    do: str = ""

    @property
    def where(self) -> str:
        """The names, folded."""
        return group_names(self.names)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        said = {"kind": self.kind, "what": self.what, "count": len(self.names), "where": self.where.split("\n")}
        return said | {"leads_to": self.leads_to, "do": self.do}


@dataclass(frozen=True)
class Facts:
    """What faults are found from.

    Attributes:
        quantised: stored modules with FP8 weights; ``linear``, those that a reader would expect in FP8 and that are
            not, the output layer among them (``heads``, also one that is tied and not stored).
        unscaled: weights in FP8 without scales; ``idle``, scales without a weight in FP8.
        bad: scales' tensors with values that are infinite, no number or below 0.
        names: all tensors.
        right: the right list, as it would be written.
        said: whether config.json says that the weights are in FP8.
    """

    quantised: Sequence[str]
    linear: Sequence[str]
    heads: Collection[str]
    unscaled: Sequence[str]
    idle: Sequence[str]
    bad: Sequence[str]
    names: Collection[str]
    listing: Listing
    blocks: Blocks
    right: Sequence[str]
    said: bool


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def faults_of(facts: Facts) -> tuple[Fault, ...]:
    """All contradictions, those that ruin values first."""
    return (*values(facts.unscaled, facts.idle, facts.bad), *_blocks(facts), *_claims(facts))


def values(unscaled: Sequence[str], idle: Sequence[str], bad: Sequence[str]) -> Iterator[Fault]:
    """What ruins values, whatever the scheme (see `Facts`)."""
    if unscaled:
        yield Fault("unscaled", f"{_many(len(unscaled), 'FP8 weight')} without scales", tuple(unscaled), _CODES)
    if idle:
        what = f"{_many(len(idle), 'scale tensor')} without an FP8 weight"
        yield Fault("idle", what, tuple(idle), "a reader takes the weights for plain numbers, or stops")
    if bad:
        what = f"{_many(len(bad), 'scale tensor')} with values that are infinite, no number or below 0"
        yield Fault("values", what, tuple(bad), "the weights become NaN or change their sign")


def _blocks(facts: Facts) -> Iterator[Fault]:
    blocks = facts.blocks
    if blocks.odd:
        yield Fault("block", blocks.odd, ("quantization_config.weight_block_size",), "no reader takes it")
    elif blocks.disagree:
        what = (
            f"{_many(len(blocks.disagree), 'weight')} with scales of another shape than blocks of {blocks.words} make"
        )
        do = ""
        if blocks.admitted:
            do = f"the shapes of all scales fit blocks of {blocks.admitted_words} (rows x columns)"
        leads_to = f"the size is {blocks.said_by}" if "default" in blocks.said_by else ""
        yield Fault("block", what, blocks.disagree, leads_to, do or blocks.admitted_words)


def _claims(facts: Facts) -> Iterator[Fault]:
    if not facts.said:
        if facts.quantised or facts.unscaled:
            names = tuple(facts.quantised or facts.unscaled)
            yield Fault(
                "unsaid",
                f"{_many(len(names), 'module')} in FP8, of which config.json says nothing",
                names,
                "codes are taken for numbers",
                'quantization_config: {"quant_method": "fp8", …}',
            )
        return
    if not facts.quantised and not facts.unscaled:
        yield Fault("nothing", "config.json says FP8, and no weight is", (), do="take quantization_config out")
        return
    listing = facts.listing
    if listing.odd:
        yield Fault("list", f"{listing.key} is not {listing.odd}", (listing.key,), do=_write(facts))
        return
    loaded = {loaded_as(module) for module in (*facts.quantised, *facts.linear)}
    if len(listing.entries or ()) * len(loaded) > _PAIRS:
        yield Fault("list", f"{listing.key} has more entries than can be tried", (listing.key,), do=_write(facts))
        return
    yield from _listed(facts, loaded)


def _listed(facts: Facts, loaded: Collection[str]) -> Iterator[Fault]:
    listing = facts.listing
    unread = tuple(entry.text[:200] for entry in listing.entries or () if not entry.readable)
    if unread:
        what = f"{listing.key} has entries that are no regular expression, or none that can be tried"
        yield Fault("list", what, unread, "transformers takes entries for such, and stops", _write(facts))
    yield from _excluded(facts)
    partly = {loaded_as(m) for m in facts.quantised} & {loaded_as(m) for m in facts.linear}
    if partly:
        what = f"experts of {_many(len(partly), 'layer')} are in FP8 in part"
        yield Fault("experts", what, tuple(sorted(partly)), "transformers loads a layer's experts as one: no list fits")
    yield from _not_excluded(facts, partly)
    absent = _absent(facts, loaded)
    if absent:
        what = f"{listing.key} names what is not in this model"
        yield Fault("absent", what, absent, "the list is another model's, or misspelt", _write(facts))


def _excluded(facts: Facts) -> Iterator[Fault]:
    """Modules in FP8 that the list leaves out: by transformers' reading, and by one that looks inside of names."""
    listing = facts.listing
    strict: dict[str, str] = {}
    inside: dict[str, set[str]] = {}
    for module in facts.quantised:
        if entry := listing.by(module):
            strict[module] = entry.text
        elif found := listing.inside(module) | listing.inside(loaded_as(module)):
            inside[module] = found
    if strict:
        entries = ", ".join(group_names(dict.fromkeys(strict.values())).split("\n"))
        yield Fault(
            "excluded",
            f"{listing.key} leaves out {_many(len(strict), 'module')} in FP8 with scales, by {entries}",
            tuple(strict),
            "plain layers are made for them: an AssertionError at load, or codes taken for numbers",
            _write(facts),
        )
    if inside:
        entries = ", ".join(group_names(sorted({text for found in inside.values() for text in found})).split("\n"))
        yield Fault(
            "excluded",
            f"{listing.key} names {entries}, in which {_many(len(inside), 'module')} in FP8 with scales lie",
            tuple(inside),
            "transformers 5 takes an entry for the beginning or the end of a whole name and loads them; a reader that "
            "looks for it inside of names makes plain layers: an AssertionError at load",
            _write(facts),
        )


def _not_excluded(facts: Facts, partly: Collection[str]) -> Iterator[Fault]:
    listing = facts.listing
    left = [module for module in facts.linear if loaded_as(module) not in partly and not listing.by(module)]
    if listing.entries is None:
        left = [module for module in left if module not in facts.heads]
    if not left:
        return
    key = listing.key or "modules_to_not_convert"
    near = {text for module in left for text in listing.inside(module)}
    why = f"; {', '.join(sorted(near)[:4])} names what they are in, which does not count" if near else ""
    yield Fault(
        "not_excluded",
        f"{key} does not leave out {_many(len(left), 'linear module')} that are not in FP8{why}",
        tuple(left),
        "FP8 layers are made for them, and their scales are missing",
        _write(facts),
    )


def _absent(facts: Facts, loaded: Collection[str]) -> tuple[str, ...]:
    listing = facts.listing
    left = {entry.text: entry for entry in listing.entries or () if entry.readable}
    for head in facts.heads:
        left = {text: entry for text, entry in left.items() if not entry.excludes(head)}
    for name in facts.names:
        if not left:
            return ()
        for text in listing.inside(name):
            left.pop(text, None)
    if len(left) * len(facts.names) <= _PAIRS:
        named = {form for name in facts.names for form in (loaded_as(name), name.removesuffix(".weight"))}
    else:
        named = set(loaded)
    return tuple(text for text, entry in left.items() if not any(entry.excludes(name) for name in named))


def _write(facts: Facts) -> str:
    key = facts.listing.key or "modules_to_not_convert"
    return f'"{key}": [{", ".join(_quoted(facts.right))}]' if facts.right else f"take {key} out"


def _quoted(right: Sequence[str], limit: int = 12) -> list[str]:
    shown = [f'"{text}"' for text in right[:limit]]
    return shown if len(right) <= limit else [*shown, f"… {len(right) - limit:,} more, see --json"]
