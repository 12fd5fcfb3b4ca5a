"""Qualcomm's HTP: an ONNX graph becomes a context binary for the NPU of a chip (onnxruntime-qnn, which has QNN in it).

    python qnn_driver.py probe                 prints one JSON line: what is installed, judged by its files
    python qnn_driver.py compile JOB.json      ONNX -> OUT/NAME_ctx.onnx, OUT/NAME_ctx_qnn.bin and OUT/result.json

JOB.json, with paths relative to its own folder::

    {"source": {"onnx": "model.onnx", "calibration": "samples.npz"},    one array [samples, *shape] an input
     "out": "compiled", "platform": "SM8750",
     "settings": {"dtype": "fp16", "name": "model"}}    or w8a16, w8a8: by onnxruntime's quantiser for QNN, here

The graph has fixed shapes; its weights may lie beside it. NAME_ctx.onnx is what an application opens: its one operator,
EPContext, names the binary beside it.

This file is run by an interpreter that has the package, imports no more than it and numpy, onnx and onnxruntime, and
may be copied to where they are. What it does not take on trust:

- An operator that the HTP cannot compute goes to the CPU, without a word. `session.disable_cpu_ep_fallback` forbids
  that, enable_fallback=0 Python's own second try. NAME_ctx.onnx has to consist of EPContext alone.
- A failed compile may leave a binary behind. Everything is made in a folder that goes away.
- The binary itself says for which chip and with what version it was compiled: as asked for, and as installed.

There is no `run`: on x86 a session with this provider computes on the CPU and calls itself the HTP, which shows nothing
of the binary. For w8a16 and w8a8 the quantised graph is compared with its source on the CPU; that judges the quantiser.

Exit code 0, or 1 with the reason in the last line of stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOOL = "onnxruntime-qnn"
PROVIDER = "QNNExecutionProvider"
NEEDS = ("numpy", "onnx", "onnxruntime")
#: The backend, what prepares graphs for it where there is no HTP, what reads binaries, the provider.
LIBRARIES = ("libQnnHtp.so", "libHtpPrepare.so", "libQnnSystem.so", "libonnxruntime_providers_qnn.so")
#: Those that hold QNN's version.
VERSIONED = LIBRARIES[:2]
VERSION = re.compile(rb"(v\d+\.\d+\.\d+\.\d{12})")
ELF = re.compile(rb"\A(\x7fELF)")
#: In a binary: the compiler's settings, of which these two say what it is for.
TARGET = re.compile(rb"soc_type=(\w+);arch=(\d+)")
#: chip -> (soc_model, htp_arch). soc_model is QNN's own number of a chip (QNN_SOC_MODEL_… of QnnTypes.h). Each pair
#: was compiled for without an architecture, and QNN 2.51 wrote this name and this architecture into the binary.
CHIPS = {
    # the same pairs in ExecuTorch, backends/qualcomm/serialization/qc_schema.py
    "SM8350": (30, 68), "SM8450": (36, 69), "SM8550": (43, 73), "SM8650": (57, 75), "SM8750": (69, 79),
    "SM8845": (97, 81), "SM8850": (87, 81), "SA8255": (52, 73), "SA8295": (39, 68), "SA8540": (62, 68),
    "SA8797": (72, 81), "SAR2230P": (95, 81), "SW6100": (96, 81), "SXR2230P": (53, 69), "SXR2330P": (75, 79),
    "QCS9100": (77, 73),
    # the numbers in QnnTypes.h and onnxruntime-qnn's tests
    "SC8280X": (37, 68), "SC8380XP": (60, 73), "SC8480XP": (88, 81), "QCS6490": (93, 68), "QCS8300": (82, 75),
    "QCS8550": (66, 73), "SA8620P": (67, 75), "SM7550": (64, 73), "SM7635": (73, 73), "SM7675": (70, 73),
    "SM8635": (68, 73), "SM8735": (85, 73),
}  # fmt: skip
#: dtype -> types of activations and of weights, of onnxruntime's QuantType.
QUANTISED = {"w8a16": ("QUInt16", "QUInt8"), "w8a8": ("QUInt8", "QUInt8")}


class Failure(Exception):
    """What a person reads in the last line."""


def probe() -> dict[str, Any]:
    """What is installed, without importing it: versions, and QNN's libraries with their sizes."""
    found: dict[str, Any] = {"tool": TOOL, "version": _version(TOOL), "qnn": "", "libraries": {}, "complete": False,
                             "lacks": ""}  # fmt: skip
    lacks = [name for name in (TOOL, *NEEDS) if not _version(name)]
    versions: set[tuple[str, ...]] = set()
    for name in LIBRARIES:
        path = _libraries() / name
        if path.is_file() and _find(path, ELF):
            found["libraries"][name] = path.stat().st_size
            versions |= {_find(path, VERSION)} if name in VERSIONED else set()
    lacks += [name for name in LIBRARIES if name not in found["libraries"]]
    if len(versions) == 1 and () not in versions:
        found["qnn"] = versions.pop()[0]
    elif not lacks:
        lacks.append(f"one version of QNN in {' and '.join(VERSIONED)}")
    found.update(complete=not lacks, lacks=", ".join(lacks))
    return found


