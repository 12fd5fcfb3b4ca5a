"""A vendor with more than one toolkit: ``toolkit`` of the settings, or the model, says which one compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dconv.describe import Described
from dconv.errors import ToolMissing
from dconv.hw.settings import among, settled
from dconv.hw.target import Adapter, Adopting, Ask, Choosing, Handing, Takes, Terms, Tool
from dconv.request import Request

_KEY: Final = "toolkit"


@dataclass(frozen=True)
class Toolkits:
    """An adapter that asks one of several.

    Attributes:
        toolkits: by the value of ``toolkit``.
        usual: which of them compiles a model where none is named.
    """

    title: str
    toolkits: Mapping[str, Adapter]
    usual: Callable[[Described], str]

    @property
    def install(self) -> str:
        """How to get each of the toolkits, one behind the other."""
        return "\n".join(f"{one.title}: {one.install}" for one in self.toolkits.values())

    @property
    def platforms(self) -> Mapping[str, str]:
        """All chips, each with the toolkits that take it."""
        found: dict[str, list[str]] = {}
        for name, one in self.toolkits.items():
            for chip, words in one.platforms.items():
                found.setdefault(chip, []).append(f"{name} {words}")
        return {chip: "; ".join(words) for chip, words in found.items()}

    @property
    def takes(self) -> tuple[Takes, ...]:
        """What any of the toolkits takes."""
        return tuple(takes for one in self.toolkits.values() if isinstance(one, Choosing) for takes in one.takes)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """By the toolkit that the settings name, else the model's usual one; the terms say which it was."""
        named, inner = self._asked(ask)
        name = named or self.usual(model)
        made = self.toolkits[name].plan(model, request, inner)
        return replace(made, terms=_with(name, made.terms))

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The toolkit that is meant, or the first that is here."""
        if terms is not None:
            one, inner = self._parted(terms)
            return one.find(ask, inner)
        lacking: list[ToolMissing] = []
        for one in self.toolkits.values():
            try:
                return one.find(ask)
            except ToolMissing as missing:
                lacking.append(missing)
        raise ToolMissing(f"none of the toolkits of {self.title} is here", where=lacking[0].where,
                          found="\n".join(one.found or one.what for one in lacking), do=self.install)  # fmt: skip

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """By the toolkit that the terms name."""
        one, terms = self._parted(handing.terms)
        one.lay_out(replace(handing, terms=terms), work, ask)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """By the toolkit that the terms name."""
        one, terms = self._parted(terms)
        return one.judge(terms, out, log)

    def adopt(self, folder: Path, ask: Ask) -> Terms | None:
        """By the first toolkit that takes the folder for its own; where the settings name one, by that."""
        named, inner = self._asked(ask)
        for name, one in self.toolkits.items():
            if named in (None, name) and isinstance(one, Adopting) and (terms := one.adopt(folder, inner)) is not None:
                return _with(name, terms)
        return None

    def _asked(self, ask: Ask) -> tuple[str | None, Ask]:
        given = {key: value for key, value in ask.settings.items() if key == _KEY}
        said = settled(given, {_KEY: among(None, *self.toolkits)}, ask.where)[_KEY]
        inner = {key: value for key, value in ask.settings.items() if key != _KEY}
        return None if said is None else str(said), replace(ask, settings=inner)

    def _parted(self, terms: Terms) -> tuple[Adapter, Terms]:
        settings = {key: value for key, value in terms.settings.items() if key != _KEY}
        return self.toolkits[str(terms.settings[_KEY])], replace(terms, settings=settings)


def _with(name: str, terms: Terms) -> Terms:
    return replace(terms, settings={_KEY: name, **terms.settings})
