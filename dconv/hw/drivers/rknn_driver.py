"""Rockchip's RKNN: an ONNX graph becomes one `.rknn` file for the NPU of a chip (rknn-toolkit2).

    python rknn_driver.py probe                prints one JSON line: what is installed, judged by its files
    python rknn_driver.py compile JOB.json     ONNX -> OUT/NAME.rknn and OUT/result.json
    python rknn_driver.py run JOB.json         the vendor's simulator: inputs.npz -> OUT/outputs.npz and OUT/result.json

JOB.json, with paths relative to its own folder::

    {"source": {"onnx": "model.onnx",
                "calibration": "samples.npz",   one array [samples, *shape] an input; or a list, an entry a sample,
                                                each a .npy, or a list of .npy in the order of the inputs
                "inputs": "inputs.npz"},        for `run` alone, one array an input
     "out": "compiled", "platform": "RK3588",
     "settings": {"dtype": "fp16",              or w8a8, w8a16, w4a16, w16a16i_dfp: what the chip takes, the vendor says
                  "method": "group32", "algorithm": "mmse",     the vendor's quantized_method and quantized_algorithm
                  "name": "model"}}

The graph has fixed shapes and opset 19 at most. Its weights may lie beside it.

This file is run by the toolkit's own interpreter, imports no more than the toolkit, numpy and onnx, and may be copied
to where they are. What it does not take on trust:

- Each call of the vendor returns 0, or is an exception. Its log proves nothing: a success has errors in it too.
- A graph whose weights are missing beside it compiles, with made-up ones: they are looked for here.
- The file begins with RKNN, is as long as its header says, and names the chip.
- The vendor's runtime computes on the CPU what the NPU cannot. The compiler's table says which operators these are; a
  graph of which none is on the NPU is refused.
- The simulator runs what was built in the same process, not a `.rknn`: `run` builds the graph again, as `compile` did.
  It computes with the rounding of the NPU's types; it is not the NPU, and shows no speed. The toolkit's builds are not
  the same bytes twice.

The vendor's own words go to OUT/rknn.log. Exit code 0, or 1 with the reason in the last line of stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TOOL = "rknn-toolkit2"
#: What `compile` and `run` import besides it; its own metadata ask for more, and for an older torch.
NEEDS = ("numpy", "onnx", "onnxruntime", "torch", "protobuf")
#: The compiler, and the runtime that the simulator is a part of.
LIBRARIES = ("librknnc.so", "librknn_api.so")
MAGIC = b"RKNN"
#: Bytes before the part whose length stands at byte 16; a JSON text with its length follows that part.
HEADER = 64
STEPS = ("config", "load_onnx", "build", "export_rknn")
#: Of the compiler's log: the version, and a line of the table of operators (number, operator, dtype, where it runs).
COMPILER = re.compile(rb"compiler version: ([^\x00\n)]*\))")
OPERATOR = re.compile(r"\]\s*\d+\s+(\w+)\s+\w+\s+(NPU|CPU|GPU)\s")


class Failure(Exception):
    """What a person reads in the last line."""


def probe() -> dict[str, Any]:
    """What is installed, without importing it: versions, and the compiler's libraries with their sizes."""
    found: dict[str, Any] = {"tool": TOOL, "version": _version(TOOL), "libraries": {}, "complete": False, "lacks": ""}
    lacks = [name for name in (TOOL, *NEEDS) if not _version(name)]
    spec = importlib.util.find_spec("rknn")
    for place in spec.submodule_search_locations or [] if spec else []:
        for name in LIBRARIES:
            for path in sorted(Path(place).glob(f"api/lib/*/{name}")):
                with open(path, "rb") as file:
                    if file.read(4) == b"\x7fELF":
                        found["libraries"][name] = path.stat().st_size
    lacks += [name for name in LIBRARIES if name not in found["libraries"]]
    found.update(complete=not lacks, lacks=", ".join(lacks))
    return found


