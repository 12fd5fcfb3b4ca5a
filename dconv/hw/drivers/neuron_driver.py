"""AWS Neuron's NxD Inference, run by its own interpreter: a checkpoint to model.pt, its config, and weights by core.

    python neuron_driver.py probe              one line of JSON: what is here
    python neuron_driver.py compile JOB.json   writes model.pt, neuron_config.json, weights/ and result.json into "out"
    python neuron_driver.py demo WORD…         the vendor's inference_demo, but for its own quantising (see `demo`)

Job: {"source": {"model": DIR, "exclusions": FILE where dtype is fp8}, "out": DIR, "platform": "trn2", "settings":
{"model_type", "dtype", "tp_degree", "batch_size", "seq_len", "max_context_length", "logical_nc_config",
"on_device_sampling", "enable_bucketing", "save_sharded_checkpoint"}}; paths are relative to the job's folder.

Source: aws-neuron/neuronx-distributed-inference 4bcdc54, ``inference_demo.py`` for the command line (a prompt is
demanded even where nothing is run), ``models/application_base.py`` for what it reads and writes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import find_spec
from typing import Any, cast

PACKAGE = "neuronx-distributed-inference"
#: Real versions begin with torch's or the compiler's own, which is 2; the public index has placeholders of 0.1 and 1.0.
REAL = {"torch-neuronx": 2, "neuronx-cc": 2}
#: Two more whose versions tell nothing.
BESIDE = (PACKAGE, "neuronx-distributed")
DEMO = "neuronx_distributed_inference.inference_demo"
#: What the command line must have.
OPTIONS = ("--compile-only", "--save-sharded-checkpoint", "--modules-to-not-convert-file", "--tp-degree")
COMPILER = "neuronx-cc"
MODEL, CONFIG, WEIGHTS = "model.pt", "neuron_config.json", "weights/tp{}_sharded_checkpoint.safetensors"
#: What is said when all is compiled and saved, model by model.
DONE = re.compile(r"Compiling and tracing time: [0-9.]+ seconds")
PROMPT = "I believe the meaning of life is"
#: Of the checkpoint, what a runtime opens beside the weights.
BESIDE_WEIGHTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def program() -> str | None:
    """The compiler's command: beside the interpreter, else on PATH."""
    own = os.path.dirname(os.path.abspath(sys.executable))
    return shutil.which(COMPILER, path=own + os.pathsep + os.environ.get("PATH", ""))


def demo_file() -> str | None:
    """The vendor's script, without importing anything of it; None where there is none."""
    spec = find_spec(DEMO.partition(".")[0])
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(folder, DEMO.rpartition(".")[2] + ".py")
        if os.path.isfile(path):
            return path
    return None


def model_types(text: str) -> list[str]:
    """The keys of MODEL_TYPES in the script, and of those the ones that have language models."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and any(getattr(at, "id", "") == "MODEL_TYPES" for at in node.targets):
            table: Any = node.value  # a dict of dicts; anything else has not these attributes
            pairs = zip(table.keys, table.values)  # noqa: B905
            return [key.value for key, tasks in pairs if any(task.value == "causal-lm" for task in tasks.keys)]
    return []


def compiler_version(path: str) -> str:
    """What the command says of itself."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"version ([0-9]+\.[0-9][^\s]*)", done.stdout + done.stderr)
    return found[1] if found else ""


def lacks(said: dict[str, Any]) -> str:
    """What is missing, in words; fills in what is there."""
    for name in (*REAL, *BESIDE):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return "no package " + name
        said["packages"][name] = version
        first = re.match(r"[0-9]+", version)
        if int(first[0] if first else 0) < REAL.get(name, 0):
            return f"{name} {version} is a placeholder of the public index, not the vendor's"
    said["version"] = said["packages"][PACKAGE]
    for name in ("torch_neuronx", "neuronx_distributed"):
        if find_spec(name) is None:
            return "package {} without its module".format(name.replace("_", "-"))
    script = demo_file()
    if script is None:
        return "package {} {} without inference_demo, as the placeholder is".format(PACKAGE, said["version"])
    with open(script, encoding="utf-8") as file:
        text = file.read()
    if absent := [option for option in OPTIONS if option not in text]:
        return "inference_demo of {} {} has no {}".format(PACKAGE, said["version"], absent[0])
    try:
        said["model_types"] = model_types(text)
    except (SyntaxError, AttributeError) as fault:
        return f"inference_demo cannot be read: {fault}"
    if not said["model_types"]:
        return "inference_demo of {} {} names no models".format(PACKAGE, said["version"])
    path = program()
    if path is None or not os.path.getsize(path):
        return f"no program {COMPILER} beside {sys.executable} or on PATH"
    said["compiler"] = path
    said["compiler_version"] = compiler_version(path)
    if not said["compiler_version"].startswith("2."):
        return f"{path} does not say its version"
    return ""


def probe() -> dict[str, Any]:
    """What is installed, by versions, files and what the compiler says."""
    said: dict[str, Any] = {
        "tool": "NxD Inference", "version": "", "libraries": {}, "packages": {}, "complete": False, "lacks": "",
    }  # fmt: skip
    said["lacks"] = lacks(said)
    said["complete"] = not said["lacks"]
    return said


