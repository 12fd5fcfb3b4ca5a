"""What inspect says of each container, and of checkpoints that would be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.arch.bamba import BAMBA
from dconv.arch.llama import LLAMA
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.cli.conftest import Dconv
from tests.models import config_of, tensors, write_random


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("format", ["hf", "legacy", "torch_dist"])
def test_each_format(dconv: Dconv, hf: Path, made: Callable[[str], Path], format: str) -> None:
    out = made(format)
    shown = dconv("inspect", out)
    assert shown.code == 0, shown.err
    assert all(len(line) <= 100 for line in shown.out.splitlines())
    report = dconv("inspect", out, "--json").json
    stored = tensors(hf)
    assert report["family"] == "llama"
    assert report["layers"] == 4
    assert report["vocab"] == 61
    assert report["tied"] is False
    assert report["dtypes"] == {"bf16": len(stored)}
    assert report["parameters"] * 2 == sum(len(data) for _, _, data in stored.values())
    assert report["stored_bytes"] >= report["parameters"] * 2
    assert "tokenizer.json" in report["side"]
    assert report["receipt"] == json.loads((out / "dconv.json").read_text())["plan"]
    assert report["refused"] == ""
    if format != "hf":
        assert (report["parallel"]["tp"], report["parallel"]["pp"]) == (2, 2)
        assert report["padded_vocab"] == 256
        assert "195 rows of padding" in shown.out
    if format == "legacy":
        assert report["parallel"]["vpp"] == 2


def test_layers_are_counted_as_in_its_config(dconv: Dconv, tmp_path: Path) -> None:
    """Also where each is two of Megatron's stack: in the source, in the plan, and in what is written."""
    model = write_random(tmp_path / "model", BAMBA, config := config_of(BAMBA))
    layers = config["num_hidden_layers"]
    assert dconv("plan", model, "megatron", "--json").json["layers"] == layers
    convert(Request(model, "megatron", tmp_path / "m"))
    for path in (model, tmp_path / "m"):
        assert dconv("inspect", path, "--json").json["layers"] == layers


def test_uneven_stages(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    convert(Request(hf, "megatron", out, megatron_format="legacy", parallel=Parallel(pp=2, stages=((1,), (3,)))))
    assert dconv("inspect", out, "--json").json["parallel"]["layers"] == "1|3"
    assert dconv("inspect", out / "release", "--json").json["receipt"]


def test_config_rebuilt_from_args(dconv: Dconv, made: Callable[[str], Path]) -> None:
    out = made("legacy")
    for path in (out / "huggingface").iterdir():
        path.unlink()
    report = dconv("inspect", out, "--json").json
    assert report["config_from"] == "rebuilt from Megatron's args"
    assert report["family"] == "llama"


def test_unknown_family(dconv: Dconv, hf: Path) -> None:
    edit_config(hf, architectures=["NobodysForCausalLM"], model_type="nobody")
    report = dconv("inspect", hf, "--json").json
    assert report["family"] is None
    assert report["architecture"] == "NobodysForCausalLM"
    assert report["format"] == "huggingface"
    assert set(report["names"]) == set(tensors(hf))
    assert "no family is called NobodysForCausalLM" in report["refused"]
    shown = dconv("inspect", hf)
    assert shown.code == 0
    assert "model.layers.{0..3}.mlp.up_proj.weight" in shown.out
    assert all(len(line) <= 100 for line in shown.out.splitlines())
    assert dconv("inspect", hf, "--model-type", "llama", "--json").json["refused"] == ""


def test_what_would_be_refused(dconv: Dconv, hf: Path) -> None:
    edit_config(hf, quantization_config={"quant_method": "bitsandbytes"})
    report = dconv("inspect", hf, "--json").json
    assert report["family"] == "llama"
    assert "quantised" in report["refused"]
    edit_config(hf, quantization_config=None, intermediate_size=64)
    assert "another shape" in dconv("inspect", hf).out


def test_tied_and_left_out(dconv: Dconv, tmp_path: Path) -> None:
    model = write_random(tmp_path / "model", LLAMA, config_of(LLAMA, tie_word_embeddings=True))
    (model / "modeling_llama.py").write_text("raise SystemExit")
    shown = dconv("inspect", model).out
    assert "tied to the output layer" in shown
    assert "modeling_llama.py: code is never run nor copied" in shown


def test_not_a_checkpoint(dconv: Dconv, tmp_path: Path) -> None:
    ran = dconv("inspect", tmp_path)
    assert ran.code == 3
    assert ran.err.startswith("refused (3)")
