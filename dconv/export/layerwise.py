"""A model larger than memory, run by transformers layer by layer: weights are read where the pass comes to them.

The model is built without storage and runs its own forward pass. A layer's parameters are read as it begins and
forgotten as it ends; experts are read when tokens are sent to them, one by one; of an embedding the rows of the tokens;
and a matrix past its share of the budget is multiplied by rows. Nothing but names of parameters ties this to an
architecture, and the weights may lie in any container (`dconv.export.weights`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.checkpoint.files import Made
from dconv.errors import Damaged, Refused, ToolMissing
from dconv.export import huggingface
from dconv.export.prompt import Answers, Prompt, kind_of
from dconv.export.runtimes import obstacle as lacks
from dconv.export.weights import Weights
from dconv.pipeline import Described

if TYPE_CHECKING:
    import torch

#: Each takes a pass over all weights.
_NEW_TOKENS: Final = 3
#: Of the budget: what a layer may hold at a time, and one matrix of it. The rest is for what is computed.
_LAYER, _MATRIX = 2, 8
#: Of glibc's ``malloc.h``.
_M_MMAP_THRESHOLD: Final = -3


def obstacle(model: Described) -> str:
    """Why a model cannot be run so; empty when it can."""
    coded = sorted({spec.dtype for spec in model.logical.specs.values()} - {"f64", "f32", "f16", "bf16"})
    if any(dtype.startswith("f8") for dtype in coded):
        return "its FP8 weights have no scales here"
    return lacks("huggingface", model.family, model.config)


def can_infer(model: Described, prompt: Prompt, budget: int) -> dict[str, object]:
    """Run a few tokens, and continue them greedily.

    Args:
        budget: bytes that weights may take at a time, beside about 10 MB to read and compute with.

    Returns:
        runtime, model, layers (each of them finite), unread (tensors without a place in the model), largest_logit;
        continuation (text), or tokens where there is no tokenizer.

    Raises:
        Damaged: weights are missing or of another shape, or what a layer computes is not finite.
        Refused: the budget is too small for the largest thing that is needed at once.
        ToolMissing: transformers cannot build the model.
    """
    import transformers

    with opened(model, budget) as (net, layers, folder, unread):
        answers = huggingface.forward(net, prompt)
        return {
            "runtime": f"transformers {transformers.__version__}, layer by layer in {budget / 1e6:,.0f} MB",
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
def opened(model: Described, budget: int) -> Iterator[tuple[Any, int, Path, tuple[str, ...]]]:
    """A model of transformers that reads its weights as it runs, its number of layers, a directory with its config and
    tokenizer, and the tensors that it has no place for."""
    import torch

    _return_freed_memory()
    with tempfile.TemporaryDirectory(prefix="dconv-run-") as scratch:
        folder = Path(scratch)
        for name, path in model.source.side.items():
            if isinstance(path, Made):
                (folder / name).write_bytes(path.make())
            elif name != "config.json" and path.exists():
                (folder / name).symlink_to(path.absolute())
        config = {key: value for key, value in model.config.items() if key != "auto_map"}  # no code is run
        (folder / "config.json").write_text(json.dumps(config))
        net = _built(folder, huggingface.AUTO[kind_of(model.family)], model.source.root)
        net = net.eval().requires_grad_(False)
        with torch.no_grad():
            _fill_computed(net, net)
        weights = Weights(model.logical, net)
        try:
            yield net, _prepare(net, weights, budget), folder, weights.unused
        finally:
            weights.close()


def _return_freed_memory() -> None:
    """Let freed matrices go back to the system at once: glibc learns to keep ever larger ones, up to 32 MiB each."""
    with contextlib.suppress(OSError, AttributeError):  # another C library, which has no such knob
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _built(folder: Path, auto: str, root: Path) -> Any:
    """The model that a config.json describes, without storage."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    try:
        with huggingface.quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config._experts_implementation = "eager"  # the one that takes an expert's matrix at a time
            with torch.device("meta"), no_init_weights():
                net = getattr(transformers, auto).from_config(
                    config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
                )
            net.tie_weights()
            return net
    except Exception as error:  # whatever a framework raises about one config
        raise ToolMissing(
            "transformers cannot build this model", where=str(root), found=f"{type(error).__name__}: {error}"[:600]
        ) from error


def _fill_computed(module: Any, owner: Any) -> None:
    """Give buffers that follow from the config alone (rotary frequencies) their values, as a loader does."""
    import torch

    owner = module if hasattr(module, "_init_weights") else owner
    for child in module.children():
        _fill_computed(child, owner)
    hollow = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
    for name in hollow:
        module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
    if hollow:
        owner._init_weights(module)


