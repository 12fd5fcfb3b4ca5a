"""Rockchip's RKLLM: language models.

Sources: airockchip/rknn-llm ``examples/rkllm_api_demo/export/export_rkllm.py`` and its README for types and chips.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from dconv.arch.layouts import size
from dconv.describe import Described
from dconv.errors import Refused, UsageError, VerifyFailed
from dconv.export.prompt import kind_of
from dconv.hw import prompts, settings
from dconv.hw.driver import Driver
from dconv.hw.mup import folded
from dconv.hw.target import Ask, Handing, Step, Takes, Terms, Tool
from dconv.quant.data import DEFAULT_WARNING
from dconv.request import Request

#: Chip -> cores of its NPU, and the precisions that RKLLM has for it.
_RKLLM: Final[Mapping[str, tuple[int, tuple[str, ...]]]] = {
    "RK3588": (3, ("fp16", "w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512")),
    "RK3576": (2, ("fp16", "w8a8", "w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128")),
    "RK3562": (1, ("fp16", "w8a8", "w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128")),
}
#: All that any of them has.
_DTYPES: Final = tuple(dict.fromkeys(dtype for _, dtypes in _RKLLM.values() for dtype in dtypes))
#: What RKLLM's tool calls how it finds numbers.
_ALGORITHM: Final[Mapping[str, str]] = {"w8a8": "normal", "w4a16": "grq", "fp16": "normal"}
_TAKES: Final = Takes(("decoder",))
_ROLE: Final = "hf"
_FILE: Final = "model.rkllm"
_CALIBRATION: Final = "calibration.json"


@dataclass(frozen=True)
class Rkllm:
    """The adapter's part for language models."""

    title: str = "Rockchip RKLLM"
    install: str = (
        "RKLLM's wheel is in github.com/airockchip/rknn-llm, rkllm-toolkit/: install it in an environment of its own\n"
        "(torch 2.6, transformers as it pins them), and say --toolchain-python DIR/bin/python"
    )

    @property
    def platforms(self) -> Mapping[str, str]:
        """Chips, and the precisions that RKLLM has for each."""
        return {name: ", ".join(dtypes) for name, (_, dtypes) in _RKLLM.items()}

    @property
    def _driver(self) -> Driver:
        return Driver("rkllm", self.install)

    @property
    def takes(self) -> tuple[Takes, ...]:
        """Decoders, as HuggingFace has them."""
        return (_TAKES,)

    def plan(self, model: Described, request: Request, ask: Ask) -> Handing:
        """Decoders alone; precision, algorithm and cores are the chip's usual ones where nobody names them."""
        kind = kind_of(model.family)
        if kind not in _TAKES.kinds:
            raise Refused("RKLLM takes language models, nothing was written", found=f"{model.family.name}, {kind}",
                          expected="a decoder")  # fmt: skip
        known = {
            "dtype": settings.among("w8a8", *_DTYPES),
            "algorithm": settings.among(None, "normal", "grq", "gdq"),
            "max_context": settings.whole(4096, 32, 16384),
            "npu_cores": settings.whole(None, 1, 3),
            "optimization_level": settings.among(1, 0, 1),
            "hybrid_rate": settings.number(0.0, 0.0, 1.0),
            "nsamples": settings.whole(20, 1, 1024),
            "seqlen": settings.whole(256, 16, 4096),
        }
        chip = settings.chip(ask.platform, ask.settings, self.platforms, self.title)
        found = settings.settled(settings.asked(ask, "dtype", known["dtype"]), known, ask.where)
        cores, dtypes = _RKLLM[chip]
        dtype = found["dtype"]
        settings.require_of_use(ask, self.title, "--task", *(["--calibration"] if dtype == "fp16" else []))
        if dtype not in dtypes:
            raise Refused(
                f"{chip} does not compute in {dtype}, nothing was written",
                where=f"{chip} and {dtype}",
                expected=", ".join(dtypes),
                do=", ".join(name for name, (_, has) in _RKLLM.items() if dtype in has) + f" have {dtype}",
            )
        if found["npu_cores"] is not None and int(str(found["npu_cores"])) > cores:
            raise UsageError(f"{chip} has fewer cores, nothing was written", where=f"npu_cores in {ask.where}",
                             expected=f"{cores} at most", found=str(found["npu_cores"]))  # fmt: skip
        base = str(dtype).partition("_")[0]
        agreed = {
            **found,
            "npu_cores": found["npu_cores"] or cores,
            "algorithm": found["algorithm"] or _ALGORITHM[base],
        }
        step, mup, notes = folded(model, request)
        if dtype != "fp16" and ask.calibration is None:
            notes = (*notes, DEFAULT_WARNING)
        facts = {"layers": size(model.facts, "layers"), "mup": mup}
        weights = 2 * sum(prod(spec.shape) for spec in model.logical.specs.values())
        return Handing(Terms(chip, agreed, facts), (Step(_ROLE, step),), model, notes, memory=3 * weights)

    def find(self, ask: Ask, terms: Terms | None = None) -> Tool:
        """The interpreter with rkllm-toolkit."""
        return self._driver.find(ask)

    def lay_out(self, handing: Handing, work: Path, ask: Ask) -> None:
        """Write the driver, its job, and pairs of texts to calibrate on where there are codes."""
        agreed, source = dict(handing.terms.settings), {_ROLE: _ROLE}
        if agreed["dtype"] != "fp16":
            texts = prompts.texts(ask.calibration, int(str(agreed["nsamples"])), int(str(agreed["seqlen"])))
            said = [{"input": first, "target": rest} for first, rest in texts]
            (work / _CALIBRATION).write_text(f"{json.dumps(said, indent=1)}\n")
            source["calibration"] = _CALIBRATION
        self._driver.lay_out(handing, work, source, agreed)

    def judge(self, terms: Terms, out: Path, log: str) -> Mapping[str, object]:
        """One file, and 0 from each of RKLLM's steps."""
        said = self._driver.result(out)
        if said["files"] != [_FILE]:
            raise VerifyFailed("RKLLM writes one file", expected=_FILE, found=", ".join(said["files"]))
        evidence: Mapping[str, object] = said["evidence"]
        wanted = {"load": 0, "build": 0, "export": 0}
        if evidence.get("returned") != wanted:
            raise VerifyFailed("RKLLM did not say of each step that it went well", expected=str(wanted),
                               found=str(evidence.get("returned")))  # fmt: skip
        return {"bytes": (out / _FILE).stat().st_size, **evidence}
