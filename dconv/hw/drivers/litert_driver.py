"""A decoder of transformers as a .tflite for LiteRT, and LiteRT's ahead-of-time compilation for MediaTek's NPUs.

    python litert_driver.py probe
    python litert_driver.py compile JOB.json     source: {"hf": folder}
    python litert_driver.py run JOB.json         source: {"artifact": file.tflite, "inputs": inputs.npz}

Runs in the toolchain's own interpreter and imports nothing of dconv, so that it can be taken elsewhere as it is.
Settings of ``compile``: ``sequence`` tokens of a call (or a list, one signature each, over the same weights), ``past``
length of the cache that goes in, ``weights`` f32 or int8 (weight-only, per channel), ``aot`` true for code of
``platform``'s NPU, ``cpu_ops`` true if operators may stay on the CPU beside it, ``check`` false to leave out the run
against transformers.

LiteRT's compiler leaves 0-byte files behind when it fails and does not raise by default. So nothing counts here but
what a file holds: its size, its magic, its operators.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: Distributions of the way to a .tflite, and the file without which each is a shell.
TOOLS = {
    "torch": "torch/lib/libtorch_cpu.so",
    "transformers": "transformers/modeling_utils.py",
    "litert-torch": "litert_torch/_convert/interface.py",
    "litert-converter": "litert_converter/__init__.py",
    "ai-edge-litert": "ai_edge_litert/_pywrap_litert_interpreter_wrapper.so",
}
PLUGIN = "ai_edge_litert/vendors/mediatek/compiler/libLiteRtCompilerPlugin_MediaTek.so"
SDK = "ai_edge_litert_sdk_mediatek"
#: What LiteRT's plugin opens first, and a function that it looks up there.
ADAPTER, ADAPTER_SYMBOL = "libneuron_adapter.so", b"NeuronCompilation_create"
MAGIC = b"TFL3"
#: The operator that LiteRT puts in the place of what it compiled (``kLiteRtDispatchOpCustomName``).
NPU_OP = "DISPATCH_OP"
SETTINGS = {"sequence": 128, "past": 0, "weights": "f32", "aot": False, "cpu_ops": False, "check": True}
#: Of logits in f32, of the largest (or of 1): the same function in another order of sums.
F32_BOUND = 1e-4
#: int8 weights keep the logits' direction to more than 0.99 where a model says something; below this it is another one.
INT8_COSINE = 0.95


class Failed(Exception):
    """What a person is told, in one line."""


def probe() -> dict[str, Any]:
    """What is here, by files and versions; nothing heavy is imported."""
    libraries: dict[str, int] = {}
    versions: dict[str, str] = {}
    lacks: list[str] = []
    for name, path in TOOLS.items():
        try:
            versions[name] = importlib.metadata.version(name)
            libraries[path] = _site_file(name, path).stat().st_size
        except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
            lacks.append(name)
    return {
        "tool": "litert",
        "version": versions.get("litert-torch", ""),
        "versions": versions,
        "libraries": libraries,
        "complete": not lacks,
        "lacks": ", ".join(lacks),
        "aot": {number: neuropilot(number) for number in ("v8", "v9")},
    }


def neuropilot(number: str) -> dict[str, Any]:
    """Whether the NeuroPilot SDK of a version (v8; v9 for MT6993) is really there: its package installs without it."""
    found: dict[str, Any] = {"complete": False, "lacks": "", "libraries": {}, "plugin": 0}
    try:
        found["plugin"] = _site_file("ai-edge-litert", PLUGIN).stat().st_size
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        return {**found, "lacks": f"LiteRT's plugin for MediaTek, {PLUGIN}"}
    if importlib.util.find_spec(SDK) is None:
        return {**found, "lacks": f"the package {SDK}"}
    try:
        folder = importlib.import_module(SDK).path_to_sdk_libs(number)
    except Exception as fault:
        return {**found, "lacks": f"{SDK}.path_to_sdk_libs({number!r}): {_line(fault)}"}
    if folder is None or not Path(folder).is_dir():
        return {**found, "lacks": f"the libraries of {SDK}: it was installed without its download"}
    found["libraries"] = {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*.so*"))}
    adapter = Path(folder) / ADAPTER
    content = adapter.read_bytes() if adapter.is_file() else b""
    if not (content.startswith(b"\x7fELF") and ADAPTER_SYMBOL in content):
        return {**found, "lacks": f"{adapter}: no library with {ADAPTER_SYMBOL.decode()}"}
    return {**found, "complete": True}


def compile_model(job: dict[str, Any]) -> dict[str, Any]:
    """A .tflite of a HuggingFace folder, and code for the platform's NPU where that was asked."""
    settings = _settings(job.get("settings", {}))
    source, out, platform = _folder(job, "hf"), Path(job["out"]), job.get("platform", "")
    config = _config(source)
    target = _target(platform) if settings["aot"] else None
    out.mkdir(parents=True, exist_ok=True)
    names = ["model.tflite"] + ([f"model_{platform}.tflite"] if target else [])
    for name in [*names, "result.json"]:
        if (out / name).exists():
            raise Failed(f"{out / name}: an earlier result lies there")
    work = Path(tempfile.mkdtemp(prefix=".litert-", dir=out))
    tempfile.tempdir = str(work)  # LiteRT leaves its error files in the temporary folder
    steps = 4 + bool(target)
    try:
        model = _model(source, config, steps)
        evidence = _convert(model, settings, work / names[0], steps)
        del model
        if target is not None:
            _progress(4, steps, f"compiling for {platform}")
            evidence["aot"] = _ahead_of_time(work / names[0], target, work / names[1], settings["cpu_ops"])
        for name in names:
            os.replace(work / name, out / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    versions = {name: importlib.metadata.version(name) for name in TOOLS}
    _progress(steps, steps, "done")
    return {"files": names, "evidence": evidence, "versions": versions}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """A .tflite on the CPU: arrays by name in, arrays by name out. Names are those of dconv's graphs."""
    import numpy as np

    interpreters = importlib.import_module("ai_edge_litert.interpreter")
    artifact, inputs, out = Path(job["source"]["artifact"]), Path(job["source"]["inputs"]), Path(job["out"])
    if inspect(artifact)["npu_ops"]:
        raise Failed(f"{artifact}: has code for an NPU, which no CPU runs; take the model.tflite that lies beside it")
    interpreter = interpreters.Interpreter(str(artifact))
    signatures = interpreter.get_signature_list()
    name = job.get("settings", {}).get("signature") or (next(iter(signatures)) if len(signatures) == 1 else None)
    if name not in signatures:
        raise Failed(f"{artifact}: no signature {name}; settings say which: {', '.join(signatures)}")
    runner = interpreter.get_signature_runner(name)
    with np.load(inputs, allow_pickle=False) as held:
        given = {_plain(key): held[key] for key in held.files}
    ports = runner.get_input_details()
    if set(given) != set(ports):
        raise Failed(f"{inputs}: expected {', '.join(sorted(ports))}; found {', '.join(sorted(given))}")
    said = runner(**{key: _fitted(key, array, ports[key]) for key, array in given.items()})
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "outputs.npz", **{_dotted(key): array for key, array in said.items()})
    return {"files": ["outputs.npz"], "evidence": {"signature": name}, "versions": _versions("ai-edge-litert")}


