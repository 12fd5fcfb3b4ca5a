"""Which container a path is."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Final

from dconv.checkpoint import huggingface, megatron, signs
from dconv.checkpoint.files import listed, read_json
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Source
from dconv.errors import Damaged, Refused, StorageFault, UsageError

#: What ``--from`` takes, each a module of this room with ``open_source``, imported when it is needed.
CONTAINERS: Final = (
    "huggingface",
    "torch_dist",
    "legacy",
    "model_pt",
    "pt",
    "bmtrain",
    "meta",
    "neuron",
    "mlx",
    "gguf",
    "onnx",
)
_SPELLINGS: Final = {"hf": "huggingface", "safetensors": "huggingface", "torch": "legacy", "modelcenter": "bmtrain"}
#: What ``--from megatron`` may find.
_MEGATRON: Final = ("torch_dist", "legacy", "model_pt")
#: Those whose own config may be left unread, since another one is given.
_TRANSLATED: Final = ("meta", "bmtrain", "model_pt", "gguf")


def open_source(
    path: Path,
    said: str | None = None,
    *,
    own_config: bool = True,
    rename: Renaming = AS_STORED,
    config_alone: bool = False,
) -> Source:
    """Describe the checkpoint at ``path``: a directory, a file, or a name on the hub where there is neither.

    Args:
        path: a directory, a file, or a name on the hub.
        said: what ``--from`` says it is; None detects it.
        own_config: False when a config comes from elsewhere, so that the checkpoint's own need not be understood.
        rename: gives the stored tensors other names before they are looked at.
        config_alone: take a directory with config.json and no weights for the model that it speaks of.

    Raises:
        UsageError: there is nothing at ``path``.
        Refused: nothing that dconv reads; a renaming that does not fit.
        Damaged: a checkpoint that is not whole.
    """
    if not _is_there(path):
        from dconv.checkpoint import hub  # only where a name is no path

        name = hub.parse(path)
        if name is None:
            raise UsageError(
                "there is no such checkpoint", where=str(path), expected="a directory, or org/name on the hub"
            )
        path = hub.fetch(*name)
    if said and said not in CONTAINERS and said not in _SPELLINGS and said != "megatron":
        import difflib  # only where a name is wrong

        close = difflib.get_close_matches(said, (*CONTAINERS, *_SPELLINGS), 1)
        raise UsageError(
            f"no container is called {said}, nothing was written",
            where="--from",
            expected="one of megatron, " + ", ".join((*CONTAINERS, *_SPELLINGS)),
            do=f"did you mean {close[0]}?" if close else "leave --from out: it is detected",
        )
    if not said and signs.archives(path):
        from dconv.checkpoint import graphs  # only where there may be one

        if graph := graphs.archive_of(path):
            return graphs.open_source(graph)
    if not (path.is_dir() or signs.is_state_dict(path) or signs.is_gguf(path) or path.suffix == signs.ONNX):
        beside = path.suffix == ".safetensors" or path.name == "config.json"
        raise Refused(
            "a checkpoint is a directory, a state dict's file, a GGUF, or an ONNX graph",
            where=str(path),
            expected=f"a directory, or a file of {', '.join((*signs.STATE_DICTS, signs.GGUF, signs.ONNX))}",
            found="another file",
            do=f"name the directory that it lies in: {path.parent}" if beside else "",
        )
    folder = megatron.find_iteration(path) if path.is_dir() else path
    kind = _SPELLINGS.get(said or "", said) if said and said != "megatron" else _kind(folder, rename)
    if kind not in CONTAINERS:
        raise Refused(
            "not a checkpoint that dconv reads, nothing was written",
            where=str(folder),
            expected="HuggingFace weights, mp_rank_*, torch_dist's metadata.json, model.pt with metadata.json, one "
            "state dict, Meta's consolidated.*.pth, a GGUF, or an ONNX graph",
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "an empty directory",
        )
    if said == "megatron" and kind not in _MEGATRON:
        raise Refused(
            "not a Megatron checkpoint, nothing was written",
            where=str(folder),
            expected="mp_rank_*, torch_dist's metadata.json, or model.pt with metadata.json",
            found=f"what is read as {kind}",
            do="leave --from out: it is detected",
        )
    if folder.is_file() and kind not in ("pt", "bmtrain", "model_pt", "gguf", "onnx"):
        raise Refused(f"a {kind} checkpoint is a directory", where=str(folder), found="a file")
    if config_alone and kind == "huggingface" and not huggingface.is_huggingface(folder):
        from dconv.checkpoint import config_alone as described

        return described.open_source(folder)
    options = {"own_config": own_config} if kind in _TRANSLATED else {}
    source = import_module(f"dconv.checkpoint.{kind}").open_source(folder, rename=rename, **options)
    rename.check_used(folder)
    rename.check_submodel(folder)
    return _submodel(source, rename) if rename.submodel else source


def _submodel(source: Source, rename: Renaming) -> Source:
    """One model of a distillation checkpoint. Config and args beside a student are the student's, not its teacher's."""
    left_out = {**source.left_out, **rename.left_out()}
    if rename.submodel == "teacher" and "student" in rename.seen:
        folder = megatron.side_folder(source.root)
        config, side = megatron.sides(folder / megatron.TEACHER) if folder else (None, {})
        args = (source.args or {}).get(megatron.TEACHER_ARGS)
        source = replace(source, config=config, side=side, args=args if isinstance(args, dict) else None)
    return replace(source, left_out=left_out)


def _is_there(path: Path) -> bool:
    """Unlike `os.path.lexists`, what cannot be looked at is an error.

    Raises:
        StorageFault: see above.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no path at all
        return False
    except OSError as fault:
        if fault.errno == errno.ENAMETOOLONG:
            return False
        raise StorageFault(f"cannot look at the checkpoint: {fault.strerror}", where=str(path)) from fault
    return True


def _kind(folder: Path, rename: Renaming) -> str | None:
    if folder.is_file():
        if signs.is_gguf(folder):
            return "gguf"
        if folder.suffix == signs.ONNX:
            return "onnx"
        from dconv.checkpoint import state_dict  # only where there is one

        return state_dict.read(folder, rename).container
    marker = folder / "metadata.json"
    if marker.exists() and read_json(marker, what=marker.name).get("sharded_backend") == "torch_dist":
        return "torch_dist"
    if marker.exists() and (folder / signs.MODEL_PT).exists():
        return "model_pt"
    if listed(folder, "mp_rank_*"):
        return "legacy"
    if listed(folder, "__*.distcp"):
        raise Damaged(
            "an unfinished torch_dist checkpoint",
            where=str(folder),
            expected="metadata.json, which Megatron writes last",
        )
    if huggingface.is_huggingface(folder):
        return "neuron" if signs.is_neuron(folder) else "mlx" if signs.is_mlx(folder) else "huggingface"
    if listed(folder, "consolidated.*.pth"):
        return "meta"
    if any(signs.is_state_dict(entry) for entry in folder.iterdir()):
        from dconv.checkpoint import state_dict

        if state_dict.find(folder) is not None:
            return state_dict.read(folder, rename).container
    if listed(folder, f"*{signs.GGUF}"):
        return "gguf"
    if signs.has_onnx(folder):
        return "onnx"
    return "huggingface" if (folder / "config.json").exists() else None
