"""The drivers of hardware compilers, run as they are handed on, with the real compilers (scripts/toolchains.sh)."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.hw import graphs

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = ROOT / "dconv" / "hw" / "drivers"


def toolchain(name: str) -> pytest.MarkDecorator:
    made = (ROOT / ".venvs" / name / "toolchain-installed").exists()
    return pytest.mark.skipif(not made, reason=f"bash scripts/toolchains.sh {name}")


rknn, qnn = toolchain("rknn"), toolchain("qnn")


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def last(self) -> str:
        """The last line that a person reads."""
        return self.stderr.strip().splitlines()[-1] if self.stderr.strip() else ""

    @property
    def result(self) -> dict[str, Any]:
        assert self.code == 0, self.stderr[-3000:]
        return json.loads((self.out / "result.json").read_text())

    @property
    def left(self) -> list[str]:
        """What lies in OUT, the vendor's log aside."""
        return sorted(path.name for path in self.out.iterdir() if path.name != "rknn.log") if self.out.exists() else []


def drive(
    tool: str,
    command: str,
    folder: Path,
    platform: str,
    source: Mapping[str, Any],
    out: str = "out",
    **settings: Any,
) -> Done:
    """A copy of the driver, in the folder of its job, run by the toolchain's Python from elsewhere."""
    driver = shutil.copy(DRIVERS / f"{tool}_driver.py", folder)
    said = {"source": source, "out": out, "platform": platform, "settings": settings}
    (folder / "job.json").write_text(json.dumps(said, default=str))
    python = ROOT / ".venvs" / tool / "bin" / "python"
    done = _run(python, driver, command, folder / "job.json")
    return Done(done.returncode, done.stdout, done.stderr, folder / out)