def inspect(path: Path) -> dict[str, Any]:
    """What a .tflite holds: operators, those of an NPU among them, signatures, bytes of weights by type.

    Raises:
        Failed: it is none, or is empty.
    """
    if not path.is_file() or path.stat().st_size <= 8:
        raise Failed(f"{path}: is empty or absent")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[4:8] != MAGIC:
            raise Failed(f"{path}: is no .tflite; expected {MAGIC!r} at byte 4, found {content[4:8]!r}")
        try:
            return _inspected(content)
        except Failed:
            raise
        except Exception as fault:
            raise Failed(f"{path}: is damaged: {_line(fault)}") from fault


def _inspected(content: Any) -> dict[str, Any]:
    schema = importlib.import_module("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(content, 0)
    codes = [model.OperatorCodes(index) for index in range(model.OperatorCodesLength())]
    known = schema.TensorType.__dict__
    kinds: dict[int, str] = {value: name for name, value in known.items() if not name.startswith("_")}
    found: dict[str, Any] = {"operators": 0, "npu_ops": 0, "weights": {}, "signatures": []}
    for number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(number)
        for index in range(graph.OperatorsLength()):
            custom = codes[graph.Operators(index).OpcodeIndex()].CustomCode()
            found["operators"] += 1
            found["npu_ops"] += custom is not None and custom.decode() == NPU_OP
    buffers: dict[int, tuple[str, int]] = {}
    for number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(number)
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            buffer = model.Buffers(tensor.Buffer())
            if size := max(buffer.DataLength(), buffer.Size()):
                buffers[tensor.Buffer()] = (kinds.get(tensor.Type(), "?"), size)
    for kind, size in buffers.values():
        found["weights"][kind] = found["weights"].get(kind, 0) + size
    for index in range(model.SignatureDefsLength()):
        found["signatures"].append(model.SignatureDefs(index).SignatureKey().decode())
    if not found["operators"]:
        raise Failed("the graph has no operators")
    return found


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(SETTINGS)):
        raise Failed(f"settings: no such thing as {', '.join(unknown)}; expected {', '.join(SETTINGS)}")
    settings: dict[str, Any] = {**SETTINGS, **given}
    asked = settings["sequence"]
    lengths = cast("list[Any]", asked) if isinstance(asked, list) else [asked]
    if not lengths or any(type(length) is not int or length < 1 for length in lengths):
        raise Failed(f"settings: sequence is {settings['sequence']!r}; expected a length of 1 or more, or several")
    if len(set(lengths)) < len(lengths):
        raise Failed(f"settings: sequence is {settings['sequence']!r}; expected each length once")
    if type(settings["past"]) is not int or settings["past"] < 0:
        raise Failed(f"settings: past is {settings['past']!r}; expected a length, 0 for no cache")
    if settings["weights"] not in ("f32", "int8"):
        raise Failed(f"settings: weights is {settings['weights']!r}; expected f32 or int8")
    for name in ("aot", "cpu_ops", "check"):
        if type(settings[name]) is not bool:
            raise Failed(f"settings: {name} is {settings[name]!r}; expected true or false")
    return {**settings, "sequence": lengths}


