"""Which container a path is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dconv.checkpoint import hub, huggingface, legacy, megatron, meta, torch_dist
from dconv.checkpoint.source import Source
from dconv.errors import Damaged, Refused, UsageError

#: ``--from`` -> how to open it, given the directory with the shards. ``meta``, which takes an option, stands below.
OPENERS: Final[dict[str, Callable[[Path], Source]]] = {
    "huggingface": huggingface.open_source,
    "torch_dist": torch_dist.open_source,
    "legacy": legacy.open_source,
}
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
    if kind == "meta":
        return meta.open_source(folder, own_config=own_config)
    opener = OPENERS.get(kind or "")
    if opener is None:
        raise Refused(
            "not a checkpoint that dconv reads, nothing was written",
            where=str(folder),
            expected="HuggingFace weights, mp_rank_*, torch_dist's metadata.json, or Meta's consolidated.*.pth",
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
    if huggingface.is_huggingface(folder):
        return "huggingface"
    if meta.is_meta(folder):
        return "meta"
    return "huggingface" if (folder / "config.json").exists() else None
