"""ONNX graphs of given lengths, as compilers of NPUs take them, and what such a compiler is calibrated with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from dconv.arch.layouts import size
from dconv.describe import Described
from dconv.errors import Refused
from dconv.export.prompt import kind_of
from dconv.hw.driver import Driver
from dconv.hw.mup import folded
from dconv.hw.settings import Setting, whole
from dconv.hw.target import Ask, Handing, Step, Takes
from dconv.quant.data import load
from dconv.quant.settings import Calibration
from dconv.request import Request

ROLE: Final = "onnx"
#: Models of one graph.
TAKES: Final = Takes(("decoder", "encoder", "hybrid"), ("onnx",))
FILE: Final = f"{ROLE}/model.onnx"
CALIBRATION: Final = "calibration.npz"
#: Both compilers take it; newer ones, not both.
_OPSET: Final = 18
#: Keys of the settings that say what the graph is.
LENGTHS: Final[Mapping[str, Setting]] = {
    "sequence": whole(128, 1, 1 << 20),
    "past": whole(0, 0, 1 << 20),
    "nsamples": whole(16, 1, 1024),
}


def planned(
    model: Described, request: Request, found: Mapping[str, object], quantised: bool, compiler: str
) -> tuple[Step, dict[str, object], tuple[str, ...]]:
    """The conversion, facts for the manifest, and notes.

    Args:
        model: what is compiled.
        request: how it is read.
        found: the settings, `LENGTHS` among them.
        quantised: whether the compiler chooses codes, for which it is given samples.
        compiler: its title, for errors.

    Raises:
        Refused: a model of more than one graph, or samples of a cache, which there are none of.
    """
    kind, sequence, past = kind_of(model.family), int(str(found["sequence"])), int(str(found["past"]))
    if kind not in TAKES.kinds:
        raise Refused(f"{compiler} takes one graph, nothing was written", found=f"{model.family.name}, {kind}",
                      expected="a decoder or an encoder")  # fmt: skip
    if quantised and (past or kind == "encoder"):
        raise Refused(
            f"there are no samples for {compiler} to find numbers by, nothing was written",
            found=f"a cache of {past} tokens" if past else f"{model.family.name}, an encoder",
            expected="past 0 of a decoder, or fp16",
        )
    made, mup, notes = folded(model, request)
    made = replace(made, format="onnx", dtype="f32", lengths=(sequence, past), opset=_OPSET, for_codes=quantised)
    facts: dict[str, object] = {
        "layers": size(model.facts, "layers"), "mup": mup, "sequence": sequence, "past": past, "kind": kind,
    }  # fmt: skip
    return Step(ROLE, made), facts, notes


def lay_out(driver: Driver, handing: Handing, work: Path, ask: Ask) -> None:
    """Write what a driver compiles beside the graph: its job, and samples where the compiler chooses codes.

    Raises:
        DconvError: see `dconv.quant.data.load`.
    """
    agreed, source = dict(handing.terms.settings), {"onnx": FILE}
    if agreed["dtype"] != "fp16":
        _calibrate(handing, work, ask)
        source["calibration"] = CALIBRATION
    driver.lay_out(handing, work, source, agreed)


def _calibrate(handing: Handing, work: Path, ask: Ask) -> None:
    """Write samples, an array [samples, *shape] an input: texts of the length that the graph has, nothing masked."""
    facts, found = handing.terms.facts, handing.terms.settings
    sequence, count = int(str(facts["sequence"])), int(str(found["nsamples"]))
    asked = Calibration(ask.calibration, count, sequence)
    tokens = load(asked, work / ROLE, size(handing.model.facts, "vocab")).tokens
    arrays: dict[str, Any] = {
        "input_ids": tokens.astype(np.int64)[:, None, :],
        "attention_mask": np.ones((count, 1, sequence), np.int64),
    }
    if facts["kind"] == "decoder":
        places = np.arange(sequence, dtype=np.int64)
        arrays["position_ids"] = np.broadcast_to(places, (count, 1, sequence))
    np.savez(work / CALIBRATION, **arrays)