def _config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise Failed(f"{source}: no config.json; expected a HuggingFace folder")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if not any(source.glob("*.safetensors")):
        raise Failed(f"{source}: no .safetensors; other weights are not opened")
    if "quantization_config" in config:
        raise Failed(f"{source}: its weights are quantised, which LiteRT does not read; expected them as floats")
    if config.get("is_encoder_decoder") or any(key.startswith("vision_") for key in config):
        raise Failed(f"{source}: model_type {config.get('model_type')}; expected a decoder of text")
    return config


def _target(platform: str) -> Any:
    """The vendor's target; only where its SDK is really there."""
    target = importlib.import_module("ai_edge_litert.aot.vendors.mediatek.target")
    known = [model.value for model in target.SocModel if model is not target.SocModel.ALL]
    if platform not in known:
        raise Failed(f"platform {platform or 'is missing'}: expected one of {', '.join(known)}")
    found = target.Target(target.SocModel(platform))
    sdk = neuropilot(found.recommended_np_version)
    if not sdk["complete"]:
        raise Failed(f"no ahead-of-time compilation for {platform}: lacks {sdk['lacks']}")
    importlib.import_module("ai_edge_litert.aot.vendors.mediatek.mediatek_backend")  # which registers it
    return found


def _model(source: Path, config: dict[str, Any], steps: int) -> Any:
    import torch
    import transformers

    _progress(0, steps, "loading")
    library: Any = transformers  # whose functions have types in part
    known = library.CONFIG_MAPPING.keys()
    if config.get("model_type") not in known:
        raise Failed(f"{source}: transformers {transformers.__version__} has no model_type {config.get('model_type')}")
    model, loading = library.AutoModelForCausalLM.from_pretrained(
        str(source),
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
        experts_implementation="batched_mm",  # the others look at values, or count as no operator of LiteRT does
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if loading.get(kind):
            names = ", ".join(sorted(map(str, loading[kind]))[:4])
            raise Failed(f"{source}: {len(loading[kind])} {kind.replace('_', ' ')}, such as {names}")
    return model.eval().requires_grad_(False)


def _convert(model: Any, settings: dict[str, Any], path: Path, steps: int) -> dict[str, Any]:
    import torch

    module = _module(model)
    samples: dict[str, dict[str, Any]] = {}
    for length in settings["sequence"]:
        name = "serving_default" if len(settings["sequence"]) == 1 else f"sequence_{length}"
        samples[name] = _sample(model, length, settings["past"])
    _progress(1, steps, "converting")
    converter = importlib.import_module("litert_torch").Converter()
    for name, sample in samples.items():
        converter.add_signature(name, module, sample_kwargs=sample)
    converted = converter.convert()
    _progress(2, steps, "writing")
    converted.export(str(path))
    del converted
    if settings["weights"] == "int8":
        recipe = importlib.import_module("ai_edge_quantizer.recipe").weight_only_wi8_afp32()
        quantizer = importlib.import_module("ai_edge_quantizer.quantizer").Quantizer(str(path), recipe)
        coded = path.with_name("coded.tflite")
        quantizer.quantize().export_model(str(coded))
        os.replace(coded, path)
    found = inspect(path)
    if set(found["signatures"]) != set(samples):
        raise Failed(f"{path.name}: signatures {', '.join(found['signatures'])}; expected {', '.join(samples)}")
    if settings["weights"] == "int8" and not found["weights"].get("INT8"):
        raise Failed(f"{path.name}: no weights in int8 came out")
    _progress(3, steps, "checking" if settings["check"] else "written")
    agreement: dict[str, dict[str, float]] = {}
    if settings["check"]:
        with torch.no_grad():
            for name, sample in samples.items():
                agreement[name] = _agreement(path, name, sample, module(**sample), settings["weights"])
    return {"bytes": path.stat().st_size, **found, "agreement": agreement}


def _module(model: Any) -> Any:
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **given: Any) -> Any:
            held = [given[name] for name in given if name.startswith("past_key_values_")]
            cache = DynamicCache() if held else None
            for keys, values in zip(held[::2], held[1::2]):  # noqa: B905 -- Python 3.8 has no strict
                layer = DynamicLayer()
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values  # an `update` would join them to empty ones
                cache.layers.append(layer)  # pyright: ignore[reportOptionalMemberAccess]
            said = self.model(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                position_ids=given["position_ids"],
                past_key_values=cache,
                use_cache=cache is not None,
            )
            out = {"logits": said.logits}
            for number, layer in enumerate(said.past_key_values.layers if cache is not None else ()):
                out[f"present_{number}_key"], out[f"present_{number}_value"] = layer.keys, layer.values
            return out

    return Traced().eval()


