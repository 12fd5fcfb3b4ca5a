"""FORMAT qnn by the QAIRT SDK: graphs that Genie runs compute the model's logits; the SDK's contract by a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dconv.cli import main
from dconv.describe import describe_model
from dconv.errors import DconvError, StorageFault, ToolMissing, VerifyFailed
from dconv.hw import finish, manifest
from dconv.hw.drivers.qnn_driver import CHIPS as KNOWN
from dconv.hw.hexagon import CHIPS
from dconv.hw.qnn import ADAPTER
from dconv.hw.target import Ask
from dconv.request import Request
from tests.hw.conftest import STAND_INS
from tests.hw.genie import Genie
from tests.hw.test_static_compilers import DRIVERS, ROOT, needs
from tests.oracles import hf

PREFILL, CONTEXT, VOCABULARY = 8, 24, 320
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
HOST = "x86_64-linux-clang"


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {}}}')
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qairt") / "llama"
    return with_tokenizer(hf.save(hf.tiny("llama", num_hidden_layers=2, rope_parameters=LLAMA3)[1], folder))


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is compiled, in half precision."""
    out = tmp_path_factory.mktemp("qairt") / "bundle"
    assert hand(model, out, "--bundle") == 0
    return out


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An SDK, as far as anyone can see."""
    root = tmp_path / "qairt" / "2.48.40"
    tools, libraries = root / "bin" / HOST, root / "lib" / HOST
    for folder in (tools, libraries, root / "lib/python/qti/aisw/converters"):
        folder.mkdir(parents=True)
    for name in ("qairt-converter", "qairt-quantizer", "qnn-context-binary-generator", "qnn-context-binary-utility"):
        shutil.copy(STAND_INS / "qairt" / "tools.py", tools / name)
    for name in ("QnnHtp", "HtpPrepare", "QnnHtpNetRunExtensions", "QnnModelDlc", "QnnSystem"):
        (libraries / f"lib{name}.so").write_bytes(b"\x7fELF stand-in")
    (root / "sdk.yaml").write_text("product: qairt\nversion: 2.48.40\nbuild_id: 260702151143\n")
    monkeypatch.setenv("QNN_SDK_ROOT", str(root))
    monkeypatch.delenv("QAIRT_SDK_ROOT", raising=False)
    return root


@pytest.fixture(autouse=True)
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QNN_SDK_ROOT", "QAIRT_SDK_ROOT"):
        monkeypatch.delenv(name, raising=False)


def hand(model: Path, out: Path, *options: str, chip: str = "SM8750", **settings: object) -> int:
    said = {"toolkit": "qairt", "prefill": PREFILL, "context": CONTEXT, **settings}
    told = ["--platform", chip, "-o", str(out), "--quantization-config", json.dumps(said), "--quiet"]
    return main(["convert", str(model), "qnn", *told, "--toolchain-python", sys.executable, *options])


def expected(model: Path, tokens: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return net(torch.tensor([tokens])).logits[0].numpy()


def text(length: int) -> list[int]:
    return np.random.default_rng(0).integers(0, VOCABULARY, length).tolist()


def test_graphs_over_one_cache_compute_the_model(model: Path, bundle: Path) -> None:
    require_logits(model, bundle)


@pytest.mark.long
def test_a_part_of_each_head_turns(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    phi = with_tokenizer(hf.save(hf.tiny("phi3", num_hidden_layers=2, rope_parameters=rope)[1], tmp_path / "phi"))
    assert hand(phi, tmp_path / "out", "--bundle") == 0
    require_logits(phi, tmp_path / "out")


def require_logits(model: Path, bundle: Path) -> None:
    tokens = text(19)
    genie, wanted = Genie(bundle), expected(model, tokens)
    found = np.concatenate([genie.logits(tokens[:13]), *(genie.logits([token]) for token in tokens[13:])])
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@needs("qnn")
@pytest.mark.parametrize("graph", ["prompt", "token"])
def test_the_compiler_of_the_other_toolkit_leaves_nothing_of_a_graph_to_the_cpu(
    graph: str, bundle: Path, tmp_path: Path
) -> None:
    job = {"source": {"onnx": str(bundle / graph / "model.onnx")}, "out": "out", "platform": "SM8750",
           "settings": {"dtype": "fp16"}}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    told = [ROOT / ".venvs/qnn/bin/python", DRIVERS / "qnn_driver.py", "compile", tmp_path / "job.json"]
    done = subprocess.run(told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out/result.json").read_text())["evidence"]
    assert said["operators"] == {"EPContext": 1}
    assert said["inputs"]["position_ids_cos"][3] == 8


@pytest.mark.long
@pytest.mark.usefixtures("sdk")
def test_a_bundle_for_genie_in_half_precision(model: Path, tmp_path: Path) -> None:
    out = tmp_path / 'a "name" \\ of & its $own'  # which a file of JSON has to say
    assert hand(model, out) == 0
    said = manifest.checked(out)
    assert said["toolchain"]["words"] == "QAIRT 2.48.40"
    assert said["settings"]["toolkit"] == "qairt"
    graphs = ["prompt_ar8_cl24_1_of_1", "token_ar1_cl24_1_of_1"]
    assert said["evidence"]["graphs"] == graphs
    dialog = json.loads((out / "genie_config.json").read_text())["dialog"]
    assert (dialog["context"]["size"], dialog["context"]["n-vocab"]) == (CONTEXT, VOCABULARY)
    assert (dialog["context"]["bos-token"], dialog["context"]["eos-token"]) == (1, 2)
    binaries = dialog["engine"]["model"]["binary"]["ctx-bins"]
    assert all((out / name).stat().st_size for name in binaries)
    scaling = dialog["engine"]["model"]["positional-encoding"]["rope-scaling"]
    assert scaling["factor"] == 32.0  # the model's, no constant
    htp = json.loads((out / "htp_backend_ext_config.json").read_text())
    assert (htp["devices"][0]["soc_model"], htp["devices"][0]["dsp_arch"]) == (69, "v79")
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert main(["check", str(out)]) == 0


def ids(tmp_path: Path) -> str:
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(1).integers(0, VOCABULARY, 200))
    return str(path)


def test_codes_of_the_cache_are_the_same_for_both_graphs(model: Path, sdk: Path, tmp_path: Path) -> None:
    told = ("--quant", "w8a16", "--calibration", ids(tmp_path))
    assert hand(model, tmp_path / "bundle", "--bundle", *told, nsamples=2) == 0
    codes = json.loads((tmp_path / "bundle/encodings.json").read_text())["activation_encodings"]
    genie = Genie(tmp_path / "bundle")
    tokens = np.load(tmp_path / "ids.npy").tolist()
    genie.logits(tokens[:20])
    for name, held in genie.cache.items():
        (one,), (out,) = codes[name], codes[name.replace("_in", "_out")]
        assert one == out
        assert (one["bitwidth"], one["offset"], one["is_symmetric"]) == (8, -128, "True")
        assert 127 * one["scale"] == pytest.approx(one["max"])
        assert 0.3 * np.abs(held).max() < one["max"] < 3 * np.abs(held).max()
    mask = codes["attention_mask"][0]
    assert (mask["bitwidth"], mask["min"], mask["max"]) == (16, -50.0, pytest.approx(0, abs=1e-3))
    prompt, token = (samples(tmp_path / "bundle", name) for name in ("prompt_ar8", "token_ar1"))
    assert (len(prompt), len(token)) == (4, 8)  # 16 of 20 tokens by eights, the last four one by one, of two texts
    read = [int(one) for sample in (*prompt[:2], *token[:4]) for one in sample["input_ids"].flat]
    assert all(token in tokens for token in read)
    session = genie.sessions[1]
    given = {one.name: token[3][one.name].reshape(one.shape) for one in session.get_inputs()}
    (logits,) = session.run(["logits"], {**given, "input_ids": given["input_ids"].astype(np.int32)})
    wanted = expected(model, read)[-1]
    assert np.abs(logits[0, 0] - wanted).max() < 1e-4 * np.abs(wanted).max()
    done = subprocess.run(
        ["bash", tmp_path / "bundle/compile.sh"], capture_output=True, text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "QAIRT_SDK_ROOT": str(sdk)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ports = json.loads((tmp_path / "bundle/out/model_part_1_of_1.json").read_text())["info"]["graphs"][0]["info"]
    types = {one["info"]["name"]: one["info"]["dataType"] for one in ports["graphInputs"]}
    assert types["past_value_1_in"] == "QNN_DATATYPE_UFIXED_POINT_8"


def samples(bundle: Path, graph: str) -> list[dict[str, np.ndarray]]:
    """What the list of a graph's samples names, as the quantizer reads it."""
    (path,) = (bundle / "calibration").glob(f"{graph}_*/input_list.txt")
    lines = [dict(word.split(":=") for word in line.split()) for line in path.read_text().splitlines()]
    return [{name: np.fromfile(bundle / file, "<f4") for name, file in line.items()} for line in lines]


