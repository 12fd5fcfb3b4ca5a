"""The real torch and transformers as judges of state dicts: torch opens the files, transformers runs the model.

transformers knows neither one file a rank, nor BMTrain's names, nor house spellings, and not all that a GGUF says: it
runs a temporary copy under its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dconv.errors import Damaged, ToolMissing
from dconv.export import huggingface
from dconv.export.prompt import Answers, Prompt
from dconv.pipeline import Request, prepare, run
from dconv.sharding.rank import Settings


def can_infer(path: Path, prompt: Prompt, **options: Any) -> dict[str, object]:
    """Open every file with ``torch.load(weights_only=True)``, then run a few tokens.

    Args:
        path: a directory, or a file.
        prompt: how the model is asked; its tokens are those that are run.
        options: as for `dconv.pipeline.describe_model`.

    Returns:
        As `dconv.export.huggingface.can_infer`.

    Raises:
        Damaged: torch cannot open a file, or the logits are not finite.
        ToolMissing: torch or transformers is not installed, or fails.
    """
    with _copy(path, options) as folder:
        return huggingface.can_infer(folder, prompt, model_type=options.get("model_type"))


def answers_of(path: Path, prompt: Prompt, **options: Any) -> Answers:
    """What the model answers; arguments and errors as for `can_infer`."""
    with _copy(path, options) as folder:
        return huggingface.answers_of(folder, prompt, model_type=options.get("model_type"))


@contextmanager
def _copy(path: Path, options: dict[str, Any]) -> Generator[Path]:
    """A temporary HuggingFace directory of the same model."""
    with tempfile.TemporaryDirectory(prefix="dconv-run-") as scratch:
        out = Path(scratch, "model")
        job = prepare(Request(path, "huggingface", out, **options))
        if job.source.coded:  # as exact as what it is compared with may be
            job = prepare(Request(path, "huggingface", out, dtype="f32", **options))
        for name in job.source.files:
            if not name.endswith((".safetensors", ".gguf")):
                _open(job.source.root / name)
        run(job, Settings())
        yield out


def _open(file: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise ToolMissing(
            "torch is needed to open a state dict", found=str(error), do="pip install 'dconv[megatron]'"
        ) from error
    with file.open("rb") as opened:
        zipped = opened.read(2) == b"PK"  # the older form cannot be mapped
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever torch raises about one file
        raise Damaged("torch cannot open a state dict", where=str(file), found=f"{error}"[:300]) from error
