"""``modules_to_not_convert``: which modules an entry takes out of FP8, and which list is right for what is stored.

transformers takes an entry for the end of a module's whole name, or, as a regular expression, for its beginning up to
a dot. Source: ``should_convert_module`` in transformers' ``quantizers/quantizers_utils.py``. Other readers, and
transformers 4, look for an entry inside a name, so that ``self_attn`` takes ``self_attn.q_proj`` out there and not
here; a list is right where both read the same from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from dconv.coded.patterns import compiled, is_tame
from dconv.coded.places import loaded_as
from dconv.sharding.parsed import is_texts

#: MiniMax's name for it comes second; transformers reads both.
KEYS: Final = ("modules_to_not_convert", "ignored_layers")
#: Longer names are no module's.
_LONGEST: Final = 1000
_MOST: Final = 5000
#: Parts of a name between dots.
_PARTS: Final = 24
#: Repeats in one expression, fewer than elsewhere since these are tried up to each dot.
_REPEATS: Final = 2


@dataclass(frozen=True)
class Entry:
    """One entry of the list."""

    text: str

    @cached_property
    def _loaded(self) -> str:
        """The entry under transformers' own names, as it renames it before use."""
        return f"{self.text}.".replace(".block_sparse_moe.", ".mlp.").removesuffix(".")

    @cached_property
    def _begins(self) -> re.Pattern[str] | None:
        if not is_tame(self.text, repeats=_REPEATS, longest=_LONGEST):
            return None
        try:
            return compiled(f"(?:{self._loaded})(?:(?<=[.])|(?=[.]|$))")
        except ValueError:
            return None

    @property
    def readable(self) -> bool:
        """False for what is no regular expression, or one that is not tried."""
        return self._begins is not None

    def excludes(self, module: str) -> bool:
        """Whether transformers leaves this module (`dconv.coded.places.loaded_as`) out of FP8 for it."""
        if len(module) > _LONGEST or self._begins is None:
            return False
        return module.endswith(self._loaded) or self._begins.match(module) is not None

    def is_inside(self, module: str) -> bool:
        """Whether it is some whole parts of the name, which is enough for other readers."""
        return f".{self.text}." in f".{module}."


@dataclass(frozen=True)
class Listing:
    """The list as config.json has it.

    Attributes:
        key: under which key; "" where there is none.
        entries: None where there is none, so that the output layer and tied weights are left out by default.
        odd: what is wrong with the list itself.
    """

    key: str = ""
    entries: tuple[Entry, ...] | None = None
    odd: str = ""
    _seen: dict[str, Entry | None] = field(default_factory=dict[str, Entry | None], compare=False, repr=False)

    def by(self, module: str) -> Entry | None:
        """The entry by which transformers leaves a module out."""
        loaded = loaded_as(module)
        if loaded not in self._seen:
            self._seen[loaded] = next((entry for entry in self.entries or () if entry.excludes(loaded)), None)
        return self._seen[loaded]

    def inside(self, name: str) -> set[str]:
        """The entries that are some whole parts of a name."""
        texts, parts = self._texts, name.split(".")[:_PARTS]
        ends = range(1, len(parts) + 1)
        return {text for end in ends for begin in range(end) if (text := ".".join(parts[begin:end])) in texts}

    @cached_property
    def _texts(self) -> frozenset[str]:
        return frozenset(entry.text for entry in self.entries or ())


def listing_of(quantization: Mapping[str, object]) -> Listing:
    """The list in a config's ``quantization_config``."""
    key = next((key for key in KEYS if quantization.get(key) is not None), "")
    if not key:
        return Listing()
    said = quantization[key]
    if not is_texts(said) or not all(said):
        return Listing(key, None, f"a list of names, found {said!r:.60}")
    if len(said) > _MOST:
        return Listing(key, None, f"at most {_MOST:,} names, found {len(said):,}")
    return Listing(key, tuple(Entry(text) for text in dict.fromkeys(said)))


def right_list(plain: Mapping[str, Sequence[str]], quantised: Iterable[str]) -> list[str]:
    """Entries that leave out all of ``plain`` and none of ``quantised``, however they are read.

    Args:
        plain: stored modules without FP8, by class.
        quantised: stored modules in FP8.
    """
    quantised = list(quantised)
    others = {form for module in quantised for form in (module, loaded_as(module))}
    right = [Entry(root) for root in _apart(plain, quantised)]
    for kind, modules in plain.items():
        loaded = list(dict.fromkeys(loaded_as(module) for module in modules))
        out = {loaded_as(module) for module in modules if any(_leaves_out(entry, module) for entry in right)}
        left = [module for module in loaded if module not in others and module not in out]
        # experts beside others in codes: to readers that have each by itself
        right += [Entry(module) for module in modules if loaded_as(module) in others]
        if not left:
            continue
        kind = re.sub(r"\.\*.*", "", kind)
        short = (Entry(text) for text in (kind.rsplit(".", 1)[-1], kind))
        fits = (entry for entry in short if entry.readable and _tells_apart(entry, loaded, others))
        found = next(fits, None)
        right += [found] if found else [Entry(module) for module in left]
    return [entry.text for entry in right]


def _apart(plain: Mapping[str, Sequence[str]], quantised: Iterable[str]) -> list[str]:
    """Blocks of a model of which nothing is in FP8, by the first part of their modules' names: a vision tower."""
    inside = {module.partition(".")[0] for module in quantised}
    found = dict.fromkeys(module.partition(".")[0] for modules in plain.values() for module in modules if "." in module)
    return [root for root in found if inside and root not in inside and Entry(root).readable]


def _leaves_out(entry: Entry, module: str) -> bool:
    """Whether all readers leave a stored module out: ``gate`` does not do that to ``shared_expert_gate``."""
    loaded = loaded_as(module)
    return entry.excludes(loaded) and (entry.is_inside(module) or entry.is_inside(loaded))


def _tells_apart(entry: Entry, plain: Iterable[str], others: Iterable[str]) -> bool:
    if not entry.text or not all(entry.excludes(module) for module in plain):
        return False
    return not any(entry.excludes(module) or entry.is_inside(module) for module in others)