def compile_(job: dict[str, Any]) -> None:
    """Compile the graph of a job (see `_job`), and put the .rknn into its folder once it is judged.

    Raises:
        Failure: a step of the toolkit failed, nothing would run on the NPU, or the file is not whole.
    """
    out = _fresh(job["out"], f"{job['name']}.rknn")
    inputs, _ = _graph(job["onnx"])
    with _vendor(out) as (rknn, progress, staging):
        compiler = _build(rknn, job, inputs, progress, staging)
        made = staging / f"{job['name']}.rknn"
        _call(rknn.export_rknn, str(made))
        progress(4, "export_rknn")
        evidence = {"returned": dict.fromkeys(STEPS, 0), **_judged(made, job["platform"]), **compiler}
        evidence["inputs"] = {it["name"]: it["shape"] for it in inputs}
        os.replace(made, out / made.name)
    _result(out, [made.name], evidence)


def run(job: dict[str, Any]) -> None:
    """Compute a job's inputs in the vendor's simulator, and write ``outputs.npz``.

    The simulator takes no .rknn: the graph is built again.

    Raises:
        Failure: see `compile_`; inputs that are not the graph's, or fewer outputs than it has.
    """
    out = _fresh(job["out"], "outputs.npz")
    inputs, outputs = _graph(job["onnx"])
    given = _samples(_npz(job["inputs"]), inputs, f"{job['inputs']}")
    with _vendor(out) as (rknn, progress, staging):
        compiler = _build(rknn, job, inputs, progress, staging)
        _call(rknn.init_runtime)
        progress(4, "init_runtime")
        # NCHW is how the graph has it; the vendor's default would be NHWC for inputs of four axes
        arrays = rknn.inference(inputs=[given[it["name"]] for it in inputs], data_format=["nchw"] * len(inputs))
        if arrays is None or len(arrays) != len(outputs):
            raise Failure(f"the simulator gave {0 if arrays is None else len(arrays)} outputs for {len(outputs)}")
        np.savez(staging / "outputs.npz", **dict(zip(outputs, arrays)))  # noqa: B905 - Python 3.8
        os.replace(staging / "outputs.npz", out / "outputs.npz")
    _result(out, ["outputs.npz"], {"runtime": "the vendor's simulator, of the graph built again", **compiler})


def _build(
    rknn: Any, job: dict[str, Any], inputs: list[Any], progress: Callable[..., None], staging: Path
) -> dict[str, Any]:
    """The graph is built in this process; how many operators the NPU computes, and which the CPU."""
    settings, floating = job["settings"], job["dtype"] == "fp16"
    chosen = {"target_platform": job["platform"]}
    if not floating:
        chosen["quantized_dtype"] = job["dtype"]
        chosen.update({f"quantized_{key}": settings[key] for key in ("method", "algorithm") if settings.get(key)})
    _call(rknn.config, **chosen)
    progress(1, "config")
    dataset = None if floating else str(_dataset(job, inputs, staging))
    _call(rknn.load_onnx, model=str(job["onnx"]))
    progress(2, "load_onnx")
    _call(rknn.build, do_quantization=not floating, dataset=dataset)
    progress(3, "build")
    _flush()
    places = OPERATOR.findall((job["out"] / "rknn.log").read_text(errors="replace"))
    places = [(kind, where) for kind, where in places if kind not in ("InputOperator", "OutputOperator")]
    elsewhere = [kind for kind, where in places if where != "NPU"]
    if len(elsewhere) == len(places):
        which = ", ".join(sorted(set(elsewhere))) or "the compiler's log has no table of operators"
        raise Failure(f"nothing of the graph would run on the NPU of {job['platform']}: {which}")
    return {"npu": len(places) - len(elsewhere), "cpu": {kind: elsewhere.count(kind) for kind in elsewhere}}


