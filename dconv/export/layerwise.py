"""A model larger than memory, run by transformers layer by layer: weights are read where the pass comes to them.

The model is built without storage and runs its own forward pass. A layer's parameters are read as it begins and
forgotten as it ends; experts are read when tokens are sent to them, one by one; of an embedding the rows of the tokens;
and a matrix past its share of the budget is multiplied by rows. Nothing but names of parameters ties this to an
architecture, and the weights may lie in any container (`dconv.net.weights`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.checkpoint.source import beside
from dconv.errors import Damaged
from dconv.export import huggingface
from dconv.export.prompt import Answers, Prompt, kind_of
from dconv.export.runtimes import obstacle as lacks
from dconv.net.lazy import hold
from dconv.net.skeleton import built, fill_computed, layers_of
from dconv.net.weights import Weights
from dconv.pipeline import Described
from dconv.sharding.allocation import return_freed_memory

#: Each takes a pass over all weights.
_NEW_TOKENS: Final = 3


def obstacle(model: Described) -> str:
    """Why a model cannot be run layer by layer, for a person; empty when it can."""
    coded = sorted({spec.dtype for spec in model.logical.specs.values()} - {"f64", "f32", "f16", "bf16"})
    if any(dtype.startswith("f8") for dtype in coded):
        return "its FP8 weights have no scales here"
    return lacks("huggingface", model.family, model.config)


def can_infer(model: Described, prompt: Prompt, budget: int) -> dict[str, object]:
    """Run a few tokens, and continue them greedily.

    Args:
        model: as it is described, in any container.
        prompt: how it is asked; its tokens are those that are run.
        budget: bytes that weights may take at a time, beside about 10 MB to read and compute with.

    Returns:
        runtime, model, layers (each of them finite), unread (tensors without a place in the model), largest_logit;
        continuation (text), or tokens where there is no tokenizer.

    Raises:
        Damaged: weights are missing or of another shape, or what a layer computes is not finite.
        Refused: the budget is too small for the largest thing that is needed at once.
        ToolMissing: transformers cannot build the model.
    """
    with opened(model, budget) as (net, layers, folder, unread):
        answers = huggingface.forward(net, prompt)
        return {
            "runtime": f"{huggingface.runtime_of(net)}, layer by layer in {budget / 1e6:,.0f} MB",
            "model": type(net).__name__,
            "layers": layers,
            "unread": list(unread),
            "largest_logit": huggingface.largest(answers, model.source.root),
            **_continued(net, folder, prompt),
        }


def answers_of(model: Described, prompt: Prompt, budget: int) -> Answers:
    """What the model answers; arguments and errors as for `can_infer`."""
    with opened(model, budget) as (net, *_):
        return huggingface.forward(net, prompt)


@contextlib.contextmanager
def opened(model: Described, budget: int) -> Generator[tuple[Any, int, Path, tuple[str, ...]]]:
    """A model of transformers that reads its weights as it runs; its files are closed at the end.

    Args:
        model: as it is described, in any container.
        budget: bytes that weights may take at a time.

    Yields:
        The model, its number of layers, a directory with its config and tokenizer, and the tensors that it has no place
        for.

    Raises:
        Damaged: weights are missing or of another shape.
        Refused: the budget is too small for the largest thing that is needed at once.
        ToolMissing: transformers cannot build the model.
    """
    import torch

    return_freed_memory()
    with beside(model.source.side) as folder:
        config = {key: value for key, value in model.config.items() if key != "auto_map"}  # no code is run
        (folder / "config.json").write_text(json.dumps(config))
        net = built(folder, huggingface.AUTO[kind_of(model.family)], model.source.root, family=model.family)
        net = net.eval().requires_grad_(False)
        with torch.no_grad():
            fill_computed(net, net)
        weights = Weights(model.logical, net)
        try:
            yield net, _prepare(net, weights, budget), folder, weights.unused
        finally:
            weights.close()


def _prepare(net: Any, weights: Weights, budget: int) -> int:
    """Make every module read what it needs as its turn comes; returns the number of layers."""
    layers = dict(layers_of(net))
    prefixes = tuple(f"{name}." for name in layers)
    for name, layer in layers.items():
        hold(layer, name, weights, budget)
        layer.register_forward_hook(partial(_require_finite, name))
    for name, module in net.named_modules():
        if name not in layers and not name.startswith(prefixes):
            hold(module, name, weights, budget, alone=True)
    return len(layers)


def _require_finite(name: str, _module: Any, _given: Any, output: Any) -> None:
    """Raise Damaged where what the layer computes is not finite: the first such layer is at fault."""
    held: Any = output  # not narrowed: what a tuple has is of any type
    hidden = held[0] if isinstance(output, tuple) else held
    if not bool(hidden.isfinite().all()):
        raise Damaged(
            "a layer computes no finite values",
            where=name,
            expected="finite hidden states, as all layers before it have",
            found="NaN or infinity",
        )


def _continued(net: Any, folder: Path, prompt: Prompt) -> dict[str, object]:
    """What follows a sentence; where there is no tokenizer to read it with, the tokens that follow the prompt."""
    shown = huggingface.continuation(folder, prompt, partial(_greedy, net, prompt))
    if shown.get("no_text") == "no tokenizer":
        shown["tokens"] = _greedy(net, prompt, prompt.tokens[:1, prompt.image is not None :])[0, -_NEW_TOKENS:].tolist()
    return shown


def _greedy(net: Any, prompt: Prompt, sentence: NDArray[np.int64]) -> NDArray[np.int64]:
    """A sentence's tokens and those that follow (of an encoder-decoder these alone), a pass over the weights each."""
    first = prompt.tokens[:1, : prompt.image is not None]
    start = getattr(net.config, "decoder_start_token_id", None) or 0
    made = sentence if prompt.replies is None else np.array([[start]])
    for _ in range(_NEW_TOKENS):
        if prompt.replies is None:
            asked = replace(prompt, tokens=np.concatenate([first, made], 1))
        else:
            asked = replace(prompt, tokens=sentence, replies=made)
        last = huggingface.forward(net, asked)[0][:, -1].argmax(-1)
        made = np.concatenate([made, last[:, None]], 1)
    return made
