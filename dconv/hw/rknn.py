"""Rockchip's RKNN: any model as an ONNX graph of given lengths, compiled by rknn-toolkit2 and run in its simulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from dconv.describe import Described
from dconv.errors import Refused, VerifyFailed
from dconv.hw import settings, static_graph
from dconv.hw.driver import Driver
from dconv.hw.target import Ask, Handing, Takes, Terms, Tool
from dconv.quant.data import DEFAULT_WARNING
from dconv.request import Request

#: Chip -> what rknn-toolkit2 2.5.0 compiles for it.
_CHIPS: Final[Mapping[str, tuple[str, ...]]] = {
    "RK3588": ("fp16", "w8a8", "w16a16i_dfp"),
    "RK3576": ("fp16", "w8a8", "w4a16", "w16a16i_dfp"),
    "RK3562": ("fp16", "w8a8", "w8a16", "w4a16", "w16a16i_dfp"),
}
_DTYPES: Final = ("fp16", "w8a8", "w8a16", "w4a16", "w16a16i_dfp")
_FILE: Final = "model.rknn"


@dataclass(frozen=True)
class Rknn:
    """The adapter's part for graphs."""

    title: str = "Rockchip RKNN"
    install: str = "bash scripts/toolchains.sh rknn"

    @property
    def platforms(self) -> Mapping[str, str]:
        """Chips, and what rknn-toolkit2 compiles for each."""
        return {name: ", ".join(dtypes) for name, dtypes in _CHIPS.items()}

    @property
    def _driver(self) -> Driver:
        return Driver("rknn", self.install)

    @property
    def takes(self) -> tuple[Takes, ...]:
        """See `dconv.hw.static_graph.TAKES`."""
        return (static_graph.TAKES,)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """One graph of given lengths; ``--quant`` says the same as the setting ``dtype``."""
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        known = {**static_graph.LENGTHS, "dtype": settings.among("fp16", *_DTYPES),
                 "algorithm": settings.among(None, "normal", "mmse", "kl_divergence"),
                 "method": settings.among(None, "layer", "channel", "group32", "group64", "group128")}  # fmt: skip
        found = settings.settled(settings.asked(ask, "dtype", known["dtype"]), known, ask.where)
        dtype = found["dtype"]
        settings.require_of_use(ask, self.title, "--task", *(["--calibration"] if dtype == "fp16" else []))
        if dtype not in _CHIPS[chip]:
            raise Refused(f"{chip} does not compute in {dtype}, nothing was written", where=f"{chip} and {dtype}",
                          expected=", ".join(_CHIPS[chip]))  # fmt: skip
        quantised = dtype != "fp16"
        step, facts, notes = static_graph.planned(model, request, found, quantised, self.title)
        if quantised and ask.calibration is None:
            notes = (*notes, DEFAULT_WARNING)
        weights = sum(prod(spec.shape) for spec in model.logical.specs.values())
        return Handing(Terms(chip, found, facts), (step,), model, notes, memory=16 * weights)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The interpreter with rknn-toolkit2."""
        return self._driver.find(ask)

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write the driver, its job, and samples where the compiler chooses codes."""
        static_graph.lay_out(self._driver, handing, work, ask)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """One file with RKNN's magic at its beginning; the rest of it the driver has looked at."""
        said = self._driver.result(out)
        if said["files"] != [_FILE]:
            raise VerifyFailed("RKNN writes one file", expected=_FILE, found=", ".join(said["files"]))
        with (out / _FILE).open("rb") as file:
            magic = file.read(4)
        if magic != b"RKNN":
            raise VerifyFailed("this is no .rknn", where=_FILE, expected="RKNN at its beginning", found=repr(magic))
        evidence: Mapping[str, object] = said["evidence"]
        return {"bytes": (out / _FILE).stat().st_size, **evidence}
