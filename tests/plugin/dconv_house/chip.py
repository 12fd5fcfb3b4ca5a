"""The house's chip: its compiler ``housec`` takes a HuggingFace directory in bf16 and writes one image."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dconv.describe import Described
from dconv.errors import Refused, ToolMissing, VerifyFailed
from dconv.hw import settings
from dconv.hw.driver import write_script
from dconv.hw.mup import folded
from dconv.hw.target import OUT, Ask, Handing, Step, Terms, Tool
from dconv.request import Request

_COMPILER = "housec"
_IMAGE = "model.house"


@dataclass(frozen=True)
class House:
    """The adapter: what its compiler takes, how it is found and run, and what it must have written."""

    title: str = "House chip"
    install: str = "housec comes with the board: put it on PATH"

    @property
    def platforms(self) -> Mapping[str, str]:
        return {"H1": "bf16, up to 64 layers"}

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        found = settings.settled(ask.settings, {"effort": settings.among(1, 0, 1, 2)}, ask.where)
        layers = int(model.facts["layers"])
        if layers > 64:
            raise Refused("H1 takes 64 layers, nothing was written", found=f"{layers} layers")
        step, mup, notes = folded(model, replace(request, dtype="bf16"))
        return Handing(Terms(chip, found, {"layers": layers, "mup": mup}), (Step("hf", step),), model, notes)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        here = shutil.which(_COMPILER, path=ask.environment.get("PATH"))
        if here is None:
            raise ToolMissing(
                "housec is not here, nothing was written", do=f"{self.install}\n--bundle writes what it takes"
            )
        return Tool(_COMPILER, {}, {"path": here})

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        effort = handing.terms.settings["effort"]
        write_script(work, f"{_COMPILER} -O{effort} hf {OUT}/{_IMAGE}", self.install)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        image = out / _IMAGE
        if not image.is_file() or not image.read_bytes().startswith(b"HOUSE"):
            raise VerifyFailed("housec ended well and wrote no image", where=_IMAGE)
        if f"compiled {terms.facts['layers']} layers" not in log:
            raise VerifyFailed("housec does not say that it compiled all layers", expected=f"{terms.facts['layers']}")
        return {"bytes": image.stat().st_size}


ADAPTER = House()
