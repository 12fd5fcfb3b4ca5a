"""Rockchip: language models by RKLLM, everything else (and what is asked for as a graph) by RKNN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from dconv.describe import Described
from dconv.errors import ToolMissing
from dconv.export.prompt import kind_of
from dconv.hw.rkllm import Rkllm
from dconv.hw.rknn import Rknn
from dconv.hw.settings import among, settled
from dconv.hw.target import Adapter, Ask, Handing, Terms, Tool
from dconv.request import Request

#: ``toolkit`` of the settings.
_TOOLKITS: Final[Mapping[str, Adapter]] = {"rkllm": Rkllm(), "rknn": Rknn()}
_KEY: Final = "toolkit"


@dataclass(frozen=True)
class Rockchip:
    """The adapter: it asks one of the two."""

    title: str = "Rockchip"

    @property
    def install(self) -> str:
        return "\n".join(f"{one.title}: {one.install}" for one in _TOOLKITS.values())

    @property
    def platforms(self) -> Mapping[str, str]:
        said = {name: one.platforms for name, one in _TOOLKITS.items()}
        return {chip: "; ".join(f"{name} {said[name][chip]}" for name in said) for chip in said["rkllm"]}

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        name = _named(ask) or ("rkllm" if kind_of(model.family) == "decoder" else "rknn")
        made = _TOOLKITS[name].plan(model, request, _without(ask))
        return replace(made, terms=replace(made.terms, settings={_KEY: name, **made.terms.settings}))

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The toolkit that is meant, or the first that is here."""
        if terms is not None:
            return _TOOLKITS[_parted(terms)[0]].find(ask)
        lacking: list[ToolMissing] = []
        for one in _TOOLKITS.values():
            try:
                return one.find(ask)
            except ToolMissing as missing:
                lacking.append(missing)
        raise ToolMissing("neither of Rockchip's toolkits is here", where=lacking[0].where,
                          found="\n".join(one.found for one in lacking), do=self.install)  # fmt: skip

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        name, terms = _parted(handing.terms)
        _TOOLKITS[name].lay_out(replace(handing, terms=terms), work, ask)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        name, terms = _parted(terms)
        return _TOOLKITS[name].judge(terms, out, log)


def _named(ask: Ask) -> str | None:
    given = {key: value for key, value in ask.settings.items() if key == _KEY}
    found = settled(given, {_KEY: among(None, *_TOOLKITS)}, ask.where)[_KEY]
    return None if found is None else str(found)


def _without(ask: Ask) -> Ask:
    return replace(ask, settings={key: value for key, value in ask.settings.items() if key != _KEY})


def _parted(terms: Terms) -> tuple[str, Terms]:
    settings = {key: value for key, value in terms.settings.items() if key != _KEY}
    return str(terms.settings[_KEY]), replace(terms, settings=settings)


ADAPTER: Final = Rockchip()