def compile_(job: dict[str, Any]) -> None:
    """Compile the graph of a job (see `_job`), and put what was made into its folder once it is judged.

    Raises:
        Failure: an unknown chip or precision, a graph that the HTP does not compute, or a result that is not whole.
    """
    out, name = job["out"], f"{job['name']}_ctx"
    out.mkdir(parents=True, exist_ok=True)
    if job["onnx"].resolve() == (out / f"{name}.onnx").resolve():
        raise Failure(f"{job['onnx']} would be written over")
    for left in ("result.json", f"{name}.onnx", f"{name}_qnn.bin"):
        (out / left).unlink(missing_ok=True)
    if job["dtype"] not in ("fp16", *QUANTISED):
        raise Failure(f"dtype {job['dtype']} is unknown; there are fp16, {', '.join(QUANTISED)}")
    if job["platform"] not in CHIPS:
        raise Failure(f"no chip is called {job['platform']}; known are {', '.join(sorted(CHIPS))}")
    inputs = _graph(job["onnx"])
    staging = Path(tempfile.mkdtemp(prefix=".making-", dir=out))
    try:
        source: Path = job["onnx"]
        evidence: dict[str, Any] = {}
        if job["dtype"] in QUANTISED:
            source, evidence["correlation"] = _quantised(job, inputs, staging)
        print("dconv-progress 1/3 prepare", flush=True)
        _compiled(source, staging / f"{name}.onnx", CHIPS[job["platform"]], half=job["dtype"] == "fp16")
        print("dconv-progress 2/3 compile", flush=True)
        files, said = _judged(staging / f"{name}.onnx", job["platform"])
        evidence.update(said, inputs={it["name"]: it["shape"] for it in inputs})
        for path in files:
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    versions = {it: _version(it) for it in (TOOL, *NEEDS)}
    result = {"files": [path.name for path in files], "evidence": evidence, "versions": versions}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print("dconv-progress 3/3 judge", flush=True)


def _compiled(source: Path, wrapper: Path, chip: tuple[int, int], half: bool) -> None:
    """QNN compiles while a session is made; raises where anything of the graph would be left to the CPU."""
    try:
        _session(source, wrapper, chip, half)
    except Exception as error:
        # a graph in parts may fail in one of them before onnxruntime sees that others are left to the CPU
        refused = _refused(source, wrapper, chip, half)
        raise Failure(f"the HTP cannot compute {refused}" if refused else _last(error)) from error


def _session(source: Path, wrapper: Path, chip: tuple[int, int], half: bool, severity: int = 4) -> None:
    ort = importlib.import_module("onnxruntime")
    ort.set_default_logger_severity(4)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        ort.register_execution_provider_library(PROVIDER, str(_libraries() / LIBRARIES[3]))
        devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    provided = {
        "backend_path": str(_libraries() / LIBRARIES[0]),
        "soc_model": str(chip[0]),
        "htp_arch": str(chip[1]),
        "offload_graph_io_quantization": "0",  # or quantising inputs and outputs would stay on the CPU
    }
    if half:
        provided["enable_htp_fp16_precision"] = "1"
    options = ort.SessionOptions()
    options.log_severity_level = severity
    options.add_provider_for_devices(devices[:1], provided)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_file_path", str(wrapper))
    options.add_session_config_entry("ep.context_embed_mode", "0")
    ort.InferenceSession(str(source), sess_options=options, enable_fallback=0)


def _refused(source: Path, wrapper: Path, chip: tuple[int, int], half: bool) -> str:
    """What the provider says, in its longest log, about the operators that it left to the CPU."""
    kept, path = os.dup(2), wrapper.with_name("log")
    with open(path, "wb") as log:
        os.dup2(log.fileno(), 2)
    with contextlib.suppress(Exception):  # it fails as it did
        _session(source, wrapper.with_name("again.onnx"), chip, half, severity=0)
    ctypes.CDLL(None).fflush(None)
    os.dup2(kept, 2)
    os.close(kept)
    reasons: dict[str, str] = {}
    for kind, reason in re.findall(r"Operator type: (\S+).*\n\s*REASON : (.*)", path.read_text(errors="replace")):
        reasons.setdefault(kind, re.sub(r"\S+ node `.*", "", reason).strip(" ."))
    return "; ".join(f"{kind} ({reason})" for kind, reason in reasons.items())


