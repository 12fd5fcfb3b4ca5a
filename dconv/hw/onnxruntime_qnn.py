"""onnxruntime-qnn: an ONNX graph of given lengths becomes a context binary for the HTP of a chip."""

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

_DTYPES: Final = ("fp16", "w8a16", "w8a8")
#: Chips by how their HTP computes: those of the second line have no half precision (compiled for by QNN 2.51).
_WITH_HALF: Final = (
    "SM8850", "SM8845", "SM8750", "SM8650", "SM8550", "SM8450", "SM8350", "SA8255", "SA8295", "SA8540", "SA8620P",
    "SA8797", "SXR2230P", "SXR2330P", "QCS8300", "QCS8550", "QCS9100", "SC8380XP", "SC8480XP",
)  # fmt: skip
_WITHOUT_HALF: Final = (
    "SAR2230P", "SW6100", "SC8280X", "QCS6490", "SM7550", "SM7635", "SM7675", "SM8635", "SM8735",
)  # fmt: skip
_FILES: Final = ["model_ctx.onnx", "model_ctx_qnn.bin"]


@dataclass(frozen=True)
class OnnxruntimeQnn:
    """The adapter's part for any one graph."""

    title: str = "onnxruntime-qnn"
    install: str = "bash scripts/toolchains.sh qnn"

    @property
    def platforms(self) -> Mapping[str, str]:
        """Chips by QNN's names, and the precisions that their HTP computes in."""
        said: dict[str, str] = dict.fromkeys(_WITH_HALF, ", ".join(_DTYPES))
        return {**said, **dict.fromkeys(_WITHOUT_HALF, ", ".join(_DTYPES[1:]))}

    @property
    def _driver(self) -> Driver:
        return Driver("qnn", self.install)

    @property
    def takes(self) -> tuple[Takes, ...]:
        """See `dconv.hw.static_graph.TAKES`."""
        return (static_graph.TAKES,)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """One graph of given lengths; ``--quant`` says the same as the setting ``dtype``."""
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        known = {**static_graph.LENGTHS, "dtype": settings.among("fp16", *_DTYPES)}
        found = settings.settled(settings.asked(ask, "dtype", known["dtype"]), known, ask.where)
        dtype = found["dtype"]
        settings.require_of_use(ask, self.title, "--task", *(["--calibration"] if dtype == "fp16" else []))
        if dtype == "fp16" and chip in _WITHOUT_HALF:
            raise Refused(f"the HTP of {chip} has no half precision, nothing was written", where=f"{chip} and fp16",
                          expected=", ".join(_DTYPES[1:]), do="--quant w8a16")  # fmt: skip
        quantised = dtype != "fp16"
        step, facts, notes = static_graph.planned(model, request, found, quantised, self.title)
        if quantised and ask.calibration is None:
            notes = (*notes, DEFAULT_WARNING)
        weights = sum(prod(spec.shape) for spec in model.logical.specs.values())
        return Handing(Terms(chip, found, facts), (step,), model, notes, memory=12 * weights)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The interpreter with onnxruntime-qnn, which compiles for every chip."""
        return self._driver.find(ask)

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write the driver, its job, and samples where the compiler chooses codes."""
        static_graph.lay_out(self._driver, handing, work, ask)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """The wrapper and the binary, which has to name the chip itself."""
        said = self._driver.result(out)
        if sorted(said["files"]) != _FILES:
            raise VerifyFailed("QNN writes a wrapper and a binary", expected=", ".join(_FILES),
                               found=", ".join(said["files"]))  # fmt: skip
        if f"soc_type={terms.platform};".encode() not in (out / _FILES[1]).read_bytes():
            raise VerifyFailed("the binary does not say that it is for this chip", where=_FILES[1],
                               expected=terms.platform)  # fmt: skip
        return dict(said["evidence"])
