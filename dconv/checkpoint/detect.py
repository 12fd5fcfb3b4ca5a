"""Which container a path is."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Final

from dconv.checkpoint import huggingface, megatron
from dconv.checkpoint.files import read_json
from dconv.checkpoint.source import Source
from dconv.errors import Damaged, Refused, UsageError

#: What ``--from`` takes, each a module of this room with ``open_source``, imported when it is needed.
CONTAINERS: Final = ("huggingface", "torch_dist", "legacy", "meta")
_SPELLINGS: Final = {"hf": "huggingface", "safetensors": "huggingface", "torch": "legacy"}


def open_source(path: Path, said: str | None = None, *, own_config: bool = True) -> Source:
    """Describe the checkpoint at ``path``: a directory, or a name on the hub where there is no such directory.

    Args:
        said: what ``--from`` says it is; None detects it.
        own_config: False when a config comes from elsewhere, so that a params.json need not be understood.

    Raises:
        UsageError: there is nothing at ``path``.
        Refused: nothing that dconv reads.
        Damaged: a checkpoint that is not whole.
    """
    if not os.path.lexists(path):
        from dconv.checkpoint import hub  # only where a name is no path

        name = hub.parse(path)
        if name is None:
            raise UsageError(
                "there is no such checkpoint", where=str(path), expected="a directory, or org/name on the hub"
            )
        path = hub.fetch(*name)
    if not path.is_dir():
        raise Refused("a checkpoint is a directory", where=str(path), found="a file")
    folder = megatron.find_iteration(path)
    kind = _SPELLINGS.get(said or "", said) if said and said != "megatron" else _kind(folder)
    if kind not in CONTAINERS:
        raise Refused(
            "not a checkpoint that dconv reads, nothing was written",
            where=str(folder),
            expected="HuggingFace weights, mp_rank_*, torch_dist's metadata.json, or Meta's consolidated.*.pth",
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "an empty directory",
        )
    options = {} if kind != "meta" else {"own_config": own_config}
    return import_module(f"dconv.checkpoint.{kind}").open_source(folder, **options)


def _kind(folder: Path) -> str | None:
    marker = folder / "metadata.json"
    if marker.exists() and read_json(marker, what=marker.name).get("sharded_backend") == "torch_dist":
        return "torch_dist"
    if any(folder.glob("mp_rank_*")):
        return "legacy"
    if any(folder.glob("__*.distcp")):
        raise Damaged(
            "an unfinished torch_dist checkpoint",
            where=str(folder),
            expected="metadata.json, which Megatron writes last",
        )
    if huggingface.is_huggingface(folder):
        return "huggingface"
    if any(folder.glob("consolidated.*.pth")):
        return "meta"
    return "huggingface" if (folder / "config.json").exists() else None
