"""torch.export (``.pt2``): the graph that torch traces without weights, and around it the archive that torch reads.

torch writes the archive of a program that has fake tensors for weights; its records go into a frame of ours, where the
weights have places that a plan fills. So every rank writes its share, and none holds the model.

Source of the archive's records: ``torch/export/pt2_archive/constants.py`` and ``_package.py``.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.source import seal, side_bytes
from dconv.checkpoint.torchframe import ZipWriter
from dconv.describe import Described
from dconv.errors import ToolMissing
from dconv.export.traced import PORTS, Weightless, exported, ports_json, weightless
from dconv.net.places import Parameter
from dconv.request import Request
from dconv.sharding.plan import Target, TargetFile, TargetTensor

FILE: Final = "model.pt2"
_ROOT: Final = "model"
_WEIGHTS: Final = f"data/weights/{_ROOT}_weights_config.json"
_PAYLOAD: Final = re.compile(r"data/weights/weight_\d+")
#: Of a writer, not of what is written; our own frame has torch's form of it.
_OWN: Final = (".data/serialization_id", "byteorder")


def lay_out(request: Request, model: Described) -> Target:
    """The archive, config and tokenizer to be written.

    Raises:
        Refused, ToolMissing: see `dconv.export.traced.weightless` and ``exported``; torch writes another archive.
    """
    found = weightless(model, request.dtype)
    records = _records(exported(found))
    _place_on(records, "cpu")
    return _framed(found, records, model)


def _records(program: Any) -> dict[str, bytes]:
    """What torch writes of a program, by name, without what it has of the weights themselves.

    Raises:
        ToolMissing: torch is older than this archive, or writes another one.
    """
    import torch

    held = io.BytesIO()
    try:
        torch.export.save(program, held)
    except Exception as error:  # a torch whose archive takes no fake tensors
        raise _other_archive(f"{type(error).__name__}: {error}"[:300]) from error
    with zipfile.ZipFile(held) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if not {_WEIGHTS, f"models/{_ROOT}.json", "archive_format"} <= names.keys():
            raise _other_archive(", ".join(sorted(names))[:300])
        kept = {key: name for key, name in names.items() if not _PAYLOAD.fullmatch(key) and key not in _OWN}
        return {key: archive.read(name) for key, name in sorted(kept.items())}


def _other_archive(found: str) -> ToolMissing:
    import torch

    return ToolMissing(
        "this torch writes another archive than is known here, nothing was written",
        where=f"torch {torch.__version__}",
        expected="weights in records of their own (torch 2.9 and later)",
        found=found,
    )


def _place_on(records: dict[str, bytes], device: str) -> None:
    """Say of every tensor that it lies on another device than the CPU, where the graph was traced."""
    kind, _, index = device.partition(":")
    said = {"type": kind, "index": int(index) if index else None}

    def placed(node: Any) -> Any:
        if isinstance(node, list):
            return [placed(it) for it in node]
        if isinstance(node, dict):
            return said if node.keys() == said.keys() else {key: placed(it) for key, it in node.items()}
        return node

    for name in [name for name in records if name.endswith(".json")]:
        records[name] = json.dumps(placed(json.loads(records[name]))).encode()


def _framed(found: Weightless, records: dict[str, bytes], model: Described) -> Target:
    homes = {f"model.{name}": number for number, one in enumerate(found.held) for name in (one.spec.name, *one.alike)}
    config = json.loads(records[_WEIGHTS])
    for name, entry in config["config"].items():
        entry["path_name"] = f"weight_{homes[name]}"
        _check(entry, found.held[homes[name]])
    made = {
        _WEIGHTS: json.dumps(config).encode(),
        f"extra/{PORTS}": ports_json(found.graph, found.dtype),
        "byteorder": b"little",
    }
    writer = ZipWriter(0, _ROOT)
    for name, content in {**records, **made}.items():
        writer.add(name, content)
    tensors = []
    for number, one in enumerate(found.held):
        offset = writer.reserve(f"data/weights/weight_{number}", one.spec.nbytes)
        tensors.append(TargetTensor(one.spec.name, FILE, offset, one.spec, one.slots))
    size = writer.finish()
    side = {name: path for name, path in model.source.side.items() if name != "config.json"}
    return Target(
        (TargetFile(FILE, size, tuple(writer.literals)),),
        tuple(tensors),
        lambda: side_bytes(found.config, side),
        seal(found.config, side),
        left_out={**model.logical.left_out, **found.left_out},
    )


def _check(entry: Mapping[str, Any], one: Parameter) -> None:
    """What torch says of a tensor must be what is written."""
    meta = entry["tensor_meta"]
    sizes = tuple(size["as_int"] for size in meta["sizes"])
    steps, step = [], 1
    for size in reversed(sizes):
        steps.append(step)
        step *= max(size, 1)
    strides = [stride["as_int"] for stride in meta["strides"]]
    if entry["use_pickle"] or sizes != one.spec.file_shape or strides != steps[::-1] or meta["storage_offset"]["as_int"]:
        raise _other_archive(f"{one.spec.name}: {meta}"[:300])
