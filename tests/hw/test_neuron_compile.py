"""FORMAT neuron for a chip: inference_demo's contract, held by a stand-in, and what is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dconv.arch.neuron import left_plain
from dconv.cli import main
from dconv.codec.minifloat import E4M3, values
from dconv.describe import describe_model
from dconv.errors import Refused
from dconv.hw import manifest
from dconv.hw.neuron import ADAPTER, exclusions
from dconv.hw.neuron_models import heads_of
from dconv.hw.target import Ask, Handing
from dconv.request import Request
from tests.fp8 import write_fp8
from tests.hw.neuron import compiled, finite, left, of
from tests.models import tensors


def told(out: Path) -> dict[str, Any]:
    """What inference_demo was told."""
    with zipfile.ZipFile(out / "model.pt") as archive:
        return json.loads(archive.read("model/extra/told.json"))


def test_what_is_compiled_is_listed_with_its_evidence(llama: Path, neuron: Path, tmp_path: Path) -> None:
    assert compiled(llama, tmp_path / "out", neuron, "--tp", "4") == 0
    said = manifest.checked(tmp_path / "out")
    assert (said["kind"], said["target"], said["platform"]) == ("compiled", "neuron", "trn2")
    weights = {f"weights/tp{rank}_sharded_checkpoint.safetensors" for rank in range(4)}
    beside = {"model.pt", "neuron_config.json", "result.json", "compile.log", "config.json"}
    assert beside | weights <= set(said["files"])
    assert said["evidence"] == {
        "said": "Compiling and tracing time: 1.5 seconds",
        "bytes": (tmp_path / "out" / "model.pt").stat().st_size,
        "shards": 4,
        "weights": sum(said["files"][name]["bytes"] for name in weights),
    }
    assert said["toolchain"]["packages"]["torch-neuronx"] == "2.9.0.2.12.0"
    assert (told(tmp_path / "out")["target"], told(tmp_path / "out")["logical_nc_config"]) == ("trn2", 2)
    assert left(tmp_path) == {"out"}
    assert main(["check", str(tmp_path / "out")]) == 0


def test_the_tokenizer_goes_with_it(llama: Path, neuron: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0"}')
    assert compiled(tmp_path / "model", tmp_path / "out", neuron) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_is_compiled_in_fp8(tied: bool, neuron: Path, tmp_path: Path) -> None:
    of("llama", tmp_path / "model", tie_word_embeddings=tied)
    assert compiled(tmp_path / "model", tmp_path / "out", neuron, "--quant", "fp8", "--tp", "2") == 0
    said = manifest.read(tmp_path / "out")
    assert said["facts"]["plain"] == ["lm_head"]
    assert said["source"]["artifacts"]["neuron"]["plan"]
    assert told(tmp_path / "out")["modules_to_not_convert_file"] == {"modules_to_not_convert": ["lm_head"]}


def test_codes_and_scales_are_the_rows_of_the_dense_model(tmp_path: Path) -> None:
    """Against a plain computation: absmax / 240 a row, and no weight further off than half a step of e4m3."""
    of("llama", tmp_path / "model")
    assert compiled(tmp_path / "model", tmp_path / "out", None, "--quant", "fp8", "--bundle") == 0
    made = tensors(tmp_path / "out" / "neuron")
    assert (
        main(["convert", str(tmp_path / "model"), "hf", "--dtype", "f32", "-o", str(tmp_path / "f32"), "--quiet"]) == 0
    )
    for name, (dtype, shape, body) in tensors(tmp_path / "f32").items():
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            continue
        dense = np.frombuffer(body, "<f4").reshape(shape)
        assert dtype == "F32"
        there = name.removeprefix("model.").replace("self_attn.q_proj", "self_attn.qkv_proj.q_proj")
        codes = np.frombuffer(made[there][2], np.uint8).reshape(shape)
        scale = np.frombuffer(made[there.replace(".weight", ".scale")][2], "<f4").reshape(-1, 1)
        assert np.allclose(scale, np.abs(dense).max(1, keepdims=True) / 240, rtol=1e-6)
        assert (codes & 0x7F).max() == 0x77
        back = values(E4M3)[codes] * scale
        assert np.all(np.abs(back - dense) <= np.maximum(np.abs(dense) * 2**-4, scale * 2**-10) * 1.0001)


@pytest.mark.parametrize(
    ("family", "listed"),
    [
        ("llama", ["lm_head"]), ("mixtral", ["lm_head"]), ("qwen3_moe", ["lm_head"]),
        ("minimax_m2", ["lm_head", "o_proj"]),
    ],
)  # fmt: skip
def test_what_is_listed_is_what_is_stored_without_fp8(family: str, listed: list[str], tmp_path: Path) -> None:
    """By the vendor's rule: an entry takes out every linear module that has it in its name."""
    write_fp8(tmp_path / "model", family, hidden_size=64, intermediate_size=48, moe_intermediate_size=32)
    assert main(["convert", str(tmp_path / "model"), "neuron", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert exclusions(tmp_path / "out") == listed
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == listed
    assert (said["weight_block_size"] is None) == (family == "llama")
    linear = ("_proj.weight", "lm_head.weight")
    stored = {name: dtype for name, (dtype, _, _) in tensors(tmp_path / "out").items() if name.endswith(linear)}
    assert len(stored) > 4
    for name, dtype in stored.items():
        assert any(entry in name for entry in listed) == (dtype != "F8_E4M3"), name
        assert (name.replace(".weight", ".scale") in tensors(tmp_path / "out")) == (dtype == "F8_E4M3")


def test_an_entry_never_covers_a_quantised_module() -> None:
    shapes = {
        f"layers.{i}.self_attn.{name}.weight": (8, 8) for i in (1, 11) for name in ("o_proj.o_proj", "qkv.q_proj")
    }
    quantised = {name for name in shapes if "q_proj" in name} | {"layers.11.self_attn.o_proj.o_proj.weight"}
    found = left_plain(shapes, quantised)
    assert found == ("lm_head", "layers.1.self_attn.o_proj.o_proj")
    assert not any(entry in name for entry in found for name in quantised)
    # as MiniMax-M2 is released, its output projection in FP8, the output layer alone is left
    assert left_plain(shapes | {"lm_head.weight": (8, 8)}, set(shapes)) == ("lm_head",)
    assert left_plain(shapes, set()) == ()


def test_without_a_chip_it_is_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    for spelling in ("neuron", "hf2neuron"):
        assert main(["convert", str(llama), spelling, "-o", str(tmp_path / spelling), "--quiet"]) == 0
        assert "layers.0.self_attn.qkv_proj.q_proj.weight" in tensors(tmp_path / spelling)
        assert not manifest.is_here(tmp_path / spelling)


@pytest.mark.parametrize("start", ["dconv", "dconv.launch"])
def test_settings_that_cannot_be_read_are_said_by_every_launcher(start: str, llama: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", start, *(["convert"] if start == "dconv" else []), str(llama), "neuron"]
    asked = ["--quantization-config", "{", "-o", str(tmp_path / "out")]
    done = subprocess.run([*words, *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is no JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert left(tmp_path) == set()


def test_settings_name_the_chip_as_well(llama: Path, neuron: Path, tmp_path: Path) -> None:
    config = tmp_path / "neuron.yaml"
    config.write_text("platform: inf2\ntp_degree: 2\nbatch_size: 3\nseq_len: 64\nmax_context_length: 32\n")
    options = ["-o", str(tmp_path / "out"), "--quiet", "--toolchain-python", str(neuron)]
    assert main(["convert", str(llama), "hf2neuron", "--quantization-config", str(config), *options]) == 0
    found = told(tmp_path / "out")
    keys = ("target", "tp_degree", "batch_size", "seq_len", "max_context_length", "quantized", "on_device_sampling")
    assert [found[key] for key in keys] == ["inf2", 2, 3, 64, 32, False, False]


def test_weights_may_be_left_to_the_runtime(llama: Path, neuron: Path, tmp_path: Path) -> None:
    said = '{"save_sharded_checkpoint": false, "on_device_sampling": true}'
    assert compiled(llama, tmp_path / "out", neuron, "--quantization-config", said) == 0
    assert manifest.read(tmp_path / "out")["evidence"]["shards"] == 0
    assert told(tmp_path / "out")["on_device_sampling"]


def test_mup_is_folded_once_and_recorded(minicpm: Path, neuron: Path, tmp_path: Path) -> None:
    finite(shutil.copytree(minicpm, tmp_path / "model"))
    for quant in ("bf16", "fp8"):
        assert compiled(tmp_path / "model", tmp_path / quant, neuron, "--quant", quant) == 0
        assert manifest.read(tmp_path / quant)["facts"]["mup"] == "folded"
        assert told(tmp_path / quant)["model_type"] == "llama"


@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_the_models_of_the_vendor(family: str, neuron: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"qwen3_moe": {"norm_topk_prob": True}}.get(family, {})
    of(family, tmp_path / "model", sliding_window=None, **more)
    assert compiled(tmp_path / "model", tmp_path / "out", neuron) == 0
    assert told(tmp_path / "out")["model_type"] == family
    assert compiled(tmp_path / "model", tmp_path / "fp8", neuron, "--quant", "fp8") == 3


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--platform", "trn9"], 2, "compiles for one chip"),
        (["--platform", "trn1", "--quant", "fp8"], 3, "trn2 has it"),
        (["--platform", "inf2", "--quant", "fp8"], 3, "not documented for inf2"),
        (["--platform", "trn2", "--quant", "int8"], 2, "dtype cannot be this"),
        (["--platform", "trn1", "--tp", "4"], 3, "1, 2, 8, 16, 32"),
        (["--platform", "inf2", "--tp", "64"], 3, "24 cores"),
        (["--platform", "trn2", "--tp", "128"], 3, "logical_nc_config 2"),
        (["--platform", "trn2", "--tp", "2", "--quantization-config", '{"tp_degree": 4}'], 2, "two parallel sizes"),
        (["--platform", "trn2", "--pp", "2"], 2, "no such layout"),
        (["--platform", "trn2", "--dtype", "f16"], 2, "in bf16"),
        (["--platform", "trn2", "--quantization-config", '{"seq_len": 4096}'], 3, "max_position_embeddings"),
        (["--platform", "trn2", "--quantization-config", '{"seq_len": 32, "max_context_length": 64}'], 3, "no longer"),
        (["--platform", "trn2", "--quantization-config", '{"seqlen": 32}'], 2, "did you mean seq_len"),
        (["--platform", "inf2", "--quantization-config", '{"logical_nc_config": 2}'], 2, "logical_nc_config"),
        (["--platform", "trn2", "--quantization-config", '{"platform": "inf2"}'], 2, "two chips"),
        (["--platform", "trn2", "--neuron-rescale", "2"], 2, "no codes"),
        (["--platform", "trn2", "--quant", "fp8", "--neuron-scale", "reciprocal"], 2, "multiplies by its scales"),
        (["--platform", "trn2", "--max-host-memory", "1KB"], 3, "holds the whole model"),
        (["--platform", "trn2", "--toolchain-python", "no-such-python"], 2, "no interpreter"),
        (["--tp", "2"], 2, "no such layout"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: list[str], code: int, words: str, llama: Path, neuron: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = [] if "--toolchain-python" in options else ["--toolchain-python", str(neuron)]
    assert main(["convert", str(llama), "neuron", "-o", str(tmp_path / "out"), *own, *options]) == code
    assert words in capsys.readouterr().err
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("family", "chip", "sizes", "words"),
    [
        ("gemma2", "trn2", {}, "has no such model"),
        ("minimax_m2", "trn2", {}, "a class of your own"),
        ("qwen3_moe", "trn2", {"norm_topk_prob": False}, "always normalises"),
        ("qwen2", "trn2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotates without scaling"),
        ("mistral", "trn1", {"sliding_window": 8}, "none on trn1"),
        ("mistral", "trn2", {"sliding_window": None, "head_dim": 32}, "its class takes hidden_size"),
    ],
)
def test_a_class_that_would_compute_something_else_is_refused(
    family: str, chip: str, sizes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of(family, tmp_path / "model", **sizes)
    assert compiled(tmp_path / "model", tmp_path / "out", None, "--bundle", chip=chip) == 3
    assert words in capsys.readouterr().err
    assert left(tmp_path) == {"model"}


def test_a_model_too_large_for_the_chip_is_refused(tmp_path: Path) -> None:
    """Llama 3.1 70B: 141 GB in bf16, more than eight cores of 17.2 GB have, and less than eight of 25.8."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80,
        "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = describe_model(tmp_path, config_alone=True)

    def planned(chip: str, **said: object) -> Handing:
        return ADAPTER.plan(model, Request(tmp_path, "huggingface"), Ask(chip, said, "", None, {}))

    assert planned("trn1").terms.settings["tp_degree"] == 16
    assert planned("trn2").terms.settings["tp_degree"] == 8
    assert planned("trn2", dtype="fp8").terms.settings["tp_degree"] == 4
    assert 400e9 < planned("trn1").memory < 450e9
    with pytest.raises(Refused, match="does not fit"):
        planned("trn1", tp_degree=8)
    with pytest.raises(Refused, match="does not fit") as raised:
        planned("inf2", batch_size=64, seq_len=131072)
    # keys and values of 24 heads, three copies of each of the 8
    assert "GB of cache" in raised.value.found
    assert planned("trn2", batch_size=8, seq_len=32768).terms.settings["tp_degree"] == 16


def test_a_width_that_no_number_of_cores_divides_is_said(tmp_path: Path) -> None:
    """Mixtral 8x22B: 281 GB in bf16, which 24 cores of 17.2 GB have, and experts of 16384 that 24 do not divide."""
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 6144, "num_hidden_layers": 56,
        "intermediate_size": 16384, "num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 32000,
        "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 65536, "sliding_window": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = describe_model(tmp_path, config_alone=True)
    with pytest.raises(Refused, match="a width is not divided") as raised:
        ADAPTER.plan(model, Request(tmp_path, "huggingface"), Ask("inf2", {}, "", None, {}))
    assert (raised.value.where, raised.value.expected) == ("intermediate_size", "a multiple of 24")


@pytest.mark.parametrize(("length", "code"), [(16, 0), (17, 3)])
def test_one_graph_has_one_list_of_longropes_factors(
    length: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = [1.0 + number for number in range(8)]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors[::-1]}
    more = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    of("llama", tmp_path / "model", rope_scaling=rope, head_dim=16, **more)
    said = json.dumps({"seq_len": length})
    options = ["--bundle", "--quantization-config", said]
    assert compiled(tmp_path / "model", tmp_path / "out", None, *options) == code
    assert ("longrope" in capsys.readouterr().err) == bool(code)


def test_the_interpreter_may_be_named_from_here(
    llama: Path, neuron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert compiled(llama, tmp_path / "out", neuron.relative_to(tmp_path.parent)) == 0


def test_plan_and_doctor_say_it(llama: Path, neuron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--platform", "trn2", "--quant", "fp8", "--tp", "8", "--json"]
    assert main(["plan", str(llama), "neuron", *asked, "--toolchain-python", str(neuron)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["artifacts"], said["toolchain"]) == ({"neuron": "neuron"}, "NxD Inference 0.9.0")
    assert said["settings"]["tp_degree"] == 8
    assert any("query heads of" in note for note in said["notes"])
    assert main(["plan", str(llama), "neuron", *asked]) == 0
    assert "no package" in json.loads(capsys.readouterr().out)["lacks"]
    assert main(["doctor", "--json", "--toolchain-python", str(neuron)]) == 0
    found = json.loads(capsys.readouterr().out)["compilers"]["neuron"]
    assert found["found"] == "NxD Inference 0.9.0"
    assert found["details"]["compiler_version"] == "2.23.1+stand-in"


def test_a_bundle_is_whole_elsewhere(llama: Path, neuron: Path, tmp_path: Path) -> None:
    assert compiled(llama, tmp_path / "bundle", None, "--bundle", "--tp", "2") == 0
    assert manifest.checked(tmp_path / "bundle")["kind"] == "bundle"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "bundle", elsewhere)
    done = subprocess.run(
        ["bash", str(elsewhere / "compile.sh")], env={**os.environ, "TOOLCHAIN_PYTHON": str(neuron)}, cwd="/",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "dconv-progress 2/2" in done.stdout
    assert told(elsewhere / "out")["tp_degree"] == 2
    assert (elsewhere / "out" / "weights/tp1_sharded_checkpoint.safetensors").is_file()


@pytest.mark.parametrize(
    ("heads", "cores", "lie"),
    [
        ((32, 8), 8, (32, 8)), ((32, 8), 4, (32, 8)), ((32, 8), 32, (32, 32)), ((32, 8), 64, (64, 64)),
        ((56, 8), 32, (64, 32)), ((14, 2), 8, (16, 8)), ((12, 4), 8, (16, 8)), ((9, 3), 8, (16, 16)),
        ((20, 20), 8, (24, 24)), ((28, 4), 1, (28, 4)),
    ],
)  # fmt: skip
def test_heads_lie_as_the_vendor_lays_them(heads: tuple[int, int], cores: int, lie: tuple[int, int]) -> None:
    """56 and 8 on 32 cores are the vendor's own example."""
    assert heads_of({"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}, cores) == lie
