"""FORMAT neuron for a chip, when it fails: half a toolchain, failures of inference_demo, files that are not whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.cli import main
from dconv.errors import VerifyFailed
from dconv.hw import manifest
from dconv.hw.neuron import ADAPTER
from dconv.hw.target import Terms
from tests.hw.conftest import neuron_in
from tests.hw.neuron import compiled, left, of
from tests.models import tensors, tree_digest


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


@pytest.mark.parametrize(("field", "value"), [(8, 8), (8, 12), (8, 14), (6, 1), (6, 0x40), (8, 99)])
def test_an_archive_of_damaged_fields_is_none(field: int, value: int, whole: Path, tmp_path: Path) -> None:
    """Of each record: how it is packed, and whether it is encrypted, where zipfile looks."""
    said = manifest.read(whole)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "model.pt"
    data = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x03\x04", field), (b"PK\x01\x02", field + 2)):
        place = data.find(magic)
        while place >= 0:
            data[place + at] = value
            place = data.find(magic, place + 1)
    path.write_bytes(bytes(data))
    with pytest.raises(VerifyFailed, match=r"torch\.jit|is damaged"):
        ADAPTER.judge(Terms(said["platform"], said["settings"], said["facts"]), out, (out / "compile.log").read_text())


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


def test_what_a_killed_run_left_is_in_nobodys_way(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "out.compile-again" / "weights").mkdir(parents=True)
    (tmp_path / "out.compile-again" / "model.pt").write_bytes(b"half")
    assert main(["convert", str(whole), "neuron", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    assert manifest.checked(tmp_path / "out")["files"].keys() == manifest.read(whole)["files"].keys()
    assert left(tmp_path) == {"out"}


def test_a_manifest_that_lacks_what_is_judged_by_is_said(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {key: value for key, value in manifest.read(whole).items() if key not in ("files", "dconv")}
    del said["settings"]["tp_degree"]
    shutil.copytree(whole, tmp_path / "out")
    manifest.write(tmp_path / "out", said)
    assert main(["check", str(tmp_path / "out")]) == 4
    assert "'tp_degree' among its settings and facts" in capsys.readouterr().err


def test_a_folder_of_a_persons_own_stays_when_an_output_is_replaced(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "mine").touch()
    told = ["convert", str(whole), "neuron", "-o", str(tmp_path / "out"), "--quiet"]
    assert main(told) == 0
    assert main([*told, "--overwrite"]) == 0
    assert (tmp_path / "out.replaced" / "mine").exists()
    assert left(tmp_path) == {"out", "out.replaced"}


def test_an_output_stays_where_the_new_one_cannot_take_its_place(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["convert", str(whole), "neuron", "-o", str(tmp_path / "out"), "--quiet"]
    assert main(told) == 0
    before, replace = tree_digest(tmp_path / "out"), os.replace

    def failing(old: Path, new: Path) -> None:
        if Path(old).name == "out.compile-again":
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    assert main([*told, "--overwrite"]) == 5
    assert tree_digest(tmp_path / "out") == before
    assert left(tmp_path) == {"out"}