def _sample(model: Any, sequence: int, past: int) -> dict[str, Any]:
    """Inputs of a signature, with values, so that it can be run; the same on every call."""
    import torch
    from transformers.cache_utils import DynamicCache

    random = torch.Generator().manual_seed(sequence)
    vocabulary = model.config.get_text_config().vocab_size
    sample = {
        "input_ids": torch.randint(0, vocabulary, (1, sequence), generator=random),
        "attention_mask": torch.ones(1, past + sequence, dtype=torch.long),
        "position_ids": torch.arange(past, past + sequence)[None],
    }
    if past:  # the model's own: keys and values of no model make its noise as large as what it says
        tokens = torch.randint(0, vocabulary, (1, past), generator=random)
        with torch.no_grad():
            held = model(input_ids=tokens, past_key_values=DynamicCache(), use_cache=True).past_key_values
        for number, layer in enumerate(held.layers):
            for name, one in (("key", layer.keys), ("value", layer.values)):
                if one is None or one.dim() != 4 or one.shape[2] != past:
                    raise Failed(f"layer {number} keeps no {name} for each token; past has to be 0")
                sample[f"past_key_values_{number}_{name}"] = one
    return sample


def _agreement(path: Path, name: str, sample: dict[str, Any], expected: Any, weights: str) -> dict[str, float]:
    """How far the file's logits are from transformers' on the CPU.

    Raises:
        Failed: further than other sums or int8 weights explain.
    """
    import numpy as np

    runner = importlib.import_module("ai_edge_litert.interpreter").Interpreter(str(path)).get_signature_runner(name)
    ports = runner.get_input_details()
    said = runner(**{key: _fitted(key, value.numpy(), ports[key]) for key, value in sample.items()})["logits"]
    meant = expected["logits"].numpy().astype(np.float64)
    difference = float(np.abs(said - meant).max())
    cosine = float((said * meant).sum() / max(float(np.linalg.norm(said) * np.linalg.norm(meant)), 1e-30))
    bound = F32_BOUND * max(1.0, float(np.abs(meant).max()))
    good = difference <= bound if weights == "f32" else cosine >= INT8_COSINE
    if not good:  # also where something is not a number
        raise Failed(
            f"{path.name}: logits of {name} differ from transformers' by {difference:.3g} (cosine {cosine:.4f})"
        )
    return {"difference": difference, "cosine": cosine, "largest": float(np.abs(meant).max())}


