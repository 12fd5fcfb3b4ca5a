"""Graphs of torch, run: a prompt in two steps through the cache, a sentence continued greedily.

Only torch is needed: what a graph takes is said inside its archive.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dconv.checkpoint.graphs import FILES, PORTS, Archive, archive_of, device_of
from dconv.errors import Damaged, DconvError, Refused, ToolMissing
from dconv.export.graph import BATCH, LENGTHS, PAST, Port
from dconv.export.huggingface import continuation, largest
from dconv.export.prompt import NEW_TOKENS, Answers, Prompt
from dconv.net.device import AUTO, DEVICES, is_here, is_name
from dconv.net.skeleton import quiet

#: torch's names of what a graph may compute in.
_COMPUTED: Final = ("float32", "bfloat16", "float16")
#: Tokens of a prompt that go into the cache first.
_FIRST: Final = 5


@dataclass(frozen=True)
class Ports:
    """What a graph takes and gives.

    Attributes:
        inputs: in the order in which the graph takes them.
        outputs: in that in which it gives them.
        dtype: torch's name of what it computes in.
        device: and where.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dtype: str
    device: str


@dataclass(frozen=True)
class Loaded:
    """A graph ready to be called with the tensors of its inputs, and what runs it, for a person."""

    module: Any
    ports: Ports
    runtime: str

    def call(self, *inputs: Any) -> tuple[Any, ...]:
        """What the graph makes of tensors on the CPU, on the CPU."""
        made = self.module(*(it.to(self.ports.device) for it in inputs))
        return tuple(it.cpu() for it in made)


def archive(path: Path, kind: str) -> Archive:
    """The archive of a graph of one kind.

    Raises:
        Damaged: there is none.
    """
    found = archive_of(path)
    if found is None or found.kind != kind:
        raise Damaged(
            "there is no such graph", where=str(path), expected=FILES[kind], found=found.kind if found else "none"
        )
    return found


def runs_code(found: Archive, where: str) -> Refused:
    """The refusal of an archive that could do more than compute, for who found that to raise.

    Args:
        found: the archive.
        where: its record, or the operations, that tell so.
    """
    return Refused(
        "this archive has more than tensors and operations on them, and is not run",
        where=f"{where} in {found.path}",
        expected="a graph as dconv writes it: no pickled objects, no files read or written",
    )


@contextmanager
def loading(found: Archive) -> Generator[None]:
    """Errors of torch's loaders, told as ours.

    Raises:
        Damaged: it is written for no device.
        ToolMissing: torch does not open it, or it is for a device that is not here.
    """
    device = device_of(found) or "cpu"
    if not is_name(device) or device == AUTO:
        raise Damaged("a graph is written for no device", where=str(found.path), expected=DEVICES, found=device[:80])
    if not is_here(device):
        raise ToolMissing(
            "a graph is written for a device that is not here",
            where=str(found.path),
            found=device,
            do=f"dconv convert {found.path.parent} {found.kind} --device cpu -o OUT  writes it for the CPU",
        )
    try:
        with quiet():
            yield
    except DconvError:
        raise
    except Exception as error:  # whatever torch raises about one archive
        raise ToolMissing(
            "torch does not open this graph",
            where=str(found.path),
            found=f"{type(error).__name__}: {error}"[:600],
        ) from error


def ports_of(found: Archive, text: str) -> Ports:
    """What a graph's archive says of its inputs and outputs.

    Raises:
        Refused: it says nothing: another program wrote it.
    """
    try:
        said = json.loads(text)
        inputs, outputs = (
            tuple(Port(it["name"], tuple(it["axes"]), it["dtype"] == "int64") for it in said[side])
            for side in ("inputs", "outputs")
        )
        dtype = next(it["dtype"] for it in said["outputs"])
        if dtype not in _COMPUTED or not all(map(_is_known, (*inputs, *outputs))):
            raise ValueError("a dtype or an axis that no graph of dconv's has")
        return Ports(inputs, outputs, dtype, device_of(found))
    except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        raise Refused(
            "this graph does not say what it takes, and is not run",
            where=str(found.path),
            expected=f"extra/{PORTS}, as dconv writes it",
        ) from error