@pytest.mark.parametrize(
    ("fails", "error", "words"),
    [
        ("crash", ToolMissing, "ERROR_OP_NOT_SUPPORTED"),
        ("hang", ToolMissing, "longer than it may"),
        ("memory", ToolMissing, "memory ran out"),
        ("full", StorageFault, "no room on the disk"),
        ("nothing", VerifyFailed, "model_part_1_of_1.bin: not there"),
        ("empty", VerifyFailed, "model_part_1_of_1.bin: 0 bytes"),
        ("one graph", VerifyFailed, "the binary has other graphs"),
        ("layout", VerifyFailed, "not those that Genie opens"),
        ("other codes", VerifyFailed, "do not agree on what the cache holds"),
        ("chip", VerifyFailed, "does not say that it is for this chip"),
        ("silent", VerifyFailed, "does not say that it is for this chip"),
        ("no graphs", VerifyFailed, "does not say what is in the binary"),
    ],
)
@pytest.mark.usefixtures("sdk")
def test_a_failure_leaves_its_log_alone(
    fails: str, error: type[DconvError], words: str, model: Path, bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    settings = {"toolkit": "qairt", "prefill": PREFILL, "context": CONTEXT}
    ask = Ask("SM8750", settings, "", Path(sys.executable), os.environ)
    handing = ADAPTER.plan(describe_model(model), Request(model, "huggingface"), ask)
    shutil.copytree(bundle, tmp_path / "work", ignore=shutil.ignore_patterns("SHA256SUMS", "manifest.json"))
    timeout = 2 if fails == "hang" else 100
    how = finish.Finish("qnn", tmp_path / "out", tmp_path / "work", {}, timeout, False, print, lambda: False)
    with pytest.raises(error, match=words):
        finish.compiled(ADAPTER, handing, ADAPTER.find(ask, handing.terms), ask, how)
    assert {path.name for path in tmp_path.iterdir()} == {"qairt", "out.compile.log"}


def said_of(bundle: Path) -> dict[str, Any]:
    """What the SDK's utility says of a binary with a bundle's graphs."""
    graphs = json.loads((bundle / "genie/metadata.json").read_text())["graphs"]
    sides = {"inputs": "graphInputs", "outputs": "graphOutputs"}
    return {
        "socModel": 69,
        "contextMetadata": {"info": {"dspArch": 79}},
        "graphs": [
            {"info": {"graphName": name, **{
                key: [{"info": {"name": port, "dimensions": one["shape"], "dataType": "QNN_DATATYPE_FLOAT_16"}}
                      for port, one in ports[side].items()] for side, key in sides.items()}}}
            for name, ports in graphs.items()
        ],
    }  # fmt: skip


def spoiled(info: dict[str, Any], how: str) -> object:
    ports = info["graphs"][0]["info"]["graphInputs"]
    cache = next(one["info"] for one in ports if one["info"]["name"].startswith("past_"))
    if how == "no object":
        return []
    if how == "metadata":
        info["contextMetadata"] = None
    elif how == "shape":
        cache["dimensions"] = None
    elif how == "codes":
        cache["quantizeParams"] = [0.5]
    elif how == "name":
        info["graphs"][0]["info"]["graphName"] = None
    return info


@pytest.mark.parametrize("how", ["whole", "no object", "metadata", "shape", "codes", "name"])
def test_words_of_another_form_are_no_evidence(how: str, model: Path, bundle: Path, tmp_path: Path) -> None:
    settings = {"toolkit": "qairt", "prefill": PREFILL, "context": CONTEXT}
    terms = ADAPTER.plan(
        describe_model(model), Request(model, "huggingface"), Ask("SM8750", settings, "", None, os.environ)
    ).terms
    shutil.copytree(bundle / "genie", tmp_path / "out")
    (tmp_path / "out/model_part_1_of_1.bin").write_bytes(b"soc_type=SM8750;arch=79")
    info = spoiled(said_of(bundle), how)
    (tmp_path / "out/model_part_1_of_1.json").write_text(json.dumps({"info": info}))
    if how == "whole":
        assert ADAPTER.judge(terms, tmp_path / "out", "")["soc_model"] == 69
        return
    with pytest.raises(VerifyFailed):
        ADAPTER.judge(terms, tmp_path / "out", "")


@pytest.mark.parametrize(
    "lacks",
    [f"bin/{HOST}/qairt-quantizer", f"lib/{HOST}/libQnnModelDlc.so", "sdk.yaml", "lib/python/qti/aisw/converters"],
)
def test_half_of_the_sdk_is_none(
    lacks: str, model: Path, sdk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sdk / lacks
    if path.is_dir():
        path.rmdir()
    elif path.suffix == ".so":
        path.write_bytes(b"")
    else:
        path.unlink()
    assert hand(model, tmp_path / "out") == 7
    assert lacks in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"qairt"}


def test_without_the_sdk_nothing_is_left(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hand(model, tmp_path / "out") == 7
    assert "QNN_SDK_ROOT" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def changed(model: Path, folder: Path, **keys: object) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("generation_config.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type default or llama3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}, "a whole number"),
        ({"sliding_window": 16}, "windows"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"eos_token_id": None}, "no token ends a text"),
    ],
)
def test_what_genie_cannot_say_of_a_model_is_refused(
    keys: dict[str, object], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hand(changed(model, tmp_path / "model", **keys), tmp_path / "out", "--bundle") == 3
    assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_positions_that_do_not_turn_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt = with_tokenizer(hf.save(hf.tiny("gpt2", num_hidden_layers=2)[1], tmp_path / "model"))
    assert hand(gpt, tmp_path / "out", "--bundle") == 3
    assert "positions are no rotation" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("chip", "settings", "code", "words"),
    [
        ("SM8450", {}, 2, "compiles for one chip"),  # v69: older than Genie takes
        ("SM7550", {}, 3, "no half precision"),
        ("SM8750", {"dtype": "w4a16"}, 2, "dtype cannot be this"),
        ("SM8750", {"context": 10}, 3, "fits into the context"),
        ("SM8750", {"context": 512}, 3, "fits into the context"),
        ("SM8750", {"toolkit": "genie"}, 2, "toolkit cannot be this"),
        ("SM8750", {"past": 1}, 2, "there is no key 'past'"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    chip: str, settings: dict[str, object], code: int, words: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert hand(model, tmp_path / "out", "--bundle", chip=chip, **settings) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_binary_holds_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dconv.hw import qairt

    weights = sum(array.nbytes // 4 for array in hf_arrays(model))
    monkeypatch.setattr(qairt, "_LARGEST", 2 * weights)
    assert hand(model, tmp_path / "out", "--bundle") == 3
    assert "--quant w8a16" in capsys.readouterr().err
    monkeypatch.setattr(qairt, "_LARGEST", 2 * weights + 1)
    assert main(["plan", str(model), "qnn", "--platform", "SM8750", "--quantization-config",
                 json.dumps({"toolkit": "qairt", "prefill": 8, "context": 24})]) == 0  # fmt: skip


def hf_arrays(model: Path) -> list[np.ndarray]:
    from safetensors.numpy import load_file

    return [array for file in model.glob("*.safetensors") for array in load_file(file).values()]


def test_a_tokenizer_is_needed(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hand(llama, tmp_path / "out", "--bundle") == 3
    assert "tokenizer.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_chips_are_those_of_the_other_toolkit() -> None:
    assert {name: (chip.model, chip.arch) for name, chip in CHIPS.items()} == {
        name: pair for name, pair in KNOWN.items() if pair[1] >= 73
    }