def _quantised(job: dict[str, Any], inputs: list[dict[str, Any]], staging: Path) -> tuple[Path, dict[str, Any]]:
    """The graph with codes, and how well it agrees with its source on the first sample: output -> correlation."""
    quantization = importlib.import_module("onnxruntime.quantization")
    qnn = importlib.import_module("onnxruntime.quantization.execution_providers.qnn")
    samples = _calibration(job, inputs)

    class Reader(quantization.CalibrationDataReader):
        left = iter(samples)

        def get_next(self) -> Any:
            return next(self.left, None)

    source, prepared, codes = job["onnx"], staging / "prepared.onnx", staging / "codes.onnx"
    activation, weight = (getattr(quantization.QuantType, name) for name in QUANTISED[job["dtype"]])
    try:
        beside = {"save_as_external_data": True, "all_tensors_to_one_file": True, "external_data_location": "weights"}
        if qnn.qnn_preprocess_model(source, prepared, **beside):
            source = prepared
        config = qnn.get_qnn_qdq_config(source, Reader(), activation_type=activation, weight_type=weight)
        quantization.quantize(str(source), str(codes), config)
    except Exception as error:
        raise Failure(f"onnxruntime cannot quantise the graph: {_last(error)}") from error
    return codes, _correlation(job["onnx"], codes, samples[0])


def _correlation(source: Path, codes: Path, sample: dict[str, Any]) -> dict[str, float | None]:
    run = importlib.import_module("onnxruntime").InferenceSession
    sessions = [run(str(path), providers=["CPUExecutionProvider"]) for path in (source, codes)]
    there, here = (session.run(None, sample) for session in sessions)
    agree: dict[str, float | None] = {}
    for port, wide, narrow in zip(sessions[0].get_outputs(), there, here):  # noqa: B905 - Python 3.8
        wide, narrow = (np.ravel(array).astype(np.float64) for array in (wide, narrow))
        spread = min(wide.std(), narrow.std())
        agree[port.name] = round(float(np.corrcoef(wide, narrow)[0, 1]), 6) if spread > 0 else None
    return agree


def _judged(wrapper: Path, platform: str) -> tuple[list[Path], dict[str, Any]]:
    """The files, wrapper first, and what they say themselves; raises unless they are whole and for this chip."""
    onnx = importlib.import_module("onnx")
    if not wrapper.is_file():
        raise Failure("onnxruntime wrote no graph around a context binary")
    model = onnx.load(str(wrapper), load_external_data=False)
    kinds = sorted({node.op_type for node in model.graph.node})
    if kinds != ["EPContext"]:
        raise Failure(f"{wrapper.name} has operators that are left to the CPU: {', '.join(kinds)}")
    nodes = [{it.name: onnx.helper.get_attribute_value(it) for it in node.attribute} for node in model.graph.node]
    names = sorted({node["ep_cache_context"].decode() for node in nodes if node.get("main_context", 1)})
    binaries = [wrapper.parent / Path(name).name for name in names]
    if not binaries or any(node.get("embed_mode", 1) for node in nodes):
        raise Failure(f"{wrapper.name} names no context binary")
    (soc_model, htp_arch), installed = CHIPS[platform], probe()["qnn"]
    for path in binaries:
        if not path.is_file() or not path.stat().st_size:
            raise Failure(f"the context binary {path.name} is missing or empty")
        version, target = _find(path, VERSION), _find(path, TARGET)
        if version != (installed,):
            raise Failure(f"{path.name} was made by QNN {version}, and {installed} is installed")
        if target != (platform, str(htp_arch)):
            raise Failure(f"{path.name} was compiled for {target}; asked for was {platform}, v{htp_arch}")
    said = {it.key: it.value for it in model.metadata_props}
    evidence = {
        "operators": {"EPContext": len(nodes)},
        "bytes": {path.name: path.stat().st_size for path in binaries},
        "chip": platform,
        "soc_model": soc_model,
        "htp_arch": htp_arch,
        "qnn": installed,
        "compatibility": said.get(f"ep_compatibility_info.{PROVIDER}", ""),
    }
    return [wrapper, *binaries], evidence


