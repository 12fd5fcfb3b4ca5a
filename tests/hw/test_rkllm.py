"""FORMAT rk, language models: RKLLM's contract held by a stand-in, and each way in which a compiler can fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dconv.cli import main
from dconv.hw import manifest
from tests.models import tree_digest

ROOT = Path(__file__).parents[2]


def rk(model: Path, out: Path, python: Path | None, *options: str, chip: str = "RK3588") -> int:
    told = ["--toolchain-python", str(python)] if python else []
    return main(["convert", str(model), "rk", "--platform", chip, "-o", str(out), "--quiet", *told, *options])


def left(folder: Path) -> set[str]:
    """What a run left, the toolchain and the model aside."""
    return {path.name for path in folder.iterdir()} - {"python", "toolchain"}


def record(out: Path) -> dict[str, object]:
    return json.loads((out / "model.rkllm").read_text().removeprefix("RKLLM stand-in "))


def test_what_is_compiled_is_listed_with_its_evidence(llama: Path, rkllm: Path, tmp_path: Path) -> None:
    assert rk(llama, tmp_path / "out", rkllm) == 0
    said = manifest.checked(tmp_path / "out")
    assert (said["kind"], said["target"], said["platform"]) == ("compiled", "rk", "RK3588")
    assert set(said["files"]) == {"model.rkllm", "result.json", "compile.log"}
    assert said["evidence"]["returned"] == {"load": 0, "build": 0, "export": 0}
    assert said["toolchain"]["version"] == "1.3.0"
    assert record(tmp_path / "out")["texts"] == said["settings"]["nsamples"] == 20
    assert left(tmp_path) == {"out"}


@pytest.mark.parametrize("chip", ["RK3588", "RK3576", "RK3562"])
@pytest.mark.parametrize("dtype", ["fp16", "w8a8", "w8a8_g128", "w4a16", "w4a16_g32"])
def test_pairs_are_those_of_the_toolkit(chip: str, dtype: str, llama: Path, rkllm: Path, tmp_path: Path) -> None:
    possible = dtype in ("fp16", "w8a8") or (chip == "RK3588") == dtype.startswith("w8a8_g")
    assert rk(llama, tmp_path / "out", rkllm, "--quant", dtype, chip=chip) == (0 if possible else 3)
    if possible:
        assert record(tmp_path / "out")["platform"] == chip.lower()
    else:
        assert left(tmp_path) == set()


def test_a_settings_file_says_the_same_as_options(llama: Path, rkllm: Path, tmp_path: Path) -> None:
    config = tmp_path / "rk.yaml"
    config.write_text("platform: RK3576\ndtype: w4a16_g64\nmax_context: 8192\nnpu_cores: 2\nnsamples: 4\nseqlen: 32\n")
    told = ["-o", str(tmp_path / "out"), "--quiet", "--toolchain-python", str(rkllm)]
    assert main(["convert", str(llama), "hf2rk", "--quantization-config", str(config), *told]) == 0
    found = record(tmp_path / "out")
    assert [found[key] for key in ("platform", "dtype", "context", "cores", "texts")] == [
        "rk3576",
        "w4a16_g64",
        8192,
        2,
        4,
    ]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--platform", "RK9999"], 2, "compiles for one chip"),
        (["--platform", "RK3588", "--quant", "w4a4"], 2, "did you mean w4a16"),
        (["--platform", "RK3588", "--quantization-config", '{"max_contxt": 64}'], 2, "did you mean max_context"),
        (["--platform", "RK3588", "--quantization-config", '{"max_context": 7}'], 2, "from 32 to 16384"),
        (["--platform", "RK3562", "--quantization-config", '{"npu_cores": 3}'], 2, "1 at most"),
        (["--platform", "RK3588", "--quantization-config", '{"platform": "RK3576"}'], 2, "two chips"),
        (["--platform", "RK3588", "--tp", "2"], 2, "no such layout"),
        ([], 2, "none is named"),
        (["--platform", "RK3588", "--toolchain-python", "no-such-python"], 2, "no interpreter"),
        (["--platform", "RK3588", "--toolchain-python", "/bin/false"], 7, "does not answer"),
        (["--platform", "RK3588", "--max-host-memory", "1MB"], 3, "about 0.0 GB"),
        (["--platform", "RK3588", "--fake-weight"], 2, "handed weights that are there"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: list[str],
    code: int,
    words: str,
    llama: Path,
    rkllm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = [] if "--toolchain-python" in options else ["--toolchain-python", str(rkllm)]
    assert main(["convert", str(llama), "rk", "-o", str(tmp_path / "out"), *own, *options]) == code
    assert words in capsys.readouterr().err
    assert left(tmp_path) == set()


def test_bert_is_no_language_model(tmp_path: Path, rkllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.oracles import hf

    hf.save(hf.tiny("bert", num_hidden_layers=1)[1], tmp_path / "bert")
    told = ["--quantization-config", '{"toolkit": "rkllm"}']
    assert rk(tmp_path / "bert", tmp_path / "out", rkllm, *told) == 3
    assert "language models" in capsys.readouterr().err


@pytest.mark.parametrize("half", ["none", "no module", "no libraries", "empty library"])
def test_half_a_toolchain_is_none(
    half: str, llama: Path, rkllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages = tmp_path / "toolchain"
    if half == "none":
        shutil.rmtree(packages)
    elif half == "no module":
        shutil.rmtree(packages / "rkllm")
    elif half == "no libraries":
        (packages / "rkllm" / "librkllm.so").unlink()
    else:
        (packages / "rkllm" / "librkllm.so").write_bytes(b"")
    assert rk(llama, tmp_path / "out", rkllm) == 7
    assert "--bundle" in capsys.readouterr().err
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("fails", "code", "words"),
    [
        ("load", 7, "Not support LlamaForCausalLM"),
        ("build", 7, "Catch exception"),
        ("export", 7, "export returned -1"),
        ("crash", 7, "exit code 134"),
        ("hang", 7, "longer than it may"),
        ("nothing", 7, "wrote nothing"),
        ("empty", 7, "wrote nothing"),
        ("full", 5, "No space left"),
        ("lies", 6, "0 bytes"),
        ("silent", 6, "said nothing of its work"),
        ("codes", 6, "each step"),
    ],
)
def test_a_failure_leaves_its_log_and_nothing_that_looks_good(
    fails: str, code: int, words: str, llama: Path, rkllm: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    if fails in ("lies", "silent", "codes"):  # a driver that is broken itself must not be believed either
        monkeypatch.setattr("dconv.hw.driver.FOLDER", broken_driver(fails, tmp_path / "toolchain"))
    assert rk(llama, tmp_path / "out", rkllm, "--toolchain-timeout", "3" if fails == "hang" else "60") == code
    assert words in capsys.readouterr().err
    assert left(tmp_path) == {"out.compile.log"}


def broken_driver(fails: str, folder: Path) -> Path:
    real = (ROOT / "dconv/hw/drivers/rkllm_driver.py").read_text()
    changes = {
        "lies": ('    print("dconv-progress 3/3', '    open(target, "w").close()\n    print("dconv-progress 3/3'),
        "silent": ('os.path.join(out, "result.json")', 'os.devnull'),
        "codes": ('{"returned": returned}', '{"returned": {"load": 0}}'),
    }  # fmt: skip
    old, new = changes[fails]
    assert old in real
    folder.mkdir(exist_ok=True)
    (folder / "rkllm_driver.py").write_text(real.replace(old, new))
    return folder


def test_a_bundle_is_whole_elsewhere(llama: Path, rkllm: Path, tmp_path: Path) -> None:
    assert rk(llama, tmp_path / "bundle", None, "--bundle") == 0
    assert manifest.checked(tmp_path / "bundle")["kind"] == "bundle"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "bundle", elsewhere)
    done = subprocess.run(
        ["bash", str(elsewhere / "compile.sh")], env={**os.environ, "TOOLCHAIN_PYTHON": str(rkllm)}, cwd="/",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "dconv-progress 3/3" in done.stdout
    assert record(elsewhere / "out")["texts"] == 20
    weights = elsewhere / "hf" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert subprocess.run(["bash", str(elsewhere / "compile.sh")], capture_output=True, check=False).returncode


def test_any_number_of_ranks_writes_the_same_bundle(llama: Path, tmp_path: Path) -> None:
    digests = []
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        told = ["--platform", "RK3588", "--bundle", "--nproc", str(ranks), "-o", str(out), "--quiet"]
        subprocess.run([sys.executable, "-m", "dconv", "convert", str(llama), "rk", *told], check=True, cwd=ROOT)
        digests.append({name: one for name, one in tree_digest(out).items() if name.endswith((".safetensors", ".sh"))})
        assert left(tmp_path) == {str(number) for number in range(1, ranks + 1)}
    assert digests[0] == digests[1] == digests[2] != {}


def test_mup_is_folded_once_and_recorded(minicpm: Path, rkllm: Path, tmp_path: Path) -> None:
    assert rk(minicpm, tmp_path / "out", rkllm, "--quant", "fp16") == 0
    assert manifest.read(tmp_path / "out")["facts"]["mup"] == "folded"
    config = record(tmp_path / "out")["config"]
    assert isinstance(config, dict)
    assert config["model_type"] == "llama"
    assert not {"scale_emb", "scale_depth", "dim_model_base"} & set(config)


def test_an_output_is_replaced_only_where_that_was_said(
    llama: Path, rkllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert rk(llama, out, rkllm) == 0
    before = (out / "manifest.json").stat().st_mtime_ns
    assert rk(llama, out, rkllm) == 2
    assert rk(llama, out, rkllm, "--resume") == 0
    assert (out / "manifest.json").stat().st_mtime_ns == before
    assert rk(llama, out, rkllm, "--overwrite", "--quant", "fp16") == 0
    assert manifest.read(out)["settings"]["dtype"] == "fp16"
    assert rk(llama, tmp_path / "no" / "such" / "out", rkllm) == 5
    assert rk(llama, tmp_path / "no" / "such" / "out", rkllm, "--bundle") == 5
    assert not (tmp_path / "no").exists()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").touch()
    assert rk(llama, theirs, rkllm, "--overwrite") == 2
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]


def test_a_run_is_not_resumed_as_what_another_made(llama: Path, rkllm: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("\n".join(f"passage {number} says {number + 1}" for number in range(4000)))
    asked = ("--resume", "--calibration", str(texts))
    assert rk(llama, out, rkllm, "--calibration", str(texts)) == 0
    made = manifest.read(out)
    assert rk(llama, out, rkllm, *asked) == 0
    assert rk(llama, out, rkllm, "--resume") == 2, "of the text that ships"
    assert rk(llama, out, rkllm, *asked, "--bundle") == 2, "compiled already"
    texts.write_text(texts.read_text().replace("says", "told"))
    assert rk(llama, out, rkllm, *asked) == 2, "of other words under the same name"
    assert manifest.read(out) == made
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    assert rk(model, tmp_path / "other", rkllm) == 0
    assert rk(model, tmp_path / "other", rkllm, "--resume") == 0
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert rk(model, tmp_path / "other", rkllm, "--resume") == 2, "of weights that changed"


def test_told_to_stop_it_goes_on_at_the_compiler(llama: Path, rkllm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = ["--platform", "RK3588", "-o", str(out), "--quiet", "--toolchain-python", str(rkllm)]
    run = subprocess.Popen(
        [sys.executable, "-m", "dconv", "convert", str(llama), "rk", *told], cwd=ROOT,
        env={**os.environ, "STAND_IN_FAILS": "hang"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "building" not in (log.read_text() if (log := tmp_path / "out.compile.log").exists() else ""):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 75
    (work,) = tmp_path.glob("out.compile-*")
    before = (work / "hf" / "model.safetensors").stat().st_mtime_ns
    assert rk(llama, out, rkllm, "--bundle") == 0
    assert (out / "hf" / "model.safetensors").stat().st_mtime_ns == before
    assert left(tmp_path) == {"out"}


def test_a_hand_off_as_source_is_judged_and_put_together_anew(
    llama: Path, rkllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert rk(llama, first, rkllm) == 0
    assert main(["convert", str(first), "rk", "-o", str(second), "--quiet"]) == 0
    assert tree_digest(first)["model.rkllm"] == tree_digest(second)["model.rkllm"]
    assert manifest.checked(second)["evidence"] == manifest.read(first)["evidence"]
    (first / "model.rkllm").write_bytes(b"")
    assert main(["convert", str(first), "rk", "-o", str(tmp_path / "third"), "--quiet"]) == 4
    assert "0 bytes" in capsys.readouterr().err
    assert left(tmp_path) == {"first", "second"}
