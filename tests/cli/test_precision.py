"""`inspect`'s precision report: which modules have scales, in which dtype each class is, and muP scalars."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dconv.arch.registry import by_name
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from dconv.sharding.tensor import TensorSpec
from tests.cli.conftest import Dconv
from tests.cli.precision import RELEASED, listing, report
from tests.fp8 import BLOCK, write_fp8
from tests.models import config_of, tensors, write_random

# ------------------------------------------------------------------------------------------- what is stored, exactly


def test_exactly_the_modules_with_scales(tmp_path: Path) -> None:
    """A MiniMax-M2 as released: told by the file's own header, nothing is wrong with it."""
    model = listing(tmp_path / "model", RELEASED)
    said, stored = report(model), tensors(model)
    in_fp8 = {name.removesuffix(".weight") for name, (dtype, _, _) in stored.items() if dtype == "F8_E4M3"}
    assert set(said["with_scales"]) == in_fp8 == {n.removesuffix(".weight_scale_inv") for n in stored if "_scale" in n}
    assert len(said["with_scales"]) == len(in_fp8) == 4 * (4 + 3 * 4)
    assert said["without_scales"] == ["lm_head"]
    assert said["faults"] == []
    assert said["block"] == {
        "size": [BLOCK, BLOCK], "said_by": "config.json", "shapes_admit": [[16, 23], [16, 23]], "agree": True,
    }  # fmt: skip
    assert sorted(said["not_converted"]["right"]) == ["gate", "lm_head"]
    classes = {each["class"]: each for each in said["classes"]}
    assert classes["self_attn.q_proj"]["states"] == {"f8_e4m3 with scales": 4}
    assert classes["block_sparse_moe.experts.*.w2"]["states"] == {"f8_e4m3 with scales": 16}
    assert classes["block_sparse_moe.gate"]["role"] == "router"
    assert sum(each["count"] for each in said["classes"]) == sum("_scale" not in name for name in stored)


def test_scales_are_counted(tmp_path: Path) -> None:
    """Count, range, and the histogram, against numpy on the file's bytes; by layer and class as well."""
    model = listing(tmp_path / "model", RELEASED)
    values = {n: np.frombuffer(data, "<f4") for n, (_, _, data) in tensors(model).items() if n.endswith("_scale_inv")}
    together = np.concatenate(list(values.values())).astype(np.float64)
    said = report(model)
    found = said["scales"]
    assert (found["count"], found["zeros"], found["negative"], found["broken"]) == (len(together), 0, 0, 0)
    assert (found["low"], found["high"]) == (together.min(), together.max())
    edges = [low for low, _ in found["bins"]]
    for low, n in found["bins"]:
        assert n == ((together >= low) & (together < low * 2**0.25)).sum()
    assert edges == sorted(edges) and sum(n for _, n in found["bins"]) == len(together)
    cell = next(c for c in said["cells"] if c["name"] == "model.layers.2.block_sparse_moe.experts.*.w1")
    theirs = np.concatenate([v for n, v in values.items() if n.startswith("model.layers.2.") and ".w1." in n])
    assert (cell["scales"]["count"], cell["scales"]["low"]) == (len(theirs), theirs.min())


