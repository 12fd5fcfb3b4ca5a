"""The real transformers as a judge of HuggingFace directories: load on the CPU in fp32 and compute.

Nothing is fetched and no code of the checkpoint runs. torch and transformers are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.checkpoint.files import read_json
from dconv.describe import describe_model
from dconv.errors import Damaged, DconvError, ToolMissing, group_names
from dconv.export.prompt import NEW_TOKENS, SENTENCE, Answers, Kind, Prompt
from dconv.net.lazy import fill
from dconv.net.own import is_ours, is_theirs
from dconv.net.skeleton import built, config_of, fill_computed, quiet
from dconv.net.weights import Weights

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
#: transformers' class that picks a model by its config.
AUTO: Final[dict[Kind, str]] = {
    "decoder": "AutoModelForCausalLM",
    "hybrid": "AutoModelForCausalLM",
    "encoder": "AutoModelForPreTraining",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "sighted": "AutoModelForImageTextToText",
}


def can_infer(
    path: Path, prompt: Prompt, *, hf_config: Path | None = None, model_type: str | None = None, **_: Any
) -> dict[str, object]:
    """Run a few tokens, and continue a sentence greedily where there is a tokenizer.

    Args:
        path: the directory.
        prompt: how the model is asked; its tokens are those that are run.
        hf_config: directory of config.json, when it is not in ``path``.
        model_type: the family, where it is not the one that the config says.

    Returns:
        runtime, model, largest_logit, and continuation (text) or no_text (why there is none).

    Raises:
        Damaged: weights are missing or of another shape, or the logits are not finite.
        ToolMissing: transformers is not installed, or fails to load the directory.
    """
    model = _load(path, hf_config, prompt.kind, model_type)
    shown: dict[str, object] = {
        "runtime": runtime_of(model),
        "model": type(model).__name__,
        "largest_logit": largest(forward(model, prompt), path),
    }
    return shown | continuation(hf_config or path, prompt, partial(_generated, model, prompt))


def runtime_of(model: Any) -> str:
    """The version of transformers that computes a model, and whether its layers are ours, for a person."""
    import transformers

    theirs = f"transformers {transformers.__version__}"
    if not hasattr(model, "expert_parts"):
        return theirs
    return f"dconv's layers on {theirs}" + (", with words alone" if model.stored_under else "")


def largest(answers: Answers, path: Path) -> float:
    """The largest logit by magnitude, of the words.

    Args:
        answers: all of them must be finite.
        path: where the model is, for the error.

    Raises:
        Damaged: one is not finite.
    """
    if not all(np.isfinite(answer).all() for answer in answers):
        raise Damaged("the model computes no finite logits", where=str(path), found="NaN or infinity")
    return float(np.abs(answers[0]).max())


def answers_of(
    path: Path, prompt: Prompt, *, hf_config: Path | None = None, model_type: str | None = None, **_: Any
) -> Answers:
    """What the model answers; arguments and errors as for `can_infer`."""
    return forward(_load(path, hf_config, prompt.kind, model_type), prompt)


def _load(path: Path, hf_config: Path | None, kind: Kind, model_type: str | None) -> Any:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ToolMissing(
            "transformers is needed to run a HuggingFace checkpoint",
            found=str(error),
            do="pip install 'dconv[megatron]'",
        ) from error
    if (ours := _ours(path, hf_config, kind, model_type)) is not None:
        return ours
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            config = config_of(hf_config or path)
            loaded: Any = getattr(transformers, AUTO[kind]).from_pretrained(
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
    return model.float().eval()  # of a quantised one transformers leaves what is plain in the file's dtype


def _ours(path: Path, hf_config: Path | None, kind: Kind, model_type: str | None) -> Any:
    """A model of `dconv.net.own` with its weights; None where transformers has its own or there is none."""
    import torch

    folder = hf_config or path
    if is_theirs(read_json(folder / "config.json", what="config.json")):
        return None
    model = describe_model(path, hf_config=hf_config, model_type=model_type)
    if not is_ours(model.family, model.config):
        return None
    net = built(folder, AUTO[kind], path, family=model.family).eval().requires_grad_(False)
    with torch.no_grad():
        fill_computed(net, net)
    weights = Weights(model.logical, net)
    try:
        fill(net, weights)
    finally:
        weights.close()
    return net


def forward(model: Any, prompt: Prompt) -> Answers:
    """What a model of transformers answers: one pass without gradients, logits in fp32."""
    import torch

    def given(values: NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(values)

    with torch.no_grad(), quiet():
        if prompt.types is not None:
            words = model(input_ids=given(prompt.tokens), token_type_ids=given(prompt.types))
            return words.prediction_logits.float().numpy(), words.seq_relationship_logits.float().numpy()
        inputs: dict[str, torch.Tensor] = {"input_ids": given(prompt.with_places())}
        if prompt.replies is not None:
            inputs["decoder_input_ids"] = given(prompt.replies)
        if prompt.image is not None:
            inputs["pixel_values"] = given(prompt.image)
        return (model(**inputs, use_cache=False).logits.float().numpy(),)


def continuation(
    folder: Path, prompt: Prompt, write: Callable[[NDArray[np.int64]], NDArray[np.int64]]
) -> dict[str, object]:
    """A sentence and what follows it.

    Args:
        folder: with the tokenizer.
        prompt: how the model is asked; an encoder writes nothing.
        write: makes of a sentence's tokens [1, length] those of the text.

    Returns:
        continuation (text) or no_text (why there is none).
    """
    if prompt.kind == "encoder":
        return {"no_text": "an encoder writes none"}
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return {"no_text": "no tokenizer"}
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    try:
        with quiet():
            tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            made = write(tokenizer(SENTENCE, return_tensors="np")["input_ids"])
            return {"continuation": tokenizer.decode(made[0], skip_special_tokens=True)}
    except DconvError:
        raise
    except Exception as error:  # a broken tokenizer says nothing about the weights
        return {"no_text": f"the tokenizer fails: {type(error).__name__}: {error}"[:200]}


def _generated(model: Any, prompt: Prompt, sentence: NDArray[np.int64]) -> NDArray[np.int64]:
    """Greedily, by transformers' own loop."""
    import torch

    inputs: dict[str, torch.Tensor] = {"input_ids": torch.as_tensor(sentence)}
    if prompt.image is not None:
        places = prompt.with_places()[:, : prompt.patches]
        inputs = {
            "input_ids": torch.as_tensor(np.concatenate([places, sentence], 1)),
            "pixel_values": torch.as_tensor(prompt.image),
        }
    with torch.no_grad():
        # a pad token that the config lacks would be warned about and is not used for one row
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return made[:, prompt.patches :].numpy()
