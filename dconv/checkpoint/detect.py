"""Which container a path is."""

from __future__ import annotations

import os
from pathlib import Path

from dconv.checkpoint import huggingface, legacy, megatron, torch_dist
from dconv.checkpoint.source import Source
from dconv.errors import Damaged, Refused, UsageError

#: ``--from`` -> how to open it, given the directory with the shards.
OPENERS = {
    "huggingface": huggingface.open_source,
    "torch_dist": torch_dist.open_source,
    "legacy": legacy.open_source,
}
_SPELLINGS = {"hf": "huggingface", "safetensors": "huggingface", "torch": "legacy"}


def open_source(path: Path, said: str | None = None) -> Source:
    """Describe the checkpoint at ``path``.

    Args:
        said: what ``--from`` says it is; None detects it.

    Raises:
        UsageError: there is nothing at ``path``.
        Refused: nothing that dconv reads.
        Damaged: a checkpoint that is not whole.
    """
    if not os.path.lexists(path):
        raise UsageError("there is no such checkpoint", where=str(path), expected="a directory")
    if not path.is_dir():
        raise Refused("a checkpoint is a directory", where=str(path), found="a file")
    folder = megatron.find_iteration(path)
    kind = _SPELLINGS.get(said or "", said) if said and said != "megatron" else _kind(folder)
    opener = OPENERS.get(kind or "")
    if opener is None:
        raise Refused(
            "not a checkpoint that dconv reads, nothing was written",
            where=str(folder),
            expected="HuggingFace weights, mp_rank_* directories, or torch_dist's metadata.json",
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "an empty directory",
        )
    return opener(folder)


def _kind(folder: Path) -> str | None:
    if torch_dist.is_torch_dist(folder):
        return "torch_dist"
    if legacy.is_legacy(folder):
        return "legacy"
    if any(folder.glob("__*.distcp")):
        raise Damaged(
            "an unfinished torch_dist checkpoint",
            where=str(folder),
            expected="metadata.json, which Megatron writes last",
        )
    if huggingface.is_huggingface(folder) or (folder / "config.json").exists():
        return "huggingface"
    return None