def test_experts_of_a_layer_are_one_cell(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", RELEASED, num_local_experts=64)
    cells = report(model)["cells"]
    assert len(cells) == 4 * 13 + 3
    assert {cell["count"] for cell in cells if "experts" in cell["kind"]} == {64}


def test_scales_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few values at a time, also of a tensor that lies transposed in its file, gives the same."""
    import torch

    from dconv.report import statistics

    model = listing(tmp_path / "model", RELEASED)
    before = report(model)["scales"]
    state: dict[str, torch.Tensor] = {}
    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16}
    for name, (dtype, shape, data) in tensors(model).items():
        state[name] = torch.frombuffer(bytearray(data), dtype=dtypes[dtype]).reshape(shape)
        if name.endswith("_scale_inv"):
            state[name] = state[name].t().contiguous().t()
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    monkeypatch.setattr(statistics, "_VALUES", 5)
    assert report(model)["scales"] == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_values_that_are_no_scales(tmp_path: Path, value: float) -> None:
    said = report(listing(tmp_path / "model", RELEASED, value=value))
    assert [fault["kind"] for fault in said["faults"]] == ["values"]
    assert said["faults"][0]["count"] == 64
    assert said["scales"]["broken"] + said["scales"]["negative"] == said["scales"]["count"]


def test_scales_as_exponents(tmp_path: Path) -> None:
    """E8M0: a byte b is 2^(b - 127)."""

    def edit(specs: dict[str, TensorSpec]) -> None:
        for name, spec in specs.items():
            if name.endswith("_scale_inv"):
                specs[name] = TensorSpec(name, spec.shape, "f8_e8m0")

    found = report(listing(tmp_path / "model", RELEASED, edit=edit))["scales"]
    assert (found["low"], found["high"]) == (2.0**-127, 2.0**-127)


# ------------------------------------------------------------------------------------------------------ other models


@pytest.mark.parametrize("format", ["hf", "legacy", "torch_dist"])
def test_classes_are_the_same_in_each_container(hf: Path, made: Callable[[str], Path], format: str) -> None:
    said, there = report(made(format)), report(hf)
    by_class = {each["class"]: each["states"] for each in said["classes"]}
    assert by_class == {each["class"]: each["states"] for each in there["classes"]}
    assert said["faults"] == [] and said["block"] is None and said["scales"] is None
    assert {cell["layer"] for cell in said["cells"]} == {-1, 0, 1, 2, 3}


def test_mixed_dtypes(tmp_path: Path) -> None:
    """A Mixtral in bf16 with routers in f32, through Megatron as well, and one with a projection of its own."""

    def mixtral(folder: str, *others: str) -> Path:
        def edit(specs: dict[str, TensorSpec]) -> None:
            names = [name for name in specs if any(part in name for part in others)]
            specs.update({name: TensorSpec(name, specs[name].shape, "f32") for name in names})

        plain = {"quantised": lambda name: False, "quantization": None}
        model = write_fp8(tmp_path / folder, "mixtral", edit=edit, **plain)
        config = json.loads((model / "config.json").read_text())
        del config["quantization_config"]
        (model / "config.json").write_text(json.dumps(config))
        return model

    model = mixtral("model", "gate")
    convert(Request(model, "megatron", tmp_path / "out", parallel=Parallel(tp=2)))
    for path in (model, tmp_path / "out"):
        classes = {each["class"]: each for each in report(path)["classes"]}
        assert classes["block_sparse_moe.gate"]["states"] == {"f32": 4}
        assert classes["block_sparse_moe.experts.*.w1"]["states"] == {"bf16": 16}
    classes = {each["class"]: each for each in report(mixtral("odd", "1.self_attn.o_"))["classes"]}
    assert classes["self_attn.o_proj"]["layers"] == {"bf16": [0, 2, 3], "f32": [1]}


def test_packed_codes_of_another_method(dconv: Dconv, tmp_path: Path) -> None:
    """gpt-oss as released: what is decoded is reported as the codes that it is; no claims of FP8 are looked for."""
    blocks = "model.layers.{}.mlp.experts.down_proj_{}"

    def edit(specs: dict[str, TensorSpec]) -> None:
        for layer in range(4):
            del specs[f"model.layers.{layer}.mlp.experts.down_proj"]
            for what, last in (("blocks", (16,)), ("scales", ())):
                name = blocks.format(layer, what)
                specs[name] = TensorSpec(name, (4, 32, 2, *last), "u8")

    model = write_fp8(
        tmp_path / "model",
        "gpt_oss",
        quantised=lambda n: False,
        edit=edit,
        quantization={"quant_method": "mxfp4"},
        intermediate_size=64,
    )
    ran = dconv("inspect", model, "--json").json
    assert not ran["refused"]
    said = ran["precision"]
    assert (said["method"], said["faults"], said["block"]) == ("mxfp4", [], None)
    assert (
        Counter({e["class"]: e["states"].get("e2m1 codes", 0) for e in said["classes"]})["mlp.experts.down_proj"] == 4
    )
    assert "mxfp4, as config.json says" in dconv("inspect", model).out


@pytest.mark.parametrize("family", ["minicpm", "granite", "llama"])
def test_mup_scalars_and_their_meaning(dconv: Dconv, tmp_path: Path, family: str) -> None:
    known = by_name(family)
    model = write_random(tmp_path / "model", known, config_of(known))
    convert(Request(model, "megatron", tmp_path / "out"))
    for path in (model, tmp_path / "out"):
        found, shown = dconv("inspect", path, "--json").json["mup"], dconv("inspect", path).out
        if family == "llama":
            assert found == {} and "muP" not in shown
            continue
        factors = {part: factor["factor"] for part, factor in found["factors"].items()}
        if family == "minicpm":
            assert factors == {"embedding": 12, "residual": 1.4 / math.sqrt(4), "head": 256 / 32}
            assert found["scalars"] == {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
        else:
            assert factors == {"embedding": 12, "query": 0.125 * math.sqrt(8), "residual": 0.22, "head": 1 / 8}
        assert "--mup2llama" in shown and all(factor["formula"] in shown for factor in found["factors"].values())
