"""Every cell of the conversion matrix, as `dconv.matrix` says it: converted, read back, compared with its source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dconv
from dconv import matrix
from dconv.cli import main
from dconv.errors import DconvError
from dconv.logits import compare
from dconv.pipeline import Request, prepare
from dconv.targets import GRAPHS
from tests.formats import gguf_tokenizers, test_meta
from tests.oracles import hf

ROOT = Path(__file__).resolve().parents[2]
#: Of a llama whose columns are whole groups of 64.
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
CALIBRATION = {"bits": 4, "group_size": 32, "nsamples": 12, "seqlen": 512}
#: Sources that calibration is tried on by default: what it reads are logical tensors, whatever their container.
CALIBRATED = ("huggingface", "torch_dist", "fp8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A source of each kind, made when it is asked for."""
    root = tmp_path_factory.mktemp("matrix")
    plain = hf.save(hf.tiny("llama", **SIZES)[1].to(torch.bfloat16), root / "huggingface")
    gguf_tokenizers.byte_pairs(plain, small=True)
    np.save(root / "ids.npy", np.random.default_rng(0).integers(0, test_meta.VOCAB, (12, 512)))  # the smallest one
    made: dict[str, Path] = {"huggingface": plain}

    def to(format: str, **options: Any) -> Callable[[Path], object]:
        return lambda out: dconv.convert(plain, format, out, **options)

    def meta(out: Path) -> object:
        params = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 64, "norm_eps": 1e-5}
        params["vocab_size"] = test_meta.VOCAB
        test_meta.release(out, params, test_meta.model(params, dtype=torch.bfloat16))
        (out / "tokenizer.model").unlink()
        return gguf_tokenizers.byte_pairs(out, small=True)

    make: dict[str, Callable[[Path], object]] = {
        "torch_dist": to("megatron", tp=2, pp=2),
        "legacy": to("megatron", tp=2, megatron_format="legacy"),
        "model_pt": to("megatron", megatron_format="model_pt"),
        "pt": to("pt"),
        "meta": meta,
        "bmtrain": to("bmtrain"),
        "neuron": to("neuron"),
        "gguf": to("gguf"),
        "mlx": to("mlx"),
        "fp8": to("fp8"),
        "mx": to("mx", quant="mxfp8"),
        "gptq": to("gptq", **calibration(root)),
        "awq": to("awq", **calibration(root)),
        "neuron_fp8": lambda out: dconv.convert(of("fp8"), "neuron", out),
        "gguf_blocks": to("gguf", quant="q8_0"),
        "mlx_codes": to("mlx", quant="4bit"),
        "onnx": to("onnx", dtype="f32"),
        "torch_export": to("torch_export"),
        "torchscript": to("torchscript"),
    }

    def of(name: str) -> Path:
        if name not in made:
            make[name](root / name)
            made[name] = root / name
        files = list(made[name].glob("*.gguf"))
        return files[0] if files else made[name]

    assert matrix.INPUTS.keys() == make.keys() | made.keys()
    return of


def calibration(folder: Path) -> dict[str, str]:
    return {"calibration": str(folder / "ids.npy"), "quantization_config": json.dumps(CALIBRATION)}


def cells() -> list[Any]:
    found = []
    for name, row in matrix.rows():
        for format, numbers in row.items():
            slow = numbers == "calibrated" and name not in CALIBRATED
            slow |= format in GRAPHS and numbers != "refused" and name not in ("huggingface", *GRAPHS)
            slow |= (name, format) in (
                ("huggingface", "onnx"),
                ("onnx", "neuron"),
            )  # what all of `test_onnx_export` does
            found.append(pytest.param(name, format, marks=[pytest.mark.long] * slow, id=f"{name}-{format}"))
    return found


@pytest.mark.parametrize(("name", "format"), cells())
def test_cell(source: Callable[[str], Path], tmp_path: Path, name: str, format: str) -> None:
    numbers = matrix.numbers(name, format)
    given, out = source(name), tmp_path / "out"
    options: dict[str, Any] = {}
    if numbers == "calibrated":
        options = calibration(source("huggingface").parent)
    elif name == "mx" and format == "mx":
        options = {"quant": "mxfp8"}
    if format == "onnx" and name != "onnx":
        options = {"dtype": "f32"}  # onnxruntime multiplies no bf16 on a CPU
    went, said = dconv.engine(format).convert(given, out, **options)
    if numbers == "refused":
        assert not went
        assert said
        assert said["exit_code"] == 3
        assert "convert from the checkpoint that it was made of" in said["error"]
        return
    assert went, said
    assert said
    assert (out / said["files"][0]).is_file()
    assert dconv.engine(format).validate(out)
    if format in GRAPHS:
        if name not in GRAPHS:
            compare(prepare(Request(given, format, out, dtype=options.get("dtype"))), out)
        return
    made = next(iter(out.glob("*.gguf")), out)
    found = dconv.diff(given, made)
    assert not found.only_a
    assert not found.only_b
    apart = [one for one in found.differences if one.elements]
    if numbers in ("exact", "kept", "decoded"):
        assert not apart
    else:  # the bound of each code is in its own tests; that codes are of these weights shows here
        assert apart
        largest = max(one.largest or 0 for one in apart)
        assert 0 < largest < 0.5


def test_an_answer_says_what_is_wrong(source: Callable[[str], Path], tmp_path: Path) -> None:
    went, said = dconv.engine("gguf").convert(source("huggingface"), tmp_path / "out", quant="q9_9")
    assert not went
    assert said
    assert said["exit_code"] in (2, 3)
    assert "q9_9" in said["error"]
    assert not (tmp_path / "out").exists()
    assert not dconv.engine("gguf").validate(tmp_path / "out")
    assert not dconv.engine("gguf").can_infer(tmp_path / "out")


def test_an_engine_runs_what_it_made(source: Callable[[str], Path]) -> None:
    assert dconv.engine("hf").can_infer(source("huggingface"))


def test_what_is_damaged_is_not_valid(source: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert dconv.engine("huggingface").convert(source("torch_dist"), out)[0]
    assert dconv.engine("huggingface").validate(out)
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    assert not dconv.engine("huggingface").validate(out)


def test_engines_from_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dconv import formats

    class Outside:
        def convert(self, model: Any, out: Any, **options: Any) -> tuple[bool, dict[str, Any]]:
            Path(out).mkdir()
            return True, {"out": str(out), **options}

        def validate(self, path: Any) -> bool:
            return Path(path).is_dir()

        def can_infer(self, path: Any) -> bool:
            return False

    class Point:
        name, value = "house", "house:ENGINE"

        def load(self) -> Outside:
            return Outside()

    def points(group: str, name: str | None = None) -> list[Point]:
        return [Point()] if name in (None, "house") else []

    monkeypatch.setattr(formats, "entry_points", points)
    assert "house" in dconv.engines()
    assert dconv.engine("house").convert("x", tmp_path / "out")[0]
    with pytest.raises(DconvError, match="no format is called hause"):
        dconv.engine("hause")
    assert main(["convert", str(tmp_path), "house", "-o", str(tmp_path / "told"), "--quant", "q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "told"), "quant": "q"}


def test_the_readme_has_the_matrix() -> None:
    shown = f"<!-- dconv formats --markdown -->\n{matrix.markdown()}\n<!-- -->"
    assert shown in (ROOT / "README.md").read_text()
