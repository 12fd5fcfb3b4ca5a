"""The real transformers as a judge of HuggingFace directories: load on the CPU in fp32 and compute.

Nothing is fetched and no code of the checkpoint runs. torch and transformers are imported inside the functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import Damaged, ToolMissing, group_names

_PROMPT: Final = "The capital of France is"
_NEW_TOKENS: Final = 12
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def can_infer(path: Path, tokens: NDArray[np.int64], *, hf_config: Path | None = None, **_: Any) -> dict[str, object]:
    """Run a few tokens, and continue a sentence greedily where there is a tokenizer.

    Args:
        tokens: int64 [batch, sequence].
        hf_config: directory of config.json, when it is not in ``path``.

    Returns:
        runtime, model, largest_logit, and continuation (text) or no_text (why there is none).

    Raises:
        Damaged: weights are missing or of another shape, or the logits are not finite.
        ToolMissing: transformers is not installed, or fails to load the directory.
    """
    model = _load(path, hf_config)
    import transformers

    result = _forward(model, tokens)
    if not np.isfinite(result).all():
        raise Damaged("the model computes no finite logits", where=str(path), found="NaN or infinity")
    shown: dict[str, object] = {
        "runtime": f"transformers {transformers.__version__}",
        "model": type(model).__name__,
        "largest_logit": float(np.abs(result).max()),
    }
    return shown | _continuation(model, hf_config or path)


def logits_of(path: Path, tokens: NDArray[np.int64], *, hf_config: Path | None = None, **_: Any) -> NDArray[np.float32]:
    """fp32 logits [batch, sequence, vocabulary]; arguments and errors as for `can_infer`."""
    return _forward(_load(path, hf_config), tokens)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _load(path: Path, hf_config: Path | None) -> Any:
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ToolMissing(
            "transformers is needed to run a HuggingFace checkpoint",
            found=str(error),
            do="pip install 'dconv[megatron]'",
        ) from error
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(hf_config or path, **local)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                **local,
            )
    except Exception as error:  # whatever a framework raises about one directory
        raise ToolMissing(
            "transformers cannot load this directory",
            where=str(path),
            found=f"{type(error).__name__}: {error}"[:600],
        ) from error
    model, info = loaded
    lacking = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
    if lacking:
        raise Damaged("weights that the model needs are missing", where=f"{group_names(lacking)}\nin {path}")
    return model.eval()


def _forward(model: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad(), _quiet():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.float().numpy()


def _continuation(model: Any, folder: Path) -> dict[str, object]:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return {"no_text": "no tokenizer"}
    import torch
    from transformers import AutoTokenizer

    try:
        with torch.no_grad(), _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            prompt = tokenizer(_PROMPT, return_tensors="pt")
            # a pad token that the config lacks would be warned about and is not used for one row
            made = model.generate(**prompt, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0)
            return {"continuation": tokenizer.decode(made[0], skip_special_tokens=True)}
    except Exception as error:  # a broken tokenizer says nothing about the weights
        return {"no_text": f"the tokenizer fails: {type(error).__name__}: {error}"[:200]}
