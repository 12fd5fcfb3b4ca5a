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
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.graphs import FILES, PORTS, exported_on
from dconv.checkpoint.torchframe import ZipWriter
from dconv.describe import Described
from dconv.errors import ToolMissing
from dconv.export.graph_run import (
    Loaded,
    answers,
    archive,
    infer,
    loading,
    ports_of,
    runs_code,
)
from dconv.export.prompt import Answers, Prompt
from dconv.export.traced import Export, Weightless, exported, in_archive, ports_json, weightless
from dconv.net.device import placed
from dconv.net.places import Parameter
from dconv.request import Request
from dconv.sharding.parsed import is_dict
from dconv.sharding.plan import Target

_ROOT: Final = "model"
_WEIGHTS: Final = f"data/weights/{_ROOT}_weights_config.json"
_PAYLOAD: Final = re.compile(r"data/weights/weight_\d+")
#: Of a writer, not of what is written; our own frame has torch's form of it.
_OWN: Final = (".data/serialization_id", "byteorder")
_FORMAT: Final = "torch_export"


def export(request: Request, model: Described) -> Export:
    """The archive, config and tokenizer to be written.

    Raises:
        Refused, ToolMissing: see `dconv.export.traced.weightless` and ``exported``; torch writes another archive.
    """
    found = weightless(model, request)
    records = _records(exported(found))
    device, notes = placed(request.device)
    records = {name: exported_on(data, device) if name.endswith(".json") else data for name, data in records.items()}
    return Export(model, _framed(found, records, model, device), notes)


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


def _framed(found: Weightless, records: dict[str, bytes], model: Described, device: str) -> Target:
    homes = {f"model.{name}": number for number, one in enumerate(found.held) for name in (one.spec.name, *one.alike)}
    config = json.loads(records[_WEIGHTS])
    for name, entry in config["config"].items():
        entry["path_name"] = f"weight_{homes[name]}"
        _check(entry, found.held[homes[name]])
    made = {
        _WEIGHTS: json.dumps(config).encode(),
        f"extra/{PORTS}": ports_json(found.graph, found.dtype, device),
        "byteorder": b"little",
    }
    writer = ZipWriter(0, _ROOT)
    for name, content in {**records, **made}.items():
        writer.add(name, content)
    return in_archive(model, found, FILES[_FORMAT], writer, "data/weights/weight_")


def _check(entry: Mapping[str, Any], one: Parameter) -> None:
    """What torch says of a tensor must be what is written."""
    meta = entry["tensor_meta"]
    sizes = tuple(size["as_int"] for size in meta["sizes"])
    steps: list[int] = []
    step = 1
    for size in reversed(sizes):
        steps.append(step)
        step *= max(size, 1)
    strides = [stride["as_int"] for stride in meta["strides"]]
    if (
        entry["use_pickle"]
        or sizes != one.spec.file_shape
        or strides != steps[::-1]
        or meta["storage_offset"]["as_int"]
    ):
        raise _other_archive(f"{one.spec.name}: {meta}"[:300])


def _has_tensors_alone(config: bytes) -> bool:
    """Whether a list of an archive's weights or constants is one, and says of each that its bytes are a tensor's."""
    try:
        said = json.loads(config)
    except (ValueError, RecursionError):
        return False
    listed = said.get("config", {}) if is_dict(said) else None
    return is_dict(listed) and all(
        is_dict(entry) and not entry.get("use_pickle") and bool(entry.get("tensor_meta")) for entry in listed.values()
    )


def load(path: Path) -> Loaded:
    """The program of an archive, ready to be run.

    Raises:
        Refused: it holds pickled objects, which are code.
        Damaged, ToolMissing: see `dconv.export.graph_run.archive` and ``loading``.
    """
    import torch

    found = archive(path, _FORMAT)
    for name in found.records:
        if name.endswith("_config.json") and not _has_tensors_alone(found.read(name)):
            raise runs_code(found, name)
        if name.startswith("data/sample_inputs/"):
            try:
                torch.load(io.BytesIO(found.read(name)), weights_only=True)
            except Exception as error:  # whatever torch raises about a pickle that it does not take
                raise runs_code(found, name) from error
    said = {PORTS: ""}
    with loading(found):
        program = torch.export.load(str(found.path), extra_files=said)
        ports = ports_of(found, said[PORTS])
        return Loaded(program.module(), ports, f"torch.export of torch {torch.__version__}")


def answers_of(path: Path, prompt: Prompt, **_: Any) -> Answers:
    """What the graph answers; errors as for `load`."""
    return answers(load(path), prompt)


def can_infer(path: Path, prompt: Prompt, **_: Any) -> dict[str, object]:
    """Run a few tokens, and continue a sentence greedily where there is a tokenizer.

    Returns:
        As `dconv.export.huggingface.can_infer`, and ``computed``: in what dtype and where.

    Raises:
        Damaged: the logits are not finite; else as `load`.
    """
    return infer(load(path), path, prompt)