def _graph(path: Path) -> list[dict[str, Any]]:
    """Inputs (name, shape, dtype) of a graph that is whole and has fixed shapes."""
    onnx = importlib.import_module("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise Failure(f"{path} is no ONNX graph: {_last(error)}") from error
    if not model.graph.node:
        raise Failure(f"{path} is no ONNX graph: it has no operators")
    for tensor in _tensors(model.graph):
        if tensor.data_location == tensor.EXTERNAL:
            _beside(path.parent, tensor.name, {entry.key: entry.value for entry in tensor.external_data})
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs: list[dict[str, Any]] = []
    for port in model.graph.input:
        if port.name in constants:
            continue
        kind = port.type.tensor_type
        shape = [axis.dim_value or axis.dim_param or "?" for axis in kind.shape.dim]
        if not all(isinstance(axis, int) for axis in shape):
            raise Failure(f"{path}: input {port.name} has no fixed shape: {shape}")
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        inputs.append({"name": port.name, "shape": shape, "dtype": dtype})
    return inputs


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else []))
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _tensors(inner)


def _beside(folder: Path, name: str, place: dict[str, str]) -> None:
    """Raises unless the bytes of a weight are in the file beside the graph that it names."""
    path = Path(os.path.normpath(place.get("location", "")))
    if path.is_absolute() or path.parts[:1] in ((), ("..",)):
        raise Failure(f"the weight {name} lies outside of the graph's folder: {place.get('location')}")
    if not (folder / path).is_file():
        raise Failure(f"{folder / path} is missing: the weight {name} lies there")
    end = int(place.get("offset", 0)) + int(place.get("length", 1))
    if (folder / path).stat().st_size < end:
        raise Failure(f"{folder / path} is too short for the weight {name}, which ends at byte {end}")


def _calibration(job: dict[str, Any], inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of an .npz, each an array an input as the graph declares it."""
    given = job["calibration"]
    if not given:
        raise Failure(f"dtype {job['dtype']} needs calibration samples: source.calibration")
    try:
        with np.load(job["folder"] / given, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise Failure(f"calibration: {_last(error)}") from error
    found = {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
    chosen: dict[str, Any] = {}
    lengths: set[int] = set()
    for it in inputs:
        array = arrays.get(it["name"], np.empty(0))
        if list(array.shape[1:]) != it["shape"] or array.dtype.kind not in (it["dtype"].kind, "i", "u"):
            wanted = f"{it['dtype']} [samples, {', '.join(map(str, it['shape']))}]"
            raise Failure(f"{given}: input {it['name']} is {wanted}; found {found}")
        chosen[it["name"]] = array.astype(it["dtype"])
        lengths.add(len(array))
    if len(lengths) != 1 or 0 in lengths:
        raise Failure(f"{given}: every input has as many samples as the others, at least one; found {found}")
    return [{name: array[k] for name, array in chosen.items()} for k in range(lengths.pop())]


def _libraries() -> Path:
    """Where the package keeps QNN, found without importing it; a folder that is not there where it is missing."""
    spec = importlib.util.find_spec("onnxruntime_qnn")
    return Path(spec.origin).parent if spec and spec.origin else Path("onnxruntime_qnn is not installed")


def _find(path: Path, pattern: re.Pattern[bytes]) -> tuple[str, ...]:
    """The groups of the first match in a file, which may be larger than memory; () where there is none."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = pattern.search(data)
            return tuple(group.decode(errors="replace") for group in found.groups()) if found else ()


def _last(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _job(path: Path) -> dict[str, Any]:
    """The job with its paths made absolute and its defaults filled in."""
    folder = path.resolve().parent
    try:
        said = json.loads(path.read_text())
        settings: dict[str, Any] = said.get("settings") or {}
        job: dict[str, Any] = {
            "folder": folder,
            "out": folder / said["out"],
            "onnx": folder / said["source"]["onnx"],
            "platform": said["platform"].upper(),
            "dtype": settings.get("dtype") or "fp16",
            "name": settings.get("name") or "model",
            "calibration": said["source"].get("calibration"),
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{path} is no job: {type(error).__name__} {_last(error)}") from error
    if not re.fullmatch(r"[\w.-]+", job["name"]):
        raise Failure(f"{path}: settings.name is {job['name']!r}, which is no file name")
    return job


def main() -> int:
    """The exit code; the reason of one that is not 0 is the last line on stderr."""
    here = Path(__file__).resolve().parent  # where a folder that is called onnx would be imported
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
    parser = argparse.ArgumentParser(prog="qnn_driver.py", description="ONNX to a context binary for Qualcomm's HTP")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("probe")
    for name in ("compile", "run"):
        commands.add_parser(name).add_argument("job", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "probe":
            print(json.dumps(probe()))
        elif arguments.command == "run":
            raise Failure("there is no run: on x86 the provider computes on the CPU, which shows nothing of the binary")
        else:
            compile_(_job(arguments.job))
    except Failure as failure:
        print(f"qnn: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
