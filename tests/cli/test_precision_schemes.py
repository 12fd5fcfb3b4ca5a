"""`inspect`'s precision report on schemes that call a weight's scale ``weight_scale``: ModelOpt's and others' FP8."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dconv
from dconv.arch.registry import by_name
from dconv.pipeline import convert
from dconv.sharding.tensor import TensorSpec
from tests.cli.explained import E4M3
from tests.cli.precision import report
from tests.fp8 import write_fp8
from tests.quant.models import write_normal
from tests.quant.recorded.modelopt_export import FOLDER
from tests.quant.test_laws import NAMES, request

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


def in_fp8(tensors: Tensors) -> set[str]:
    found = {name for name, value in tensors.items() if value.dtype == E4M3 and name.endswith(".weight")}
    return {name.removesuffix(".weight") for name in found}


def edited(folder: Path, edit: Callable[[Tensors], object]) -> Path:
    shutil.copytree(FOLDER / "fp8_rows", folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", sorted(path.name for path in FOLDER.iterdir()))
def test_nothing_is_wrong_with_what_modelopt_writes(kind: str) -> None:
    tensors, said = load_file(FOLDER / kind / "model.safetensors"), report(FOLDER / kind)
    scaled = in_fp8(tensors)
    assert set(said["with_scales"]) == scaled and said["faults"] == []
    assert bool(scaled) == (kind.startswith("fp8") or kind in ("mixed", "mxfp8"))
    assert said["without_scales"] == (["lm_head"] if scaled else [])
    text = dconv.inspect(FOLDER / kind).text()
    assert "wrong" not in text and ("with scales" in text) == bool(scaled)
    if not scaled:
        return
    scales = [tensors[f"{module}.weight_scale"] for module in scaled]
    values = torch.cat(
        [(s.float() if s.is_floating_point() else torch.exp2(s.float() - 127)).flatten() for s in scales]
    )
    found = said["scales"]
    assert (found["count"], found["low"], found["high"]) == (values.numel(), float(values.min()), float(values.max()))


def test_nothing_is_wrong_with_what_dconv_writes(tmp_path: Path) -> None:
    source, seen = write_normal(tmp_path / "source", by_name("llama")), 0
    for number, (format, quant) in enumerate(NAMES):
        out = tmp_path / str(number)
        convert(request(source, out, format, quant))
        said, scaled = report(out), in_fp8(load_file(out / "model.safetensors"))
        assert (said["faults"], set(said["with_scales"])) == ([], scaled), (format, quant)
        seen += bool(scaled)
    assert seen > 4


WRONG: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scale": (lambda held: held.pop(f"{Q}.weight_scale"), "unscaled"),
    "no weight": (lambda held: held.pop(f"{Q}.weight"), "idle"),
    "no number": (lambda held: held[f"{Q}.weight_scale"].fill_(math.nan), "values"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, what: str) -> None:
    edit, kind = WRONG[what]
    model = edited(tmp_path / "model", edit)
    (fault,) = report(model)["faults"]
    assert (fault["kind"], fault["count"]) == (kind, 1) and Q in fault["where"][0]
    text = dconv.inspect(model).text()
    assert "wrong  " in text and all(len(line) <= 100 for line in text.splitlines())


def test_a_name_counts_where_the_scheme_has_it(tmp_path: Path) -> None:
    """A reader of ``quant_method`` fp8 looks for ``weight_scale_inv``, one of ModelOpt's for ``weight_scale``."""

    def edit(specs: dict[str, TensorSpec]) -> None:
        for name in [name for name in specs if name.endswith("_scale_inv")]:
            plain = name.removesuffix("_inv")
            specs[plain] = replace(specs.pop(name), name=plain)

    model = write_fp8(tmp_path / "model", edit=edit)
    assert [fault["kind"] for fault in report(model)["faults"]][:1] == ["unscaled"]
    inverse = {f"{Q}.weight_scale_inv": torch.ones(1)}
    renamed = edited(tmp_path / "other", lambda held: held.pop(f"{Q}.weight_scale") is None or held.update(inverse))
    assert [fault["kind"] for fault in report(renamed)["faults"]] == ["unscaled"]
