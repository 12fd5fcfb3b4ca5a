"""MediaTek in public: a decoder as a .tflite by litert-torch, and code for the NPU by LiteRT where the SDK is there.

Source for chips and types: LiteRT ``litert/python/aot/vendors/mediatek/target.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Final

from dconv.arch.layouts import size
from dconv.describe import Described
from dconv.errors import Refused, ToolMissing, VerifyFailed
from dconv.export.prompt import kind_of
from dconv.hw import settings
from dconv.hw.driver import Driver
from dconv.hw.mtk_contract import MAGIC, PLATFORMS
from dconv.hw.mup import folded
from dconv.hw.target import Ask, Handing, Step, Takes, Terms, Tool
from dconv.request import Request
from dconv.sharding.parsed import is_dict

_TAKES: Final = Takes(("decoder",))
_ROLE: Final = "hf"
_FILE: Final = "model.tflite"
_MORE: Final = (
    "MT6853", "MT6877", "MT6878", "MT6879", "MT6886", "MT6893", "MT6895", "MT6983", "MT6985", "MT6993", "MT8171",
    "MT8188", "MT8189",
)  # fmt: skip
#: Chips whose code is the ninth Neuron's; the others have the eighth's.
_NINTH: Final = ("MT6993",)


@dataclass(frozen=True)
class Litert:
    """The adapter's part for the public toolchain."""

    title: str = "MediaTek by LiteRT"
    install: str = (
        "bash scripts/toolchains.sh litert; code for an NPU needs NeuroPilot's SDK, too: pip install\n"
        "ai-edge-litert-sdk-mediatek in that environment, where it can download its libraries"
    )

    @property
    def platforms(self) -> Mapping[str, str]:
        """mtk_cloud's chips, and more that LiteRT alone knows."""
        return {**PLATFORMS, **dict.fromkeys(_MORE, "LiteRT alone")}

    @property
    def _driver(self) -> Driver:
        return Driver("litert", self.install)

    @property
    def takes(self) -> tuple[Takes, ...]:
        """Decoders, as HuggingFace has them."""
        return (_TAKES,)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """Decoders alone; ``--quant`` f32 or int8 says the same as the setting ``weights``."""
        kind = kind_of(model.family)
        if kind not in _TAKES.kinds:
            raise Refused("litert-torch is given decoders of text, nothing was written",
                          found=f"{model.family.name}, {kind}", expected="a decoder")  # fmt: skip
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        known = {
            "sequence": settings.whole(128, 1, 1 << 16),
            "past": settings.whole(0, 0, 1 << 17),
            "weights": settings.among("f32", "f32", "int8"),
            "aot": settings.flag(True),
            "cpu_ops": settings.flag(False),
        }
        settings.require_of_use(ask, self.title, "--calibration", "--task")
        found = settings.settled(settings.asked(ask, "weights", known["weights"]), known, ask.where)
        step, mup, notes = folded(model, replace(request, dtype=request.dtype or "f32"))
        if not found["aot"]:
            notes = (
                *notes,
                f"nothing in it is code for {chip}: any LiteRT runs it on a CPU, or compiles it on the device",
            )
        facts = {"layers": size(model.facts, "layers"), "mup": mup}
        parameters = sum(prod(spec.shape) for spec in model.logical.specs.values())
        return Handing(Terms(chip, found, facts), (Step(_ROLE, step),), model, notes, memory=16 * parameters)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """litert-torch's interpreter, with NeuroPilot's SDK for the chip where code for its NPU is asked for."""
        tool = self._driver.find(ask)
        if terms is None or not terms.settings["aot"]:
            return tool
        aot = tool.details.get("aot")
        sdk = aot.get("v9" if terms.platform in _NINTH else "v8") if is_dict(aot) else None
        if not is_dict(sdk) or not sdk.get("complete"):
            raise ToolMissing(
                f"nothing here compiles for {terms.platform}, nothing was written",
                found=f"{tool.words}, without {sdk.get('lacks') if is_dict(sdk) else 'the SDK'}",
                do=f"{self.install}\nor a .tflite without code for an NPU: --quantization-config '{{\"aot\": false}}'",
            )
        return tool

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write the driver and its job, which reads the HuggingFace directory and nothing else."""
        self._driver.lay_out(handing, work, {_ROLE: _ROLE}, handing.terms.settings)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """The files by name, their magic, the NPU's operators where these were asked for, and compared logits."""
        said = self._driver.result(out)
        aot = bool(terms.settings["aot"])
        wanted = [_FILE, *([f"model_{terms.platform}.tflite"] if aot else [])]
        if said["files"] != wanted:
            raise VerifyFailed("these are not the files that were asked for", expected=", ".join(wanted),
                               found=", ".join(said["files"]))  # fmt: skip
        for name in wanted:
            with (out / name).open("rb") as file:
                head = file.read(8)
            if head[4:] != MAGIC:
                raise VerifyFailed("this is no .tflite", where=name, expected=f"{MAGIC.decode()} at byte 4",
                                   found=repr(head[4:]))  # fmt: skip
        evidence: Mapping[str, object] = said["evidence"]
        compiled = evidence.get("aot")
        if aot and not (is_dict(compiled) and compiled.get("npu_ops")):
            raise VerifyFailed("nothing in it was compiled for the NPU", where=wanted[-1])
        if not evidence.get("agreement"):
            raise VerifyFailed("its logits were not compared with the model's", where=_FILE)
        return {"bytes": (out / _FILE).stat().st_size, "compiled_for": terms.platform if aot else "no NPU", **evidence}
