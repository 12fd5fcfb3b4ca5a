"""Quark's MX forms against what amd-quark 0.13 exported and loaded (recorded), and the package where it is there."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dconv.arch.registry import by_name
from dconv.errors import Damaged, Refused
from dconv.pipeline import Request, convert, prepare
from tests.quant.models import write_normal
from tests.quant.recorded.quark_export import MODULE, SIZES, weight

RECORDED = json.loads((Path(__file__).parent / "recorded" / "quark_export.json").read_text())
EXPORTS = RECORDED["exports"]
VARIANT = {"fp4": "mxfp4", "fp6_e2m3": "mxfp6_e2m3", "fp6_e3m2": "mxfp6_e3m2"}


def tensor(text: str, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.uint8).copy()).reshape(rows, -1)


def write_plain(folder: Path, edit: dict[str, torch.Tensor | None], quantization: Any = None) -> Path:
    """The model that was recorded, with some tensors replaced or taken out."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES)
    tensors = {name: value.to(torch.bfloat16) for name, value in LlamaForCausalLM(config).state_dict().items()}
    for name, value in edit.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    if quantization is not None:
        said["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def exported(folder: Path, kind: str, edit: dict[str, torch.Tensor | None] | None = None) -> Path:
    found = EXPORTS[kind]
    parts = {f"{MODULE}.weight": tensor(found["codes"], 2), f"{MODULE}.weight_scale": tensor(found["scales"], 2)}
    return write_plain(folder, {**parts, **(edit or {})}, found["config"])


def read(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def codes_of(packed: torch.Tensor, bits: int) -> list[int]:
    """Codes as a stream of bits, the lowest first; negative zero as zero, which is what amd-quark writes."""
    stream = int.from_bytes(packed.numpy().tobytes(), "little")
    codes = [stream >> at & ((1 << bits) - 1) for at in range(0, packed.numel() * 8, bits)]
    return [0 if code == 1 << (bits - 1) else code for code in codes]


@pytest.mark.parametrize("kind", EXPORTS)
def test_decoded_as_amd_quark_does(tmp_path: Path, kind: str) -> None:
    source = exported(tmp_path / "source", kind)
    convert(Request(source, "hf", tmp_path / "dense"))
    own = tensor(EXPORTS[kind]["values"], 2).view(torch.bfloat16)
    assert torch.equal(read(tmp_path / "dense")[f"{MODULE}.weight"], own)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("kind", EXPORTS)
def test_encoded_as_amd_quark_does(tmp_path: Path, kind: str) -> None:
    name, rule = kind.split()
    source = write_plain(tmp_path / "source", {f"{MODULE}.weight": weight()})
    asked: Any = {"quant": VARIANT[name], "scale_rule": rule}
    convert(Request(source, "mx", tmp_path / "coded", **asked))
    found = read(tmp_path / "coded")
    codes, own = found[f"{MODULE}.weight"], tensor(EXPORTS[kind]["codes"], 2)
    assert (codes.dtype, codes.shape) == (own.dtype, own.shape)
    bits = int(name[2])
    assert codes_of(codes, bits) == codes_of(own, bits)
    assert torch.equal(found[f"{MODULE}.weight_scale"], tensor(EXPORTS[kind]["scales"], 2))
    written = json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]
    theirs = EXPORTS[kind]["config"]
    assert written["global_quant_config"].keys() == theirs["global_quant_config"].keys()
    of, theirs_of = (said["global_quant_config"]["weight"] for said in (written, theirs))
    assert all(theirs_of[key] == value for key, value in of.items())
    assert written.keys() == theirs.keys()
    assert {key: written[key] for key in written if key not in ("global_quant_config", "exclude")} == {
        key: theirs[key] for key in theirs if key not in ("global_quant_config", "exclude")
    }


@pytest.mark.parametrize("name", VARIANT)
def test_what_is_written_loads_in_amd_quark(tmp_path: Path, name: str) -> None:
    """The directory in transformers, by amd-quark's own layers, gives the logits of the decoded one."""
    pytest.importorskip("quark.torch", reason="amd-quark brings some thirty packages")
    source = write_normal(tmp_path / "source", by_name("llama"))
    convert(Request(source, "mx", tmp_path / "coded", quant=VARIANT[name]))
    convert(Request(tmp_path / "coded", "hf", tmp_path / "dense"))
    tokens = torch.arange(24).reshape(2, 12)
    logits = []
    for folder in ("coded", "dense"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(logits[0], logits[1])


def test_what_is_left_out_is_named_so_that_each_reader_finds_it(tmp_path: Path) -> None:
    source = write_normal(tmp_path / "source", by_name("qwen3_moe"))
    convert(Request(source, "mx", tmp_path / "coded", quant="mxfp6_e3m2"))
    exclude = json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"]["exclude"]
    with safe_open(tmp_path / "coded" / "model.safetensors", "pt") as opened:
        kinds = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    modules = {name.removesuffix(".weight"): value.dtype for name, value in kinds.items() if value.ndim == 2}
    for module, dtype in modules.items():
        if module.endswith(("embed_tokens", "weight_scale")):
            continue
        plain = dtype != torch.uint8
        by_name_or_expression = any(
            re.match(entry[3:], module) if entry.startswith("re:") else entry == module for entry in exclude
        )
        assert by_name_or_expression == plain, module
        assert any(fnmatch.fnmatch(module, entry) for entry in exclude) == plain, module


def test_layers_of_their_own_format(tmp_path: Path) -> None:
    """``layer_quant_config`` before ``global_quant_config``."""
    found = EXPORTS["fp6_e2m3 floor"]
    other = EXPORTS["fp4 floor"]["config"]
    said = {**other, "layer_quant_config": {"*.k_proj": found["config"]["global_quant_config"]}}
    exported(tmp_path / "source", "fp6_e2m3 floor")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    convert(Request(tmp_path / "source", "hf", tmp_path / "dense"))
    own = tensor(found["values"], 2).view(torch.bfloat16)
    assert torch.equal(read(tmp_path / "dense")[f"{MODULE}.weight"], own)


@pytest.mark.parametrize("kind", ["fp4 even", "fp6_e3m2 floor"])
def test_codes_that_are_there_are_kept(tmp_path: Path, kind: str) -> None:
    found = EXPORTS[kind]
    scales = tensor(found["scales"], 2) - 1  # that no rule gives
    source = exported(tmp_path / "source", kind, {f"{MODULE}.weight_scale": scales})
    convert(Request(source, "mx", tmp_path / "coded", quant=VARIANT[kind.split()[0]]))
    assert torch.equal(read(tmp_path / "coded")[f"{MODULE}.weight"], tensor(found["codes"], 2))
    assert torch.equal(read(tmp_path / "coded")[f"{MODULE}.weight_scale"], scales)
    convert(Request(source, "hf", tmp_path / "dense"))
    convert(Request(tmp_path / "coded", "hf", tmp_path / "dense again", quant=None))
    for folder in ("dense", "dense again"):
        assert f"{MODULE}.weight_scale" not in read(tmp_path / folder)
    left, right = (read(tmp_path / folder)[f"{MODULE}.weight"] for folder in ("dense", "dense again"))
    assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_eight_bits(tmp_path: Path, dtype: str) -> None:
    kinds = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    codes = torch.randn(2, 64, generator=torch.Generator().manual_seed(3)).to(kinds[dtype])
    scales = torch.tensor([[120, 127], [130, 140]], dtype=torch.uint8)
    said = json.loads(json.dumps(EXPORTS["fp4 floor"]["config"]))
    said["global_quant_config"]["weight"]["dtype"] = f"fp8_{dtype}"
    source = write_plain(
        tmp_path / "source", {f"{MODULE}.weight": codes, f"{MODULE}.weight_scale": scales}, said
    )  # fmt: skip
    convert(Request(source, "hf", tmp_path / "dense"))
    power = (2.0 ** (scales.to(torch.float64) - 127)).repeat_interleave(32, 1)
    own = (codes.to(torch.float64) * power).to(torch.bfloat16)
    assert torch.equal(read(tmp_path / "dense")[f"{MODULE}.weight"], own)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        ({f"{MODULE}.weight_scale": None}, Damaged, "no scales"),
        ({f"{MODULE}.weight": None}, Damaged, "belong to no MX weight"),
        ({f"{MODULE}.weight_scale": torch.zeros(2, 3, dtype=torch.uint8)}, Damaged, "does not make"),
        ({f"{MODULE}.weight_scale": torch.zeros(2, 2)}, Damaged, "does not make"),
        ({f"{MODULE}.weight": torch.zeros(2, 48, dtype=torch.uint8)}, Damaged, "does not make"),
    ],
)
def test_codes_that_mean_nothing_are_refused(
    tmp_path: Path, edit: dict[str, torch.Tensor | None], error: type[Exception], says: str
) -> None:
    source = exported(tmp_path / "source", "fp4 floor", edit)
    with pytest.raises(error, match=says):
        prepare(Request(source, "hf", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int4"},
        {"group_size": 16},
        {"qscheme": "per_tensor"},
        {"scale_format": "e4m3"},
        {"dtype": None},
        {"dtype": ["fp4"]},
    ],
)
def test_other_forms_of_quark_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    source = exported(tmp_path / "source", "fp4 floor")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["global_quant_config"]["weight"].update(change)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="does not decode"):
        prepare(Request(source, "hf", tmp_path / "out"))


def test_rows_that_are_not_of_whole_blocks_are_refused(tmp_path: Path) -> None:
    source = write_normal(tmp_path / "source", by_name("llama"), intermediate_size=80)
    with pytest.raises(Refused, match="whole MX blocks"):
        prepare(Request(source, "mx", tmp_path / "out", quant="mxfp6_e2m3"))
