"""FORMAT neuron for a chip: inference_demo's contract held by a stand-in, and each way in which it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dconv.arch import registry
from dconv.arch.neuron import left_plain
from dconv.cli import main
from dconv.codec.minifloat import E4M3, values
from dconv.describe import describe_model
from dconv.errors import Refused, VerifyFailed
from dconv.hw import manifest
from dconv.hw.neuron import ADAPTER, exclusions
from dconv.hw.neuron_models import heads_of
from dconv.hw.target import Ask, Handing, Terms
from dconv.request import Request
from tests.fp8 import write_fp8
from tests.hw.conftest import neuron_in
from tests.models import config_of, tensors, tree_digest, write_random


def compiled(model: Path, out: Path, python: Path | None, *options: str, chip: str = "trn2") -> int:
    told = ["--toolchain-python", str(python)] if python else []
    return main(["convert", str(model), "neuron", "--platform", chip, "-o", str(out), "--quiet", *told, *options])


def left(folder: Path) -> set[str]:
    """What a run left, the toolchain aside."""
    return {path.name for path in folder.iterdir()} - {"python", "toolchain"}


def told(out: Path) -> dict[str, Any]:
    """What inference_demo was told."""
    with zipfile.ZipFile(out / "model.pt") as archive:
        return json.loads(archive.read("model/extra/told.json"))


def of(family: str, folder: Path, **sizes: Any) -> Path:
    """A model of finite weights, from 2^-7 up to 2."""
    known = registry.by_name(family)
    write_random(folder, known, config_of(known, **sizes))
    return finite(folder)


def finite(folder: Path) -> Path:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    drawn = np.frombuffer(bytes(data[begin:]), "<u2")
    data[begin:] = (drawn & 0x83FF | 0x3C00).tobytes()
    path.write_bytes(data)
    return folder


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


def rename(folder: Path, old: str, new: str) -> None:
    path = folder / old
    text = (path / "METADATA").read_text()
    version = old.split("-")[1].removesuffix(".dist")
    (path / "METADATA").write_text(text.replace(f"Version: {version}", f"Version: {new}"))


HALVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (shutil.rmtree, "no package"),
    "a stub of torch-neuronx": (lambda p: rename(p, "torch_neuronx-2.9.0.2.12.0.dist-info", "1.0"), "a placeholder"),
    "a stub of neuronx-cc": (lambda p: rename(p, "neuronx_cc-2.23.1.dist-info", "1.0.post1"), "a placeholder"),
    "a stub of NxD Inference": (lambda p: (p / "neuronx_distributed_inference/inference_demo.py").unlink(),
                                "without inference_demo"),
    "an old inference_demo": (lambda p: (p / "neuronx_distributed_inference/inference_demo.py").write_text("pass"),
                              "has no --compile-only"),
    "no torch_neuronx": (lambda p: shutil.rmtree(p / "torch_neuronx"), "without its module"),
    "no compiler": (lambda p: (p / "bin/neuronx-cc").unlink(), "no program neuronx-cc"),
    "a broken compiler": (lambda p: (p / "bin/neuronx-cc").write_text("#!/bin/sh\nexit 1\n"), "its version"),
}  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
def test_half_a_toolchain_is_none(
    half: str, llama: Path, neuron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, words = HALVES[half]
    broken(tmp_path / "toolchain")
    assert compiled(llama, tmp_path / "out", neuron) == 7
    said = capsys.readouterr().err
    assert words in said and "--bundle" in said
    assert left(tmp_path) == set()


def test_a_toolchain_without_the_model_is_none_for_it(
    llama: Path, neuron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "toolchain" / "neuronx_distributed_inference" / "inference_demo.py"
    script.write_text(script.read_text().replace('    "llama": {"causal-lm": NeuronApplicationBase},\n', ""))
    assert compiled(llama, tmp_path / "out", neuron) == 7
    assert "has no such model" in capsys.readouterr().err
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("fails", "code", "words"),
    [
        ("compiler", 7, "NCC_IXCG856"),
        ("crash", 7, "exit code -6"),
        ("hang", 7, "longer than it may"),
        ("full", 5, "No space left"),
        ("silent", 7, "without saying that it compiled"),
        ("zero bytes", 7, "no archive of torch.jit"),
        ("cut model", 7, "no archive of torch.jit"),
        ("no data", 6, "data.pkl"),
        ("no config", 7, "neuron_config.json was not written"),
        ("few", 7, "was not written"),
        ("many", 6, "or too many"),
        ("cut", 7, "not as long as its header says"),
        ("empty shard", 7, "has no header"),
        ("fewer cores", 6, "something else was compiled"),
    ],
)
def test_a_failure_leaves_its_log_and_nothing_that_looks_good(
    fails: str, code: int, words: str, llama: Path, neuron: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    limit = "3" if fails == "hang" else "60"
    assert compiled(llama, tmp_path / "out", neuron, "--tp", "4", "--toolchain-timeout", limit) == code
    assert words in capsys.readouterr().err
    assert left(tmp_path) == {"out.compile.log"}


def test_a_checkpoint_beyond_240_or_quantised_once_more_is_not_compiled(neuron: Path, tmp_path: Path) -> None:
    """The stand-in sees it: this is what the tests above rest on."""
    of("llama", tmp_path / "model")
    assert compiled(tmp_path / "model", tmp_path / "bundle", None, "--quant", "fp8", "--bundle") == 0
    bundle = tmp_path / "bundle"
    environment = {**os.environ, "TOOLCHAIN_PYTHON": str(neuron)}

    def run() -> str:
        done = subprocess.run(["bash", str(bundle / "compile.sh")], env=environment, capture_output=True, text=True,
                              check=False)  # fmt: skip
        return "" if done.returncode == 0 else done.stdout + done.stderr

    assert run() == ""
    (bundle / "SHA256SUMS").unlink()
    driver = bundle / "neuron_driver.py"
    original = driver.read_text()
    path = bundle / "neuron" / "model.safetensors"
    before = path.read_bytes()
    name = "layers.0.mlp.up_proj.weight"
    codes = tensors(bundle / "neuron")[name][2]
    at = before.index(codes)
    path.write_bytes(before[:at] + b"\x78" + before[at + 1 :])
    assert f"{name.removesuffix('.weight')} is beyond 240" in run()
    path.write_bytes(before)
    driver.write_text(original.replace("base.save_quantized_state_dict = classmethod(kept)", "pass"))
    assert run()
    assert path.read_bytes() == b"quantised once more"


def archive(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "x" * 100)


def config(**change: object) -> Callable[[Path], object]:
    def write(out: Path) -> None:
        said = json.loads((out / "neuron_config.json").read_text())
        said["neuron_config"] |= change
        (out / "neuron_config.json").write_text(json.dumps(said))

    return write


def flipped(path: Path, word: bytes) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(word, bytes([word[0] ^ 1]) + word[1:], 1))


SHARD = "weights/tp1_sharded_checkpoint.safetensors"
WRONG: dict[str, Callable[[Path], object]] = {
    "an empty model": lambda out: (out / "model.pt").write_bytes(b""),
    "a cut model": lambda out: (out / "model.pt").write_bytes((out / "model.pt").read_bytes()[:-9]),
    "bits of the model": lambda out: flipped(out / "model.pt", b"stand-in"),
    "another archive": lambda out: archive(out / "model.pt", "model/version", "model/code.py"),
    "a shard missing": lambda out: (out / SHARD).unlink(),
    "a cut shard": lambda out: (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1]),
    "a longer shard": lambda out: (out / SHARD).write_bytes((out / SHARD).read_bytes() + b"x"),
    "a shard of nothing": lambda out: (out / SHARD).write_bytes(b"\2\0\0\0\0\0\0\0{}"),
    "something beside shards": lambda out: (out / "weights" / "tp9.tmp").touch(),
    "no config": lambda out: (out / "neuron_config.json").unlink(),
    "a config that is none": lambda out: (out / "neuron_config.json").write_text("{"),
    "a config of other cores": config(tp_degree=4),
    "a config of another length": config(seq_len=64),
    "a config of other numbers": config(torch_dtype="float32"),
    "a config without FP8": config(quantized=False),
    "a config that excludes attention": config(modules_to_not_convert=["lm_head", "self_attn"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the compiler wrote in FP8 for two cores."""
    folder = tmp_path_factory.mktemp("whole")
    of("llama", folder / "model")
    assert compiled(folder / "model", folder / "out", neuron_in(folder), "--quant", "fp8", "--tp", "2") == 0
    return folder / "out"


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_driver_may_miss_is_judged_again(wrong: str, whole: Path, tmp_path: Path) -> None:
    said = manifest.read(whole)
    terms = Terms(said["platform"], said["settings"], said["facts"])
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    log = (out / "compile.log").read_text()
    assert ADAPTER.judge(terms, out, log)["shards"] == 2
    WRONG[wrong](out)
    with pytest.raises(VerifyFailed):
        ADAPTER.judge(terms, out, log)


def test_words_of_success_are_demanded(whole: Path) -> None:
    said = manifest.read(whole)
    with pytest.raises(VerifyFailed, match="without a word"):
        ADAPTER.judge(Terms(said["platform"], said["settings"], said["facts"]), whole, "Compiling and saving model...")


def test_a_hand_off_as_source_is_judged_and_put_together_anew(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(whole, first)
    assert main(["convert", str(first), "neuron", "-o", str(second), "--quiet"]) == 0
    assert {k: v for k, v in tree_digest(first).items() if k != manifest.NAME} == {
        k: v for k, v in tree_digest(second).items() if k != manifest.NAME
    }
    assert main(["convert", str(first), "rk", "-o", str(tmp_path / "third"), "--quiet"]) == 3
    (first / SHARD).write_bytes(b"")
    assert main(["check", str(first)]) == 4
    assert main(["convert", str(first), "neuron", "-o", str(tmp_path / "third"), "--quiet"]) == 4
    assert "0 bytes" in capsys.readouterr().err
    assert left(tmp_path) == {"first", "second"}


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
    assert (elsewhere / "out" / SHARD).is_file()


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
