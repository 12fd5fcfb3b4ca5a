"""llama.cpp as the judge of a GGUF, through llama-cpp-python, where that is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import ToolMissing
from dconv.export.huggingface import largest
from dconv.export.prompt import NEW_TOKENS, SENTENCE, Answers, Prompt

#: Of a context: the question, and room for what is written.
_CONTEXT: Final = 256


def installed() -> bool:
    """Whether llama-cpp-python can be imported; nothing of it is."""
    return find_spec("llama_cpp") is not None


def can_infer(path: Path, prompt: Prompt, **_: Any) -> dict[str, object]:
    """Run a few tokens, and continue a sentence greedily.

    Args:
        path: a GGUF, or the first of a set.
        prompt: whose tokens are run, row by row.

    Returns:
        As `dconv.export.huggingface.can_infer`.

    Raises:
        Damaged: the logits are not finite.
        ToolMissing: llama.cpp does not load the file.
    """
    model, package = _load(path)
    answers = _answers(model, prompt)
    shown: dict[str, object] = {
        "runtime": f"llama-cpp-python {package.__version__}",
        "model": str(model.metadata.get("general.architecture")),
        "largest_logit": largest(answers, path),
    }
    model.reset()
    made = model.create_completion(SENTENCE, max_tokens=NEW_TOKENS, temperature=0.0)
    return {**shown, "continuation": SENTENCE + made["choices"][0]["text"]}


def answers_of(path: Path, prompt: Prompt, **_: Any) -> Answers:
    """What the model answers; arguments and errors as for `can_infer`."""
    return _answers(_load(path)[0], prompt)


def _load(path: Path) -> tuple[Any, Any]:
    try:
        package: Any = import_module("llama_cpp")
        wanted: dict[str, Any] = {"n_ctx": _CONTEXT, "n_gpu_layers": 0, "logits_all": True, "verbose": False}
        return package.Llama(model_path=str(path), **wanted), package
    except Exception as fault:  # whatever a library raises of one file
        raise ToolMissing(
            "llama.cpp does not load this GGUF", where=str(path), found=f"{type(fault).__name__}: {fault}"[:300]
        ) from fault


def _answers(model: Any, prompt: Prompt) -> Answers:
    rows: list[NDArray[np.float32]] = []
    for tokens in prompt.tokens:
        model.reset()
        model.eval([int(token) for token in tokens])
        rows.append(np.array(model.scores[: len(tokens)], np.float32))
    return (np.stack(rows),)
