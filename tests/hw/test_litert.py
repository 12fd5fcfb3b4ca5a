"""LiteRT's driver: a .tflite computes what transformers does, and a failed compilation leaves nothing that passes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.oracles import hf

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venvs" / "litert" / "bin" / "python"
DRIVER = ROOT / "dconv" / "hw" / "drivers" / "litert_driver.py"
SMOLLM2 = ROOT / "work" / "quickstart" / "smollm2"
PAST, SEQUENCE = 5, 8

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no LiteRT: bash scripts/toolchains.sh litert")


def drive(verb: str, folder: Path, job: dict[str, Any] | None = None, packages: Path | None = None) -> Any:
    """The driver's process; ``packages`` come before those of the environment."""
    argv = [str(PYTHON), str(DRIVER), verb]
    if job is not None:
        (folder / "job.json").write_text(json.dumps(job))
        argv.append(str(folder / "job.json"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    return subprocess.run(argv, cwd="/", env=environment, capture_output=True, text=True, timeout=300)


def compiled(model: Path, folder: Path, **settings: object) -> dict[str, Any]:
    """The driver's answer on a model, into ``folder/out``."""
    folder.mkdir(parents=True, exist_ok=True)
    source = os.path.relpath(model, folder)
    job = {"source": {"hf": source}, "out": "out", "platform": "MT6991", "settings": settings}
    done = drive("compile", folder, job)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dconv-progress 4/4" in done.stdout
    answer = json.loads((folder / "out" / "result.json").read_text())
    assert answer["files"] == ["model.tflite"] and (folder / "out" / "model.tflite").read_bytes()[4:8] == b"TFL3"
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["model.tflite", "result.json"]
    return answer


def ran(folder: Path, given: dict[str, NDArray[Any]], signature: str | None = None) -> dict[str, NDArray[Any]]:
    """What ``folder/out/model.tflite`` says in LiteRT on the CPU."""
    np.savez(folder / "inputs.npz", **given)  # pyright: ignore[reportArgumentType]
    job = {"source": {"artifact": "out/model.tflite", "inputs": "inputs.npz"}, "out": "ran",
           "settings": {} if signature is None else {"signature": signature}}  # fmt: skip
    done = drive("run", folder, job)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "ran" / "outputs.npz") as said:
        return dict(said)


def inputs(vocabulary: int, layers: int = 0, heads: int = 0, width: int = 0, length: int = SEQUENCE) -> dict[str, Any]:
    """As dconv's graphs have them, the first two tokens of the past hidden; without layers no past."""
    random = np.random.default_rng(length)
    past = PAST if layers else 0
    mask = np.ones((1, past + length), np.int64)
    mask[:, : min(past, 2)] = 0
    given: dict[str, Any] = {
        "input_ids": random.integers(0, vocabulary, (1, length)),
        "attention_mask": mask,
        "position_ids": np.arange(past, past + length)[None],
    }
    for number in range(layers):
        for name in ("key", "value"):
            shape = (1, heads, past, width)
            given[f"past_key_values.{number}.{name}"] = random.standard_normal(shape).astype(np.float32)
    return given


def expected(model: Any, given: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """What transformers says to the same."""
    import torch
    from transformers import DynamicCache

    cache = None
    if layers := sum(name.endswith(".key") for name in given):
        cache = DynamicCache()
        for number in range(layers):
            keys, values = (torch.tensor(given[f"past_key_values.{number}.{name}"]) for name in ("key", "value"))
            cache.update(keys, values, number)
    tensors = {name: torch.tensor(given[name]) for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        said = model(**tensors, past_key_values=cache, use_cache=cache is not None)
    found = {"logits": said.logits.numpy()}
    for number in range(layers):
        layer = said.past_key_values.layers[number]
        found[f"present.{number}.key"], found[f"present.{number}.value"] = layer.keys.numpy(), layer.values.numpy()
    return found


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer: LiteRT's converter takes seconds for each."""
    return hf.save(hf.tiny("llama", num_hidden_layers=1)[1], tmp_path_factory.mktemp("litert") / "llama")


@pytest.fixture(scope="module")
def cached(layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the .tflite of a small Llama, for several tokens and for one, over a past."""
    folder = tmp_path_factory.mktemp("litert")
    answer = compiled(layer, folder, sequence=[SEQUENCE, 1], past=PAST)
    assert answer["evidence"]["signatures"] == [f"sequence_{SEQUENCE}", "sequence_1"]
    return folder


def loaded(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_probe_says_what_is_really_there() -> None:
    done = drive("probe", Path())
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["complete"] and not said["lacks"] and said["version"] == "0.10.0"
    assert all(said["libraries"].values())
    assert not said["aot"]["v8"]["complete"] and "ai_edge_litert_sdk_mediatek" in said["aot"]["v8"]["lacks"]


@pytest.mark.parametrize("length", [SEQUENCE, 1])
def test_logits_and_cache_are_transformers_s(layer: Path, cached: Path, length: int) -> None:
    model = loaded(layer)
    config = model.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    given = inputs(config.vocab_size, config.num_hidden_layers, heads, width, length)
    said, meant = ran(cached, given, f"sequence_{length}"), expected(model, given)
    assert set(said) == set(meant)
    for name, values in meant.items():
        assert said[name].shape == values.shape
        assert np.abs(said[name] - values).max() < 1e-4, name


def test_both_signatures_share_the_weights(layer: Path, cached: Path) -> None:
    answer = json.loads((cached / "out" / "result.json").read_text())
    parameters = sum(tensor.numel() for tensor in loaded(layer).parameters())
    assert 4 * parameters <= answer["evidence"]["weights"]["FLOAT32"] < 4 * parameters * 1.1


@pytest.mark.long
def test_int8_weights_without_a_past(layer: Path, tmp_path: Path) -> None:
    answer = compiled(layer, tmp_path, sequence=SEQUENCE, weights="int8")
    model = loaded(layer)
    given = inputs(model.config.vocab_size)
    said, meant = ran(tmp_path, given)["logits"], expected(model, given)["logits"]
    assert answer["evidence"]["weights"]["INT8"] > 20 * answer["evidence"]["weights"].get("FLOAT32", 0)
    assert 1e-6 < np.abs(said - meant).max() < 0.05 * np.abs(meant).max()


@pytest.mark.parametrize("wrong", ["lacks", "adds", "shape", "type", "signature", "empty"])
def test_wrong_inputs_are_not_run(layer: Path, cached: Path, tmp_path: Path, wrong: str) -> None:
    config = loaded(layer).config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    given = inputs(config.vocab_size, config.num_hidden_layers, heads, width)
    artifact, signature = cached / "out" / "model.tflite", f"sequence_{SEQUENCE}"
    if wrong == "lacks":
        del given["position_ids"]
    elif wrong == "adds":
        given["token_type_ids"] = given["input_ids"]
    elif wrong == "shape":
        given["input_ids"] = given["input_ids"][:, :-1]
    elif wrong == "type":
        given["input_ids"] = given["input_ids"] + (1 << 40)
    elif wrong == "signature":
        signature = None
    else:
        artifact = tmp_path / "model.tflite"
        artifact.touch()
    np.savez(tmp_path / "inputs.npz", **given)
    settings = {"signature": signature} if signature else {}
    job = {"source": {"artifact": str(artifact), "inputs": "inputs.npz"}, "out": "ran", "settings": settings}
    done = drive("run", tmp_path, job)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("litert: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrong", ["missing", "quantised", "pickle", "unknown", "settings", "earlier"])
def test_what_is_not_converted(llama: Path, tmp_path: Path, wrong: str) -> None:
    from safetensors.numpy import load_file, save_file

    model, settings = tmp_path / "model", {"sequence": SEQUENCE}
    model.mkdir()
    config = json.loads((llama / "config.json").read_text())
    tensors = load_file(llama / "model.safetensors")
    words = {"missing": "missing keys", "quantised": "quantised", "pickle": ".safetensors", "unknown": "model_type",
             "settings": "no such thing", "earlier": "earlier result"}[wrong]  # fmt: skip
    if wrong == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif wrong == "quantised":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    elif wrong == "unknown":
        config |= {"model_type": "of_its_own", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
        (model / "modeling.py").write_text("raise SystemExit(0)")
    elif wrong == "settings":
        settings["sequnce"] = 3
    elif wrong == "earlier":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "result.json").write_text("{}")
    (model / "config.json").write_text(json.dumps(config))
    save_file(tensors, model / ("model.bin" if wrong == "pickle" else "model.safetensors"), {"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    job = {"source": {"hf": "model"}, "out": "out", "platform": "", "settings": settings}
    done = drive("compile", tmp_path, job)
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.tflite"))
    assert {path.name for path in set(tmp_path.rglob("*")) - set(before)} <= {"job.json", "out"}


def sdk(folder: Path, adapter: bytes | None) -> Path:
    """The package as its build leaves it, with a library or with none."""
    package = folder / "packages" / "ai_edge_litert_sdk_mediatek"
    libraries = package / "data" / "v8_0_10" / "host" / "lib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import pathlib\n"
        "def path_to_sdk_libs(version='v8'):\n"
        "    data = pathlib.Path(__file__).parent / 'data'\n"
        "    return data / {'v8': 'v8_0_10/host/lib', 'v9': 'v9_0_3/host/lib'}[version] if data.is_dir() else None\n"
    )
    if adapter is not None:
        libraries.mkdir(parents=True)
        (libraries / "libneuron_adapter.so").write_bytes(adapter)
    return folder / "packages"


#: It has what the probe looks for, and no loader takes it.
FORGED = b"\x7fELF" + b"\0" * 60 + b"NeuronCompilation_create\0"


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("no package", "the package ai_edge_litert_sdk_mediatek"),
        (None, "without its download"),
        (b"", "no library with"),
        (b"\x7fELF" + b"\0" * 4096, "no library with"),
        pytest.param(FORGED, "compiler failed for MediaTek_MT6991", marks=pytest.mark.long),
    ],
    ids=["no package", "no download", "0 bytes", "another library", "forged"],
)
def test_compiling_ahead_of_time_without_the_sdk_leaves_nothing(
    layer: Path, tmp_path: Path, adapter: Any, words: str
) -> None:
    packages = None if adapter == "no package" else sdk(tmp_path, adapter)
    job = {"source": {"hf": str(layer)}, "out": "out", "platform": "MT6991",
           "settings": {"sequence": SEQUENCE, "aot": True, "check": False}}  # fmt: skip
    done = drive("compile", tmp_path, job, packages)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_platform_that_litert_does_not_know(llama: Path, tmp_path: Path) -> None:
    job = {"source": {"hf": str(llama)}, "out": "out", "platform": "MT9999", "settings": {"aot": True}}
    done = drive("compile", tmp_path, job)
    assert done.returncode == 1 and "MT6991" in done.stderr.splitlines()[-1]


def test_what_a_compiler_made_is_judged_by_its_operators(cached: Path, tmp_path: Path) -> None:
    argv = [PYTHON, Path(__file__).with_name("litert_vendor.py"), cached / "out" / "model.tflite", tmp_path]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    passed = {name: answer for name, (answer, exists) in said.items() if exists}
    assert set(passed) == {"whole", "whole, cpu_ops", "partly, cpu_ops"}
    assert passed["whole"]["operators_on_cpu"] == 0 and passed["partly, cpu_ops"]["operators_on_cpu"] == 3
    words = {"partly": "stay on the CPU", "untouched": "nothing in it was compiled", "empty": "empty or absent",
             "cut": "damaged", "other": "no .tflite", "absent": "empty or absent", "failed": "failed for MediaTek",
             "two": "expected 1"}  # fmt: skip
    for name, word in words.items():
        assert word in said[name][0], (name, said[name])


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mixtral"])
def test_other_families(tmp_path: Path, name: str) -> None:
    path = hf.save(hf.tiny(name, num_hidden_layers=2)[1], tmp_path / name)
    compiled(path, tmp_path, sequence=SEQUENCE)
    model = loaded(path)
    given = inputs(model.config.vocab_size)
    said, meant = ran(tmp_path, given)["logits"], expected(model, given)["logits"]
    assert np.abs(said - meant).max() < 1e-4


@pytest.mark.long
@pytest.mark.skipif(not SMOLLM2.exists(), reason="no SmolLM2: bash scripts/quickstart.sh")
def test_two_layers_of_a_trained_model(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(SMOLLM2)
    config.num_hidden_layers, config.layer_types = 2, None
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, config=config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    compiled(tmp_path / "model", tmp_path, sequence=SEQUENCE, past=PAST)
    given = inputs(config.vocab_size, 2, config.num_key_value_heads, config.head_dim)
    said, meant = ran(tmp_path, given), expected(model, given)
    for key, values in meant.items():
        assert np.abs(said[key] - values).max() < 1e-4 * max(1.0, float(np.abs(values).max())), key