def _ahead_of_time(model: Path, target: Any, artifact: Path, cpu_ops: bool) -> dict[str, Any]:
    """The vendor's compiler, and what it really made."""
    result = vendor_compile(model, target, artifact.parent / "aot")
    if result.failed_backends:
        failed = "; ".join(f"{backend.target_id}: {_with_log(str(text))}" for backend, text in result.failed_backends)
        raise Failed(f"LiteRT's compiler failed for {failed}")
    if len(result.models_with_backend) != 1:
        raise Failed(f"LiteRT's compiler gave {len(result.models_with_backend)} models; expected 1")
    made = Path(result.models_with_backend[0][1].path)
    found = inspect(made)
    if not found["npu_ops"]:
        raise Failed(f"{made.name}: nothing in it was compiled for the NPU; no {NPU_OP} among its operators")
    left = found["operators"] - found["npu_ops"]
    if left and not cpu_ops:
        raise Failed(f"{made.name}: {left} operators stay on the CPU; the setting cpu_ops allows that")
    os.replace(made, artifact)
    return {"bytes": artifact.stat().st_size, "operators_on_cpu": left, **found, "report": result.compilation_report()}


def vendor_compile(model: Path, target: Any, out: Path) -> Any:
    """LiteRT's ``aot_compile``; a failure comes back in ``failed_backends``."""
    aot_compile = importlib.import_module("ai_edge_litert.aot.aot_compile").aot_compile
    return aot_compile(str(model), output_dir=str(out), target=target, keep_going=True)


def _with_log(text: str) -> str:
    """A vendor's message with the last error in the file that it points to."""
    for word in text.split():
        if word.endswith(".error") and Path(word).is_file():
            lines = [line.strip() for line in Path(word).read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if "error" in line.lower()]
            return f"{text.split(' See ')[0]} {(errors or lines or [''])[-1]}".strip()
    return text


def _fitted(name: str, array: Any, port: dict[str, Any]) -> Any:
    """An input in the port's dtype; whole numbers only where they fit."""
    import numpy as np

    shape, dtype = tuple(int(length) for length in port["shape"]), np.dtype(port["dtype"])
    if array.shape != shape:
        raise Failed(f"{name}: shape {array.shape}; the graph has {shape}")
    fitted = array.astype(dtype)
    if (array.dtype.kind in "iub") != (dtype.kind in "iub") or (dtype.kind in "iu" and not (fitted == array).all()):
        raise Failed(f"{name}: {array.dtype} does not fit into {dtype}")
    return fitted


def _plain(name: str) -> str:
    return name.replace(".", "_")


def _dotted(name: str) -> str:
    """``present_0_key`` as dconv's graphs call it: ``present.0.key``."""
    parts = name.rsplit("_", 2)
    return ".".join(parts) if len(parts) == 3 and parts[1].isdigit() else name


def _site_file(distribution: str, path: str) -> Path:
    file = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    if not file.is_file() or not file.stat().st_size:
        raise FileNotFoundError(file)
    return file


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def _folder(job: dict[str, Any], role: str) -> Path:
    path = Path(job["source"][role])
    if not path.is_dir():
        raise Failed(f"{path}: no such folder")
    return path


def _line(fault: BaseException) -> str:
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text}" if text else type(fault).__name__


def _progress(done: int, total: int, what: str) -> None:
    print(f"dconv-progress {done}/{total} {what}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit code; the reason of one that is not 0 is the last line on stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("verb", choices=("probe", "compile", "run"))
    parser.add_argument("job", nargs="?", type=Path)
    asked = parser.parse_args(arguments)
    if (asked.verb == "probe") != (asked.job is None):
        parser.error("probe takes no job; compile and run take one")
    try:
        if asked.verb == "probe":
            print(json.dumps(probe()), flush=True)
            return 0
        job_path = asked.job.resolve()
        job = json.loads(job_path.read_text(encoding="utf-8"))
        os.chdir(job_path.parent)  # its paths are relative to it
        done = compile_model(job) if asked.verb == "compile" else run(job)
        result = Path(job["out"]) / "result.json"
        result.with_suffix(".partial").write_text(json.dumps(done, indent=1), encoding="utf-8")
        os.replace(result.with_suffix(".partial"), result)
        return 0
    except Failed as fault:
        print(f"litert: {fault}", file=sys.stderr, flush=True)
    except Exception as fault:
        import traceback

        traceback.print_exc()
        print(f"litert: {_line(fault)}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # libraries that log while they leave would hide the last line
