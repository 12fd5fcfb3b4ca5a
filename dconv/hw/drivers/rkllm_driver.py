"""Rockchip's RKLLM toolkit, run by its own interpreter: a HuggingFace directory to model.rkllm.

    python rkllm_driver.py probe              one line of JSON: what is here
    python rkllm_driver.py compile JOB.json   writes model.rkllm and result.json into the job's "out"

Job: {"source": {"hf": DIR, "calibration": FILE of [{"input", "target"}, …] unless dtype is fp16}, "out": DIR,
"platform": "RK3588", "settings": {"dtype", "algorithm", "max_context", "npu_cores", "optimization_level",
"hybrid_rate"}}; paths are relative to the job's folder. Every call of the toolkit must return 0.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

FILE = "model.rkllm"
PACKAGE = "rkllm-toolkit"


def probe() -> dict[str, Any]:
    """What is installed: the package by its own version, and its compiled libraries by their size."""
    said: dict[str, Any] = {"tool": "RKLLM", "version": "", "libraries": {}, "complete": False, "lacks": ""}
    try:
        said["version"] = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        said["lacks"] = f"no package {PACKAGE}"
        return said
    spec = find_spec("rkllm")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in sorted(names):
                if name.endswith(".so") or ".so." in name:
                    said["libraries"][name] = os.path.getsize(os.path.join(root, name))
    empty = [name for name, size in said["libraries"].items() if not size]
    if not folders:
        said["lacks"] = f"package {PACKAGE} without its module rkllm"
    elif not said["libraries"] or empty:
        said["lacks"] = "module rkllm without its libraries" + (f": {empty[0]} is empty" if empty else "")
    else:
        said["complete"] = True
    return said


def compile_job(path: str) -> None:
    """Compile what a job says; exits with a message where a step of the toolkit returns anything but 0."""
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    here = os.path.dirname(os.path.abspath(path))
    settings, source = job["settings"], {role: os.path.join(here, name) for role, name in job["source"].items()}
    out = os.path.join(here, job["out"])
    os.makedirs(out, exist_ok=True)
    api: Any = import_module("rkllm.api")
    returned: dict[str, Any] = {}

    def must(name: str, code: Any) -> None:
        returned[name] = code
        if code != 0:
            sys.exit(f"rkllm: {name} returned {code!r}")

    tool = api.RKLLM()
    print("dconv-progress 0/3 reading the model", flush=True)
    must("load", tool.load_huggingface(model=source["hf"], model_lora=None, device="cpu"))
    print("dconv-progress 1/3 building", flush=True)
    quantised = settings["dtype"] != "fp16"
    must(
        "build",
        tool.build(
            do_quantization=quantised,
            optimization_level=settings["optimization_level"],
            quantized_dtype=settings["dtype"] if quantised else "w8a8",
            quantized_algorithm=settings["algorithm"],
            target_platform=job["platform"].lower(),
            num_npu_core=settings["npu_cores"],
            extra_qparams=None,
            dataset=source.get("calibration"),
            hybrid_rate=settings["hybrid_rate"],
            max_context=settings["max_context"],
        ),
    )
    print("dconv-progress 2/3 writing", flush=True)
    target = os.path.join(out, FILE)
    must("export", tool.export_rkllm(target))
    if not os.path.isfile(target) or not os.path.getsize(target):
        sys.exit("rkllm: export_rkllm returned 0 and wrote nothing")
    with open(os.path.join(out, "result.json"), "w", encoding="utf-8") as file:
        versions = {PACKAGE: metadata.version(PACKAGE)}
        json.dump({"files": [FILE], "evidence": {"returned": returned}, "versions": versions}, file)
    print("dconv-progress 3/3 done", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        print(json.dumps(probe()))
    elif len(sys.argv) == 3 and sys.argv[1] == "compile":
        compile_job(sys.argv[2])
    else:
        sys.exit("rkllm: probe, or compile JOB.json")
