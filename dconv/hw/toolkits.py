"""Targets that a vendor has two toolkits for: ``toolkit`` of the settings says which, or what the model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dconv.describe import Described
from dconv.errors import ToolMissing
from dconv.hw.settings import among, settled
from dconv.hw.target import Adapter, Ask, Handing, Terms, Tool
from dconv.request import Request

KEY: Final = "toolkit"


@dataclass(frozen=True)
class Toolkits:
    """The adapter: it asks one of several.

    Attributes:
        known: by name; the first one has all chips.
        usual: the name of the one for a model, where none is named.
    """

    title: str
    known: Mapping[str, Adapter]
    usual: Callable[[Described], str]

    @property
    def install(self) -> str:
        return "\n".join(f"{one.title}: {one.install}" for one in self.known.values())

    @property
    def platforms(self) -> Mapping[str, str]:
        return next(iter(self.known.values())).platforms

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        name = self._named(ask) or self.usual(model)
        settings = {key: value for key, value in ask.settings.items() if key != KEY}
        made = self.known[name].plan(model, request, replace(ask, settings=settings))
        return replace(made, terms=replace(made.terms, settings={KEY: name, **made.terms.settings}))

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The toolkit that is meant, or the first that is here."""
        if terms is not None:
            name, terms = _parted(terms)
            return self.known[name].find(ask, terms)
        lacking: list[ToolMissing] = []
        for one in self.known.values():
            try:
                return one.find(ask)
            except ToolMissing as missing:
                lacking.append(missing)
        raise ToolMissing(f"neither of the toolkits of {self.title} is here", where=lacking[0].where,
                          found="\n".join(one.found for one in lacking), do=self.install)  # fmt: skip

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        name, terms = _parted(handing.terms)
        self.known[name].lay_out(replace(handing, terms=terms), work, ask)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        name, terms = _parted(terms)
        return self.known[name].judge(terms, out, log)

    def _named(self, ask: Ask) -> str | None:
        given = {key: value for key, value in ask.settings.items() if key == KEY}
        found = settled(given, {KEY: among(None, *self.known)}, ask.where)[KEY]
        return None if found is None else str(found)


def _parted(terms: Terms) -> tuple[str, Terms]:
    settings = {key: value for key, value in terms.settings.items() if key != KEY}
    return str(terms.settings[KEY]), replace(terms, settings=settings)