def _prepare(net: Any, weights: Weights, budget: int) -> int:
    """Make every module read what it needs as its turn comes; returns the number of layers."""
    layers = dict(_layers(net, ""))
    prefixes = tuple(f"{name}." for name in layers)
    for name, layer in layers.items():
        _hold(layer, name, weights, budget)
        layer.register_forward_hook(partial(_require_finite, name))
    for name, module in net.named_modules():
        if name not in layers and not name.startswith(prefixes):
            _hold(module, name, weights, budget, alone=True)
    return len(layers)


def _layers(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """The members of the outermost lists of modules."""
    import torch

    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((f"{prefix}{name}.{i}", layer) for i, layer in enumerate(child))
        else:
            yield from _layers(child, f"{prefix}{name}.")


def _hold(module: Any, name: str, weights: Weights, budget: int, alone: bool = False) -> None:
    """Read a module's parameters before it runs and forget them after it has.

    Args:
        alone: without those of its members, which are held by themselves.
    """
    taken: list[tuple[Any, str, str]] = []
    nbytes = 0
    members = [("", module)] if alone else list(module.named_modules())
    crowded = not alone and _bytes(_own(member) for _, member in members) > budget // _LAYER
    for inside, member in members:
        full = ".".join(part for part in (name, inside) if part)
        for key, value in _own(member).items():
            path = f"{full}.{key}" if full else key
            if not _in_parts(member, key, path, weights, budget, crowded or alone):
                taken.append((member, key, path))
                nbytes += value.numel() * 4
    if nbytes > budget:
        raise Refused(
            "the budget of memory is too small to run this model in",
            where=name,
            expected=f"{nbytes:,} bytes or more, which are needed at once",
            found=f"{budget:,}",
            do="a larger --max-memory",
        )
    if not taken:
        return
    empty = {(id(member), key): _own(member)[key] for member, key, _ in taken}

    def read(*_: Any) -> None:
        for member, key, path in taken:
            _put(member, key, weights.whole(path))

    def forget(*_: Any) -> None:
        for member, key, _path in taken:
            _put(member, key, empty[id(member), key])

    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget)


def _own(module: Any) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers that are a module's own, by name."""
    saved = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: value for key, value in {**module._parameters, **saved}.items() if value is not None}


def _bytes(modules: Iterator[dict[str, torch.Tensor]]) -> int:
    return sum(value.numel() * 4 for module in modules for value in module.values())


def _put(module: Any, key: str, value: torch.Tensor) -> None:
    import torch

    if key in module._buffers:
        module._buffers[key] = value
    else:
        module._parameters[key] = (
            value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, requires_grad=False)
        )


def _in_parts(module: Any, key: str, path: str, weights: Weights, budget: int, crowded: bool) -> bool:
    """Whether a parameter is from now on read in parts, by the module itself."""
    import torch

    value = _own(module)[key]
    if weights.by_expert(path) and hasattr(module, "num_experts"):
        del module._parameters[key]
        setattr(module, key, _Experts(value, partial(weights.expert, path)))
        return True
    if key != "weight" or not weights.is_plain(path):
        return False
    plain = type(module).forward is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, torch.nn.Embedding) and plain:
        module.padding_idx = None  # of no meaning but for training, and not among the rows that are read
        module.__dict__["forward"] = partial(_look_up, module, type(module).forward, partial(weights.rows, path))
        return True
    if crowded and type(module).forward is torch.nn.Linear.forward and value.numel() * 4 > budget // _MATRIX:
        rows = max(1, budget // _MATRIX // (value.shape[1] * 4))
        module.__dict__["forward"] = partial(_multiply, module, value.shape[0], rows, partial(weights.rows, path))
        return True
    return False


class _Experts:
    """A parameter of three axes that reads one expert's matrix when it is asked for it."""

    def __init__(self, like: torch.Tensor, read: Callable[[int], torch.Tensor]) -> None:
        self.shape, self.dtype, self._read = like.shape, like.dtype, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._read(int(index))


def _look_up(module: Any, forward: Any, read: Callable[[int, int], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """An embedding's own forward pass over the rows of these tokens alone."""
    import torch

    rows, places = torch.unique(tokens, return_inverse=True)
    empty = module._parameters["weight"]
    _put(module, "weight", torch.cat([read(row, row + 1) for row in rows.tolist()]))
    try:
        return forward(module, places)
    finally:
        module._parameters["weight"] = empty


def _multiply(
    module: Any, length: int, step: int, read: Callable[[int, int], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """``nn.Linear`` by ``step`` rows of its weight at a time."""
    import torch

    out = torch.empty(*x.shape[:-1], length)
    for at in range(0, length, step):
        stop = min(at + step, length)
        bias = None if module.bias is None else module.bias[at:stop]
        out[..., at:stop] = torch.nn.functional.linear(x, read(at, stop), bias)
    return out


def _require_finite(name: str, _module: Any, _given: Any, output: Any) -> None:
    """Raises Damaged where what the layer computes is not finite: the first such layer is at fault."""
    hidden = output[0] if isinstance(output, tuple) else output
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