def _is_known(port: Port) -> bool:
    """Whether each axis is a length, or one of any that a call gives."""
    return all(axis in LENGTHS if isinstance(axis, str) else type(axis) is int and axis >= 0 for axis in port.axes)


def answers(graph: Loaded, prompt: Prompt) -> Answers:
    """fp32 logits [batch, sequence, vocabulary], and what other outputs an encoder has.

    A graph with a cache is asked in two steps, so that the cache counts, too.
    """
    import torch

    tokens = torch.as_tensor(prompt.tokens)
    with torch.no_grad(), quiet():
        if prompt.types is not None:
            made = graph.call(tokens, torch.ones_like(tokens), torch.as_tensor(prompt.types))
        elif prompt.replies is not None:
            made = graph.call(tokens, torch.ones_like(tokens), torch.as_tensor(prompt.replies))
        elif not _has_cache(graph):
            made = graph.call(tokens, torch.ones_like(tokens))
        else:
            first, cache = _step(graph, tokens[:, :_FIRST], None)
            rest, _ = _step(graph, tokens[:, _FIRST:], cache)
            made = (torch.cat([first, rest], 1),)
    return tuple(it.float().numpy() for it in made)


def infer(graph: Loaded, path: Path, prompt: Prompt) -> dict[str, object]:
    """Run a few tokens, and continue a sentence greedily where there is a tokenizer beside the graph.

    Returns:
        As `dconv.export.huggingface.can_infer`, and ``computed``: in what dtype and where.

    Raises:
        Damaged: the logits are not finite.
    """
    folder = path if path.is_dir() else path.parent
    shown: dict[str, object] = {
        "runtime": graph.runtime,
        "model": f"a graph of {len(graph.ports.inputs)} inputs",
        "computed": f"{graph.ports.dtype} on {graph.ports.device.replace('cpu', 'the CPU')}",
        "largest_logit": largest(answers(graph, prompt), path),
    }
    return shown | continuation(folder, prompt, partial(_generated, graph, prompt))


def _has_cache(graph: Loaded) -> bool:
    return any(PAST in port.axes for port in graph.ports.inputs)


def _step(graph: Loaded, tokens: Any, cache: tuple[Any, ...] | None) -> tuple[Any, tuple[Any, ...]]:
    """Logits of the next tokens, and keys and values with theirs."""
    import torch

    held = [port for port in graph.ports.inputs if PAST in port.axes]
    batch, length = tokens.shape
    if cache is None:
        sizes = {BATCH: batch, PAST: 0}
        shapes = [[sizes[axis] if isinstance(axis, str) else axis for axis in port.axes] for port in held]
        cache = tuple(torch.zeros(shape, dtype=getattr(torch, graph.ports.dtype)) for shape in shapes)
    past = cache[0].shape[held[0].axes.index(PAST)]
    places = torch.arange(past, past + length)[None].expand(batch, length)
    logits, *made = graph.call(tokens, torch.ones(batch, past + length, dtype=torch.long), places, *cache)
    return logits, tuple(made)


def _generated(graph: Loaded, prompt: Prompt, sentence: NDArray[np.int64]) -> NDArray[np.int64]:
    """Greedily, a token a step where there is a cache."""
    import torch

    tokens = torch.as_tensor(sentence)
    replies = torch.zeros_like(tokens[:, :1])  # T5 and its kind begin with their padding, token 0
    fed, cache = tokens, None
    with torch.no_grad(), quiet():
        for _ in range(NEW_TOKENS):
            if prompt.replies is not None:
                last = graph.call(tokens, torch.ones_like(tokens), replies)[0][:, -1:]
                replies = torch.cat([replies, last.argmax(-1)], 1)
                continue
            if _has_cache(graph):
                logits, cache = _step(graph, fed, cache)
            else:
                logits = graph.call(tokens, torch.ones_like(tokens))[0]
            fed = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, fed], 1)
    return (replies if prompt.replies is not None else tokens).numpy()