def _graph(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Inputs (name, shape, dtype) and names of outputs of a graph that is whole and has fixed shapes."""
    onnx = importlib.import_module("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise Failure(f"{path} is no ONNX graph: {_last(error)}") from error
    if not model.graph.node:
        raise Failure(f"{path} is no ONNX graph: it has no operators")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
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
    return inputs, [port.name for port in model.graph.output]


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


def _dataset(job: dict[str, Any], inputs: list[dict[str, Any]], staging: Path) -> Path:
    """The vendor's list of calibration files: a line a sample, a file an input."""
    given = job["calibration"]
    if not given:
        raise Failure(f"dtype {job['dtype']} needs calibration samples: source.calibration")
    if isinstance(given, str):
        arrays = _npz(job["folder"] / given)
        lengths = {len(array) for array in arrays.values() if array.ndim}
        if len(lengths) != 1 or 0 in lengths:
            raise Failure(f"{given}: every input has as many samples as the others, at least one; found {lengths}")
        samples = [{name: array[k] for name, array in arrays.items()} for k in range(lengths.pop())]
    else:
        samples: list[dict[str, Any]] = []
        for entry in given:
            paths = [entry] if isinstance(entry, str) else entry
            if len(paths) != len(inputs):
                raise Failure(f"calibration: {entry} for {len(inputs)} inputs")
            loaded = [np.load(job["folder"] / path, allow_pickle=False) for path in paths]
            samples.append({it["name"]: array for it, array in zip(inputs, loaded)})  # noqa: B905
    lines: list[str] = []
    for number, sample in enumerate(samples):
        arrays = _samples(sample, inputs, f"calibration sample {number}")
        names = [f"{number}-{k}.npy" for k in range(len(inputs))]
        for it, name in zip(inputs, names):  # noqa: B905
            np.save(staging / name, arrays[it["name"]])
        lines.append(" ".join(names) + "\n")
    path = staging / "dataset.txt"
    path.write_text("".join(lines))
    return path


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise Failure(f"{path} is no .npz: {_last(error)}") from error


def _samples(arrays: dict[str, Any], inputs: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """The arrays of one call, as the graph declares them; raises where they are not."""
    right: dict[str, Any] = {}
    for it in inputs:
        array = arrays.get(it["name"])
        if array is None:
            raise Failure(f"{what} lacks input {it['name']}; it has {', '.join(sorted(arrays))}")
        if list(array.shape) != it["shape"] or array.dtype.kind not in (it["dtype"].kind, "i", "u"):
            found = f"{array.dtype} {list(array.shape)}"
            raise Failure(f"{what}: input {it['name']} is {it['dtype']} {it['shape']}, found {found}")
        right[it["name"]] = array.astype(it["dtype"])
    return right


def _judged(path: Path, platform: str) -> dict[str, Any]:
    """What the file itself says; raises unless it is a whole one for this chip."""
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith(MAGIC) or len(data) < HEADER + 8:
        raise Failure(f"the compiler wrote no .rknn: {len(data)} bytes, beginning {data[:4]!r}")
    body = HEADER + int.from_bytes(data[16:24], "little")
    tail = int.from_bytes(data[body : body + 8], "little")
    if body + 8 + tail != len(data):
        raise Failure(f"{path.name} has {len(data)} bytes where its header says {body + 8 + tail}")
    if platform.encode() not in data:
        raise Failure(f"{path.name} does not name {platform}")
    compiler = COMPILER.search(data)
    return {"bytes": len(data), "platform": platform, "compiler": compiler.group(1).decode() if compiler else ""}


def _fresh(out: Path, artifact: str) -> Path:
    """The folder without what an earlier call left there: what fails leaves no artifact."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "rknn.log", artifact):
        (out / name).unlink(missing_ok=True)
    return out


@contextlib.contextmanager
def _vendor(out: Path) -> Generator[tuple[Any, Callable[[int, str], None], Path]]:
    """The toolkit, a way to say how far it is, and a folder to work in that goes away.

    Its output (from C too) goes to OUT/rknn.log; it leaves files in the working directory.
    """
    os.environ["RKNN_LOG_LEVEL"] = "4"  # the table of operators, and not the graphs that verbose=True writes
    _flush()
    kept = os.dup(1), os.dup(2)
    before = os.getcwd()
    staging = Path(tempfile.mkdtemp(prefix=".making-", dir=out))

    def progress(done: int, what: str) -> None:
        os.write(kept[0], f"dconv-progress {done}/{len(STEPS)} {what}\n".encode())

    with open(out / "rknn.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        os.chdir(staging)
        rknn = importlib.import_module("rknn.api").RKNN(verbose=False)
        yield rknn, progress, staging
        rknn.release()
    except Failure as failure:
        raise Failure(_with_log(out, str(failure))) from failure
    except (Exception, SystemExit) as error:
        raise Failure(_with_log(out, _last(error))) from error
    finally:
        _flush()
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(before)
        shutil.rmtree(staging, ignore_errors=True)


def _flush() -> None:
    """What Python and C hold back: the compiler prints from C."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def _call(function: Callable[..., int], *arguments: Any, **named: Any) -> None:
    """A vendor's function that returns 0."""
    returned = function(*arguments, **named)
    if returned != 0:
        raise Failure(f"{function.__name__} returned {returned}")


def _with_log(out: Path, message: str) -> str:
    """The message, and the vendor's last error where that is what it lacks."""
    _flush()
    text = re.sub(r"\x1b\[[\d;]*m", "", (out / "rknn.log").read_text(errors="replace"))
    said = [line[2:].strip() for line in re.split(r"[\r\n]+", text) if re.match(r"E (?!RKNN)", line)]
    if re.search(r"returned -?\d+$", message) and said:
        return f"{message}: {said[-1]}"
    return message


def _last(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _result(out: Path, files: list[str], evidence: dict[str, Any]) -> None:
    versions = {name: _version(name) for name in (TOOL, *NEEDS)}
    versions["python"] = sys.version.split()[0]
    said = {"files": files, "evidence": evidence, "versions": versions, "log": "rknn.log"}
    (out / "result.json").write_text(json.dumps(said, indent=1) + "\n")


def _job(path: Path, command: str) -> dict[str, Any]:
    """The job with its paths made absolute and its defaults filled in."""
    folder = path.resolve().parent
    try:
        said = json.loads(path.read_text())
        settings: dict[str, Any] = said.get("settings") or {}
        job: dict[str, Any] = {
            "folder": folder,
            "settings": settings,
            "out": folder / said["out"],
            "onnx": folder / said["source"]["onnx"],
            "platform": said["platform"].lower(),
            "dtype": settings.get("dtype") or "fp16",
            "name": settings.get("name") or "model",
            "calibration": said["source"].get("calibration"),
        }
        if command == "run":
            job["inputs"] = folder / said["source"]["inputs"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Failure(f"{path} is no job: {type(error).__name__} {_last(error)}") from error
    if not re.fullmatch(r"[\w.-]+", job["name"]):
        raise Failure(f"{path}: settings.name is {job['name']!r}, which is no file name")
    return job


def main() -> int:
    """The exit code; the reason of one that is not 0 is the last line on stderr."""
    here = Path(__file__).resolve().parent  # where a folder that is called onnx would be imported
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != here]
    parser = argparse.ArgumentParser(prog="rknn_driver.py", description="ONNX to .rknn, for Rockchip's NPUs")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("probe")
    for name in ("compile", "run"):
        commands.add_parser(name).add_argument("job", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "probe":
            print(json.dumps(probe()))
        else:
            job = _job(arguments.job, arguments.command)
            (compile_ if arguments.command == "compile" else run)(job)
    except Failure as failure:
        print(f"rknn: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