def arguments(job: dict[str, Any], source: dict[str, str], out: str) -> list[str]:
    """The command line of inference_demo."""
    settings = job["settings"]
    words = [
        "--model-type", settings["model_type"], "--task-type", "causal-lm", "run",
        "--model-path", source["model"], "--compiled-model-path", out, "--compile-only", "--prompt", PROMPT,
        "--torch-dtype", "bfloat16", "--tp-degree", str(settings["tp_degree"]),
        "--batch-size", str(settings["batch_size"]), "--max-context-length", str(settings["max_context_length"]),
        "--seq-len", str(settings["seq_len"]), "--logical-nc-config", str(settings["logical_nc_config"]),
    ]  # fmt: skip
    for name in ("on_device_sampling", "enable_bucketing", "save_sharded_checkpoint"):
        if settings[name]:
            words.append("--" + name.replace("_", "-"))
    if settings["dtype"] == "fp8":
        words += [
            "--quantized", "--quantized-checkpoints-path", source["model"], "--quantization-type",
            "per_channel_symmetric", "--quantization-dtype", "f8e4m3", "--modules-to-not-convert-file",
            source["exclusions"],
        ]  # fmt: skip
    return words


def demo(words: list[str]) -> None:
    """Run inference_demo on a checkpoint that is quantised already.

    With ``--quantized`` it loads the model, quantises it in memory and writes it to ``--quantized-checkpoints-path``,
    whatever is there: over the checkpoint that it is to compile. What it would make is there, so that step is left out.
    """
    from importlib import import_module

    base = import_module("neuronx_distributed_inference.models.application_base").NeuronApplicationBase
    if not callable(getattr(base, "save_quantized_state_dict", None)):
        sys.exit("neuron: this NxD Inference quantises elsewhere than it did: nothing was compiled")

    def kept(_cls: Any, _model_path: Any, config: Any) -> None:
        print("the checkpoint is quantised already, and is kept: " + config.neuron_config.quantized_checkpoints_path)

    base.save_quantized_state_dict = classmethod(kept)
    sys.argv = ["inference_demo", *words]
    import_module(DEMO).main()


def run_demo(job: dict[str, Any], words: list[str], here: str) -> str:
    """Run it in a process of its own, its words passed on; returns the line of success."""
    environment = dict(os.environ)
    own = os.path.dirname(program() or sys.executable)
    environment["PATH"] = own + os.pathsep + environment.get("PATH", "")
    environment["NEURON_PLATFORM_TARGET_OVERRIDE"] = job["platform"]  # compile for it, whatever this machine has
    environment["BASE_COMPILE_WORK_DIR"] = os.path.join(here, "compiler", "")  # /tmp/nxd_model otherwise, shared by all
    environment.pop("NEURON_LOGICAL_NC_CONFIG", None)  # it would win over the option
    argv = [sys.executable, "-m", DEMO]
    if job["settings"]["dtype"] == "fp8":
        environment["UNSAFE_FP8FNCAST"] = environment["XLA_HANDLE_SPECIAL_SCALAR"] = "1"
        argv = [sys.executable, os.path.abspath(__file__), "demo"]
    done = ""
    with subprocess.Popen(
        [*argv, *words], cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            print(line, end="", flush=True)
            found = DONE.search(line)
            done = found.group() if found else done
    if process.returncode:
        sys.exit(f"neuron: inference_demo ended with exit code {process.returncode}")
    if not done:
        sys.exit("neuron: inference_demo ended well without saying that it compiled")
    return done


def check_shard(path: str) -> None:
    """Exit where a file of weights is not as long as its header says."""
    name = os.path.basename(path)
    if not os.path.isfile(path):
        sys.exit(f"neuron: {name} was not written")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        try:
            header = json.loads(file.read(length)) if length <= size - 8 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        sys.exit(f"neuron: {name} has no header, in {size} bytes")
    entries = cast("dict[str, Any]", header)
    try:
        ends = [int(entry["data_offsets"][1]) for key, entry in entries.items() if key != "__metadata__"]
    except (LookupError, TypeError, ValueError):
        ends = []
    if not ends or 8 + length + max(ends) != size:
        sys.exit(f"neuron: {name} is not as long as its header says, in {size} bytes")


def compile_job(path: str) -> None:
    """Compile what a job says; exits with a message where something of what was to be written is not there."""
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    here = os.path.dirname(os.path.abspath(path))
    source = {role: os.path.join(here, name) for role, name in job["source"].items()}
    out = os.path.join(here, job["out"])
    settings = job["settings"]
    os.makedirs(out, exist_ok=True)
    print("dconv-progress 0/2 compiling", flush=True)
    try:
        done = run_demo(job, arguments(job, source, out), here)
    finally:
        shutil.rmtree(os.path.join(here, "compiler"), ignore_errors=True)
    print("dconv-progress 1/2 looking at what was written", flush=True)
    model = os.path.join(out, MODEL)
    if not os.path.isfile(model) or not zipfile.is_zipfile(model):
        sys.exit(f"neuron: {MODEL} is no archive of torch.jit, though inference_demo ended well")
    files = [MODEL, CONFIG]
    if not os.path.isfile(os.path.join(out, CONFIG)):
        sys.exit(f"neuron: {CONFIG} was not written")
    if settings["save_sharded_checkpoint"]:
        shards = [WEIGHTS.format(rank) for rank in range(settings["tp_degree"])]
        for name in shards:
            check_shard(os.path.join(out, name))
        files += shards
    for name in BESIDE_WEIGHTS:
        if os.path.isfile(os.path.join(source["model"], name)):
            shutil.copyfile(os.path.join(source["model"], name), os.path.join(out, name))
            files.append(name)
    said = probe()
    versions = dict(said["packages"], compiler=said.get("compiler_version", ""))
    with open(os.path.join(out, "result.json"), "w", encoding="utf-8") as file:
        json.dump({"files": files, "evidence": {"said": done}, "versions": versions}, file)
    print("dconv-progress 2/2 done", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        print(json.dumps(probe()))
    elif len(sys.argv) == 3 and sys.argv[1] == "compile":
        compile_job(sys.argv[2])
    elif sys.argv[1:2] == ["demo"]:
        demo(sys.argv[2:])
    else:
        sys.exit("neuron: probe, or compile JOB.json")
