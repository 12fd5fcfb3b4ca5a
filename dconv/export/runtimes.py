"""Which runtime runs a checkpoint here, and whether there is memory for it."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from dconv.errors import ToolMissing


def runs(container: str) -> bool:
    """Whether `runtime_of` has one for a container (`dconv.checkpoint.source.Source.format`)."""
    return container in ("huggingface", "pt", "bmtrain") or container.startswith("megatron")


def as_run(container: str, rename: object) -> str:
    """The container that a source is run as: transformers cannot be told of house spellings (``--rename``)."""
    return "pt" if rename and container == "huggingface" else container


def runtime_of(container: str) -> ModuleType:
    """The module with ``can_infer`` and ``logits_of`` for a container.

    Raises:
        ToolMissing: nothing here runs it.
    """
    if not runs(container):
        raise ToolMissing(f"no runtime here runs a {container} checkpoint", do="--verify digest needs none")
    if container == "huggingface":
        from dconv.export import huggingface

        return huggingface
    if not container.startswith("megatron"):
        from dconv.export import state_dict

        return state_dict
    from dconv.export import megatron

    return megatron


def shortage(parameters: int, container: str) -> str:
    """Why a model cannot be run in fp32 in the memory that is free now; empty when it can."""
    copies = 2.0 if container.startswith("megatron") else 1.25  # megatron-core fills a state dict, then the model
    needed, free = int(parameters * 4 * copies), _available_memory()
    return f"fp32 needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free" if needed > free else ""


def _available_memory() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit.isdecimal():
            free = min(free, int(limit) - used)
    except (OSError, ValueError):
        pass
    return free
