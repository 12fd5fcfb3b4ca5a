"""Which runtime runs a checkpoint here, whether it computes the model, and whether there is memory for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Container, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dconv.arch.family import Family
from dconv.export.megatron_config import not_computed
from dconv.export.prompt import Kind, kind_of
from dconv.net import own
from dconv.targets import GRAPHS

#: How transformers calls its lists of models.
_MAPPINGS: Final[dict[Kind, str]] = {
    "decoder": "CAUSAL_LM",
    "hybrid": "CAUSAL_LM",
    "encoder": "PRETRAINING",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "sighted": "IMAGE_TEXT_TO_TEXT",
}


def as_run(container: str, *said: object) -> str:
    """The container that a source is run as: transformers cannot be told of house spellings, or of one model of two.

    Args:
        container: `dconv.checkpoint.source.Source.format`.
        said: what a loader would have to be told (``--rename``, ``--submodel``); a copy under plain names is run then.
    """
    own = container.startswith("megatron") or container in GRAPHS or (container == "huggingface" and not any(said))
    return container if own else "pt"


def runtime_of(container: str) -> ModuleType:
    """The module with ``can_infer`` and ``answers_of`` for a container.

    State dicts of all kinds are run by transformers from a copy.
    """
    if container == "huggingface":
        from dconv.export import huggingface

        return huggingface
    if container in GRAPHS:
        return import_module(f"dconv.export.{container}")
    if not container.startswith("megatron"):
        from dconv.export import state_dict

        return state_dict
    from dconv.export import megatron

    return megatron


def missing(container: str) -> str:
    """The module that running a container needs and that is not installed; empty when there is none."""
    needed = ("torch", "megatron", "megatron.core") if container.startswith("megatron") else ("torch", "transformers")
    if container == "onnx":
        needed = ("onnx", "onnxruntime")
    return next((module for module in needed if importlib.util.find_spec(module) is None), "")


def obstacle(container: str, family: Family, config: Mapping[str, Any], args: Mapping[str, Any] | None = None) -> str:
    """Why the runtime of a container does not compute this model, by the family's name; empty where it does.

    Args:
        container: `dconv.checkpoint.source.Source.format`, or an engine of `dconv.pipeline.FORMATS`.
        family: the model's.
        config: config.json.
        args: Megatron's, where they are not what the config translates to.
    """
    if container == "neuron":
        return "what runs Neuron's tensors runs on Neuron only; dconv diff compares them with the source"
    kind = kind_of(family)
    if container.startswith("megatron"):
        said = family.config.to_args(config, strict=False) if args is None else args
        found = not_computed(said, hybrid=kind == "hybrid")
        return f"megatron-core on a CPU does not compute {family.name}: {', '.join(found)}" if found else ""
    from transformers import __version__

    named = config.get("model_type")
    if own.is_ours(family, config):
        return own.obstacle(family, config)
    known = named in _known(kind)
    return "" if known else f"transformers {__version__} has no model of type {named} ({family.name})"


def _known(kind: Kind) -> Container[object]:
    """Every ``model_type`` that transformers has a class of this kind for."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, f"MODEL_FOR_{_MAPPINGS[kind]}_MAPPING_NAMES")


def is_traced(family: Family) -> bool | None:
    """Whether graphs are made of a family (`dconv.export.traced`); None where transformers is not installed."""
    if kind_of(family) == "sighted":
        return False
    if missing("huggingface"):
        return None
    named = family.config.model_type
    return own.is_ours(family, {"model_type": named}) or named in _known(kind_of(family))


def shortage(parameters: int, container: str) -> str:
    """Why a model cannot be run in fp32 in the memory that is free now; empty when it can.

    Args:
        parameters: how many numbers it has.
        container: whose runtime may hold them twice.
    """
    copies = 2.0 if container.startswith("megatron") else 1.25  # megatron-core fills a state dict, then the model
    needed, free = int(parameters * 4 * copies), available_memory()
    return f"fp32 needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free" if needed > free else ""


def available_memory() -> int:
    """Bytes that this process could still take: of the machine's memory, and of its control group's limit (v2)."""
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