def _run(*command: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")


def load(tool: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"driver_{tool}", DRIVERS / f"{tool}_driver.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.mlp(tmp_path_factory.mktemp("mlp"))


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.llama(tmp_path_factory.mktemp("llama"))


def rows(seed: int, samples: int) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal((samples, 1, graphs.WIDTH), np.float32)


def ids(seed: int, samples: int) -> NDArray[Any]:
    shape = (samples, 1, graphs.TOKENS)
    return np.random.default_rng(seed).integers(0, graphs.VOCABULARY, shape, np.int32)


def correlation(here: NDArray[Any], there: NDArray[Any]) -> float:
    return float(np.corrcoef(here.ravel(), there.ravel())[0, 1])


# every driver


@pytest.mark.parametrize("path", sorted(DRIVERS.glob("*_driver.py")), ids=lambda path: path.stem)
def test_a_driver_stands_alone(path: Path) -> None:
    """It is copied to machines without dconv, whose Python may be 3.8; its toolchain is imported when it runs."""
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    assert _imported(tree.body) <= {*sys.stdlib_module_names, "numpy"}
    assert "dconv" not in _imported(list(ast.walk(tree)))


def _imported(nodes: Sequence[ast.AST]) -> set[str]:
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("tool", ["rknn", "qnn"])
def test_probe_without_the_toolchain(tool: str) -> None:
    said = json.loads(_run(sys.executable, DRIVERS / f"{tool}_driver.py", "probe").stdout)
    assert said["complete"] is False
    assert said["version"] == "" and said["tool"] in said["lacks"]


@pytest.mark.parametrize(
    ("tool", "files"),
    [
        ("rknn", {"rknn/__init__.py": "", "rknn/api/lib/linux-x86_64/librknnc.so": ""}),
        ("qnn", {"onnxruntime_qnn/__init__.py": "", **{f"onnxruntime_qnn/{it}": "\x7fELF" for it in (
            "libQnnHtp.so", "libHtpPrepare.so", "libQnnSystem.so", "libonnxruntime_providers_qnn.so")}}),
    ],
)  # fmt: skip
def test_probe_looks_into_the_files(tmp_path: Path, tool: str, files: dict[str, str]) -> None:
    """A package of the right name and version, whose libraries are empty or hold no compiler, is not complete."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    name = load(tool).TOOL
    metadata = tmp_path / f"{name.replace('-', '_')}-9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9\n")
    code = f"import sys, runpy; sys.path.append({str(tmp_path)!r}); sys.argv = ['driver', 'probe']; "
    said = _run(
        sys.executable, "-c", code + f"runpy.run_path({str(DRIVERS / f'{tool}_driver.py')!r}, run_name='__main__')"
    )
    found = json.loads(said.stdout)
    assert found["version"] == "9" and found["complete"] is False
    assert {"rknn": "librknnc.so", "qnn": "one version of QNN"}[tool] in found["lacks"]


@pytest.mark.parametrize("names", [[], ["rknn", "nothing"]])
def test_toolchains_says_which_there_are(names: list[str]) -> None:
    done = _run("bash", ROOT / "scripts" / "toolchains.sh", *names)
    assert done.returncode == 1
    assert "rknn" in done.stderr and "qnn" in done.stderr


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut", "is no ONNX graph"),
        ("empty", "it has no operators"),
        ("lost", "llama.onnx.data is missing"),
        ("short", "is too short for the weight"),
        ("outside", "lies outside of the graph's folder"),
        ("open", "input x has no fixed shape: ['batch', 4]"),
        ("absent", "No such file or directory"),
    ],
)
@pytest.mark.parametrize("tool", [pytest.param("rknn", marks=rknn), pytest.param("qnn", marks=qnn)])
def test_a_damaged_graph_is_refused(tmp_path: Path, layers: Path, tool: str, kind: str, says: str) -> None:
    """rknn-toolkit2 alone compiles a graph whose weights are lost, with made-up ones, and returns 0."""
    path = tmp_path / "graph.onnx"
    text, data = layers.read_bytes(), (tmp_path / "llama.onnx.data")
    if kind in ("lost", "short", "outside"):
        path.write_bytes(text.replace(b"llama.onnx.data", b"../ama.onnx.dat") if kind == "outside" else text)
        if kind == "short":
            data.write_bytes((layers.parent / data.name).read_bytes()[:-1])
    elif kind == "open":
        graphs.graph(path, ["Relu"], ("batch", 4))
    elif kind != "absent":
        path.write_bytes(text[: len(text) // 2] if kind == "cut" else b"")
    done = drive(tool, "compile", tmp_path, {"rknn": "RK3588", "qnn": "SM8750"}[tool], {"onnx": "graph.onnx"})
    assert done.code == 1 and done.last.startswith(f"{tool}: ") and says in done.last
    assert done.left == []


# Rockchip


@rknn
def test_rknn_probe() -> None:
    said = json.loads(_run(ROOT / ".venvs/rknn/bin/python", DRIVERS / "rknn_driver.py", "probe").stdout)
    assert said["complete"] is True and said["version"] == "2.5.0"
    assert said["libraries"]["librknnc.so"] > 10_000_000


@rknn
def test_rknn_of_weights_beside_the_graph(tmp_path: Path, layers: Path) -> None:
    """Compiled for the chip that was asked for, on its NPU, and the file can tell a whole one from a part of it."""
    done = drive("rknn", "compile", tmp_path, "RK3588", {"onnx": layers}, name="decoder")
    result = done.result
    assert result["files"] == ["decoder.rknn"] and done.left == ["decoder.rknn", "result.json"]
    data = (done.out / "decoder.rknn").read_bytes()
    assert data[:4] == b"RKNN" and b"rk3588" in data
    # weights are stored in fp16, none twice
    weights = (layers.parent / "llama.onnx.data").stat().st_size // 2
    assert weights < len(data) == result["evidence"]["bytes"]
    assert result["evidence"]["npu"] > 40 and set(result["evidence"]["cpu"]) == {"Gather"}
    assert result["evidence"]["compiler"].startswith("2.5.0 ")
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]

    driver, part = load("rknn"), tmp_path / "part.rknn"
    for wrong in (b"", data[:-1], data[: len(data) // 2], data + b"\0", b"\0" + data[1:]):
        part.write_bytes(wrong)
        with pytest.raises(driver.Failure):
            driver._judged(part, "rk3588")
    with pytest.raises(driver.Failure, match="does not name rk3576"):
        driver._judged(done.out / "decoder.rknn", "rk3576")


@rknn
@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 0.9999), ("w8a8", 0.99)])
def test_simulator_computes_the_graph(tmp_path: Path, layers: Path, dtype: str, bound: float) -> None:
    """fp16 differs from fp32 by 1% of the largest logit at most; calibrated codes correlate."""
    given = ids(7, 1)[0]
    np.savez(tmp_path / "inputs.npz", ids=given)
    np.savez(tmp_path / "samples.npz", ids=ids(8, 8))
    source: dict[str, Any] = {"onnx": layers, "inputs": "inputs.npz", "calibration": "samples.npz"}
    done = drive("rknn", "run", tmp_path, "rk3588", source, dtype=dtype)
    assert done.result["files"] == ["outputs.npz"] and "simulator" in done.result["evidence"]["runtime"]
    here, there = np.load(done.out / "outputs.npz")["logits"], graphs.on_cpu(layers, ids=given)
    assert correlation(here, there) > bound
    if dtype == "fp16":
        assert np.abs(here - there).max() < 0.01 * np.abs(there).max()


@rknn
def test_simulator_takes_axes_as_the_graph_has_them(tmp_path: Path) -> None:
    """Inputs of four axes, by name and in any order; calibration as lists of files in the order of the inputs."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((1, 2, 3, 4), np.float32), random.standard_normal((1, 2, 4, 5), np.float32)
    np.savez(tmp_path / "inputs.npz", b=b, a=a)
    np.save(tmp_path / "sample of a.npy", a)
    np.save(tmp_path / "b.npy", b)
    source: dict[str, Any] = {"onnx": graphs.two_inputs(tmp_path / "two.onnx"), "inputs": "inputs.npz"}
    source["calibration"] = [["sample of a.npy", "b.npy"]]
    done = drive("rknn", "run", tmp_path, "RK3576", source, dtype="w8a8")
    assert done.code == 0, done.stderr
    assert correlation(np.load(done.out / "outputs.npz")["y"], a @ b) > 0.99


@rknn
def test_w4a16_is_for_chips_that_have_it(tmp_path: Path, mlp: Path) -> None:
    """The vendor's refusal leaves nothing, not even what an earlier call had made."""
    np.savez(tmp_path / "samples.npz", x=rows(1, 4))
    source, chosen = {"onnx": mlp, "calibration": "samples.npz"}, {"dtype": "w4a16", "method": "group32"}
    made = drive("rknn", "compile", tmp_path, "RK3576", source, **chosen)
    assert made.result["files"] == ["model.rknn"]
    refused = drive("rknn", "compile", tmp_path, "RK3588", source, **chosen)
    assert refused.code == 1 and "quantized_dtype = 'w4a16' not support in 'rk3588'" in refused.last
    assert refused.left == []


@rknn
@pytest.mark.parametrize(("tokens", "turned"), [(16, 1), pytest.param(1, 0, marks=pytest.mark.long)])
def test_wide_logits_of_several_tokens_are_turned_on_the_cpu(tmp_path: Path, tokens: int, turned: int) -> None:
    """What the compiler says of a channel that is too large is true of a Transpose; the matrix is on the NPU."""
    path = graphs.graph(tmp_path / "graph.onnx", ["MatMul"], (1, tokens, 4), columns=49152)
    done = drive("rknn", "compile", tmp_path, "RK3588", {"onnx": path})
    evidence = done.result["evidence"]
    assert evidence["cpu"].get("Transpose", 0) == turned
    assert not {"MatMul", "Conv"} & set(evidence["cpu"])
    said = (done.out / "rknn.log").read_text(errors="replace")
    assert ("channel is too large" in said) == bool(turned)


@rknn
@pytest.mark.parametrize(
    ("platform", "steps", "opset", "says"),
    [
        ("RK9999", ["MatMul"], 17, "Invalid target_platform 'rk9999'"),
        ("RK3588", ["Det"], 17, "nothing of the graph would run on the NPU of rk3588: Det"),
        ("RK3588", ["MatMul"], 20, "Unsupport onnx opset 20, need <= 19"),
        ("RV1106", ["MatMul"], 17, "target_platform(rv1106) not support do_quantization = False"),
    ],
)
def test_rknn_refuses(tmp_path: Path, platform: str, steps: list[str], opset: int, says: str) -> None:
    path = graphs.graph(tmp_path / "graph.onnx", steps, opset=opset)
    done = drive("rknn", "compile", tmp_path, platform, {"onnx": path})
    assert done.code == 1 and says in done.last
    assert done.left == []


# Qualcomm


@qnn
def test_qnn_probe() -> None:
    said = json.loads(_run(ROOT / ".venvs/qnn/bin/python", DRIVERS / "qnn_driver.py", "probe").stdout)
    assert said["complete"] is True and said["version"] == "2.7.0" and said["qnn"].startswith("v2.51.0.")
    assert min(said["libraries"]["libQnnHtp.so"], said["libraries"]["libHtpPrepare.so"]) > 50_000_000


@qnn
def test_each_chip_has_its_own_binary(tmp_path: Path, layers: Path) -> None:
    import onnx

    binaries = {}
    for chip, soc, architecture in (("SM8750", 69, 79), ("SM8650", 57, 75)):
        done = drive("qnn", "compile", tmp_path, chip.lower(), {"onnx": layers}, out=chip, name="decoder")
        result = done.result
        assert result["files"] == ["decoder_ctx.onnx", "decoder_ctx_qnn.bin"]
        assert done.left == [*result["files"], "result.json"]
        binaries[chip] = (done.out / "decoder_ctx_qnn.bin").read_bytes()
        assert f"soc_type={chip};arch={architecture};".encode() in binaries[chip]
        assert result["evidence"]["qnn"].encode() in binaries[chip]
        assert result["evidence"]["compatibility"].endswith(f":{architecture}:{soc}:0:0")
        # a matrix of fp16 codes cannot be smaller; 5/7 of the weights are in matrices of the two layers
        assert len(binaries[chip]) > (layers.parent / "llama.onnx.data").stat().st_size // 2
        wrapper = onnx.load(done.out / "decoder_ctx.onnx")
        assert [node.op_type for node in wrapper.graph.node] == ["EPContext"]
        assert not wrapper.graph.initializer
    assert binaries["SM8750"] != binaries["SM8650"]
    data = tmp_path / "SM8650" / "decoder_ctx_qnn.bin"
    driver = load("qnn")
    driver.probe = lambda: {"qnn": result["evidence"]["qnn"]}
    assert driver._judged(tmp_path / "SM8650" / "decoder_ctx.onnx", "SM8650")[0][1] == data
    for wrong in (b"", data.read_bytes()[:200], binaries["SM8750"]):
        data.write_bytes(wrong)
        with pytest.raises(driver.Failure):
            driver._judged(tmp_path / "SM8650" / "decoder_ctx.onnx", "SM8650")


@qnn
def test_qnn_quantises(tmp_path: Path, layers: Path) -> None:
    """w8a16 is half of fp16, and its codes compute what the graph does; a fp16-less chip takes it too."""
    np.savez(tmp_path / "samples.npz", ids=ids(8, 4))
    source = {"onnx": layers, "calibration": "samples.npz"}
    plain = drive("qnn", "compile", tmp_path, "SM8750", source, out="fp16")
    coded = drive("qnn", "compile", tmp_path, "SM8750", source, dtype="w8a16")
    assert coded.result["evidence"]["correlation"]["logits"] > 0.999
    sizes = [done.result["evidence"]["bytes"]["model_ctx_qnn.bin"] for done in (plain, coded)]
    assert sizes[1] < 0.85 * sizes[0]
    older = drive("qnn", "compile", tmp_path, "QCS6490", source, dtype="w8a16")
    assert older.result["evidence"]["htp_arch"] == 68


@qnn
@pytest.mark.parametrize(
    ("platform", "settings", "says"),
    [
        ("SM9999", {}, "no chip is called SM9999; known are QCS6490, "),
        ("SM8750", {"dtype": "w4a16"}, "dtype w4a16 is unknown"),
        ("SM8750", {"dtype": "w8a16"}, "needs calibration samples"),
        ("QCS6490", {}, "the HTP cannot compute Gemm (Failed to add node); Sigmoid"),
    ],
)
def test_qnn_refuses(tmp_path: Path, mlp: Path, platform: str, settings: dict[str, str], says: str) -> None:
    done = drive("qnn", "compile", tmp_path, platform, {"onnx": mlp}, **settings)
    assert done.code == 1 and says in done.last
    assert done.left == []


@qnn
def test_nothing_falls_back_to_the_cpu(tmp_path: Path) -> None:
    """MatMul is for the HTP, Det is not: half an artifact is none. onnxruntime itself would run this graph."""
    path = graphs.graph(tmp_path / "graph.onnx", ["MatMul", "Det"])
    assert graphs.on_cpu(path, x=np.eye(4, dtype=np.float32)[None]).shape == (1,)
    done = drive("qnn", "compile", tmp_path, "SM8750", {"onnx": path})
    assert done.code == 1 and "cannot compute Det (Operators of type `Det` are not supported by QNN" in done.last
    assert done.left == []


@qnn
def test_qnn_has_no_run(tmp_path: Path, mlp: Path) -> None:
    done = drive("qnn", "run", tmp_path, "SM8750", {"onnx": mlp})
    assert done.code == 1 and "on x86 the provider computes on the CPU" in done.last
