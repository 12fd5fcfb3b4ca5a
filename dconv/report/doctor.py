"""What ``dconv doctor`` says: which runtimes, launchers and hardware compilers are here, and how to get the others."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from dconv.errors import DconvError
from dconv.export.runtimes import available_memory
from dconv.hw.registry import adapters
from dconv.hw.target import Ask
from dconv.report.table import Table

#: What a package is for, and the extra that brings it.
_PACKAGES: Final[Mapping[str, tuple[str, str]]] = {
    "torch": ("calibration, graphs, check", "transformers"),
    "transformers": ("running HuggingFace checkpoints", "transformers"),
    "megatron-core": ("running Megatron checkpoints", "megatron"),
    "gguf": ("GGUF's names and readers", "gguf"),
    "xllamacpp": ("GGUF's K-quants", "kquants"),
    "onnx": ("FORMAT onnx", "onnx"),
    "onnxscript": ("FORMAT onnx", "onnx"),
    "onnxruntime": ("running ONNX", "onnx"),
    "onnxruntime-genai": ("generating with ONNX", "genai"),
    "pyarrow": ("calibration data in tables", "datasets"),
    "huggingface_hub": ("names on the hub as MODEL", "hub"),
}
_PROGRAMS: Final[Mapping[str, str]] = {"torchrun": "ranks on several machines", "srun": "ranks under SLURM"}


def examined(python: Path | None = None) -> dict[str, Any]:
    """For ``--json``.

    Args:
        python: an interpreter to look for toolchains in, besides their own places.
    """
    ask = Ask(None, {}, "", python, os.environ)
    compilers = {}
    for name, adapter in adapters().items():
        said: dict[str, Any] = {
            "title": adapter.title,
            "platforms": dict(adapter.platforms),
            "install": adapter.install,
        }
        try:
            tool = adapter.find(ask)
            said |= {"found": tool.words, "details": dict(tool.details)}
        except DconvError as error:
            said |= {"found": None, "lacks": error.found or error.what}
        compilers[name] = said
    packages = {}
    for name, (use, extra) in _PACKAGES.items():
        packages[name] = {"version": _version(name), "for": use, "install": f"pip install 'dconv[{extra}]'"}
    programs = {name: {"path": shutil.which(name), "for": use} for name, use in _PROGRAMS.items()}
    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "free_memory": available_memory(),
        "free_disk": shutil.disk_usage(".").free,
    }
    return {"machine": machine, "packages": packages, "programs": programs, "compilers": compilers}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def parts(said: Mapping[str, Any]) -> list[str | Table]:
    """The same for a person."""
    machine = said["machine"]
    first = (
        f"Python {machine['python']}, {machine['system']}, {machine['cores']} cores, "
        f"{machine['free_memory'] / 1e9:.1f} GB of memory and {machine['free_disk'] / 1e9:.1f} GB of disk free"
    )
    here = [
        (name, one["version"] or f"not here: {one['install']}", one["for"]) for name, one in said["packages"].items()
    ]
    here += [(name, one["path"] or "not on PATH", one["for"]) for name, one in said["programs"].items()]
    shown: list[str | Table] = [first, "", Table(here)]
    for name, one in said["compilers"].items():
        shown += ["", f"{name}  {one['title']}: {one['found'] or 'not here'}"]
        shown.append(f"    for {', '.join(one['platforms'])}")
        if not one["found"]:
            shown += [f"    {line}" for line in (f"lacks {one['lacks']}\n{one['install']}").splitlines()]
    return shown
