"""The errors of codes that a report tells, against arithmetic that is done here once more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dconv.arch.llama import LLAMA
from dconv.launch.reporting import reporting_of
from dconv.pipeline import Request, prepare, run
from dconv.report import losses
from dconv.sharding.rank import Settings
from tests.models import config_of, write_random
from tests.report.pages import Read

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


def model_of(folder: Path) -> Path:
    """Weights that are numbers, larger from layer to layer, and in two files' worth of layers."""
    config = config_of(LLAMA, hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=3)
    model = write_random(folder, LLAMA, config)
    draw = torch.Generator().manual_seed(3)
    held = safetensors.load_file(model / "model.safetensors")
    for name, tensor in held.items():
        made = torch.randn(tensor.shape, generator=draw)
        if "down_proj" in name:  # a few far larger: an error that is another one
            made[0, :4] *= 300
        held[name] = made.to(torch.bfloat16)
    safetensors.save_file(held, model / "model.safetensors")
    return model


def reported(model: Path, out: Path, **options: str) -> Read:
    job = prepare(Request(model, out=out, **options))
    reporting = reporting_of(job, True, 0, 1, 0.0)
    run(job, reporting.settings(Settings()))
    reporting.ended(lambda: None)
    return Read(out.with_name(f"{out.name}.report.html").read_text())


def held_in(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in safetensors.load_file(file).items()}


def test_the_errors_of_fp8(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model")
    read = reported(model, tmp_path / "out", format="fp8")
    was, became = held_in(model), held_in(tmp_path / "out")
    said = read.report["losses"]["layers"]
    checked = 0
    for name, codes in became.items():
        if codes.dtype != torch.float8_e4m3fn:
            continue
        scale = became[f"{name}_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        values = codes.double() * scale[: codes.shape[0], : codes.shape[1]]
        before = was[name].double()
        error = ((values - before).norm() / before.norm()).item()
        _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
        assert math.isclose(said[kind][layer], error, rel_tol=1e-9), name
        checked += 1
    assert checked == sum(map(len, said.values())) == 21
    assert (
        f"all {sum(was[name].numel() for name, codes in became.items() if codes.dtype == torch.float8_e4m3fn):,} "
        in read.words
    )
    row = next(row for row in read.rows if row and row[0] == "mlp.down_proj")
    assert row[3] == f"{100 * max(said['mlp.down_proj'].values()):.3g} %"


def test_a_sample_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer and class is in it, and what it finds is near to what all weights have."""
    model = model_of(tmp_path / "model")
    whole = reported(model, tmp_path / "whole", format="fp8").report["losses"]["layers"]
    monkeypatch.setattr(losses, "_WHOLE", 0)
    read = reported(model, tmp_path / "out", format="fp8")
    some = read.report["losses"]["layers"]
    assert "a sample of" in read.report["losses"]["words"] and "a sample of" in read.words
    assert {kind: set(each) for kind, each in some.items()} == {kind: set(each) for kind, each in whole.items()}
    for kind in ("self_attn.q_proj", "mlp.up_proj"):
        assert np.allclose(list(some[kind].values()), list(whole[kind].values()), rtol=0.2)


def test_a_plain_output_has_none(tmp_path: Path) -> None:
    read = reported(model_of(tmp_path / "model"), tmp_path / "out", format="hf", dtype="f16")
    assert read.report["losses"] is None and "No weight was put into codes" in read.words
    assert "bf16 rounded once to f16" in read.words


def test_those_of_a_calibration_are_its_own() -> None:
    """As `calibration.json` has them; experts of a layer by their mean."""
    lines = [
        {"weight": f"model.layers.{layer}.mlp.experts.{e}.up_proj.weight", "layer": layer, "relative_error": error}
        for layer, errors in ((0, (0.1, 0.3)), (1, (0.2, 0.6)))
        for e, error in enumerate(errors)
    ]
    found = losses.of_calibration(lines)
    assert json.loads(json.dumps(found.to_dict()["layers"])) == {
        "mlp.experts.*.up_proj": {"0": pytest.approx(0.2), "1": pytest.approx(0.4)}
    }
    name, count, mean, largest, where = found.lines[0]
    assert (name, count, largest) == ("mlp.experts.*.up_proj", 4, 0.6) and where == lines[3]["weight"]
    assert mean == pytest.approx(0.3)
