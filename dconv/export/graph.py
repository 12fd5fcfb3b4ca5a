"""A model of transformers as a graph has it: plain tensors in, plain tensors out, and which axes may be of any length.

Names are those that onnxruntime-genai and optimum give them. A decoder's keys and values go in and come out, layer by
layer; where there is no cache that is no list of such tensors (state-space layers), the whole sequence is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.export.prompt import Kind

#: Lengths that stand for axes of any length while a model is traced: none is 0 or 1, and no two are alike, so that
#: nothing of a graph can depend on them unseen.
LENGTHS: Final = {"batch": 2, "sequence": 3, "past": 5, "total": 8, "replies": 7}
BATCH, SEQUENCE, PAST, TOTAL, REPLIES = LENGTHS


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor that a graph takes or gives.

    Attributes:
        name: as the runtime asks for it.
        axes: lengths; a name of `LENGTHS` for one that is any.
        whole: whole numbers; else of the model's own dtype.
        bits: of a whole number.
    """

    name: str
    axes: tuple[int | str, ...]
    whole: bool = False
    bits: int = 64

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a `sample`: an axis of any length has its number of `LENGTHS`."""
        return tuple(LENGTHS[axis] if isinstance(axis, str) else axis for axis in self.axes)


@dataclass(frozen=True)
class Graph:
    """What is traced.

    Attributes:
        module: takes tensors in the order of ``inputs`` and gives a tuple in that of ``outputs``; its parameters are
            the model's, with ``model.`` before their names.
        cached: inputs from here on are keys and values.
    """

    module: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    cached: int | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether all axes are numbers; see `fixed`."""
        return all(isinstance(axis, int) for port in self.inputs for axis in port.axes)


def graph_of(model: Any, kind: Kind) -> Graph:
    """The graph of a model, with axes of any length: tokens and masks in, logits out, and a decoder's keys and values.

    Args:
        model: of `dconv.net.skeleton.built`; one that sees has no such graph.
        kind: how it is asked, of `dconv.export.prompt.kind_of`.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens = Port("input_ids", (BATCH, SEQUENCE), True)
    if kind == "encoder":
        inputs = (
            tokens,
            Port("attention_mask", (BATCH, SEQUENCE), True),
            Port("token_type_ids", (BATCH, SEQUENCE), True),
        )
        outputs = (Port("logits", (BATCH, SEQUENCE, vocabulary)), Port("seq_relationship_logits", (BATCH, 2)))
        return Graph(module_of(model, _encode), inputs, outputs)
    if kind == "encoder-decoder":
        inputs = (
            tokens,
            Port("attention_mask", (BATCH, SEQUENCE), True),
            Port("decoder_input_ids", (BATCH, REPLIES), True),
        )
        return Graph(module_of(model, _answer), inputs, (Port("logits", (BATCH, REPLIES, vocabulary)),))
    logits = Port("logits", (BATCH, SEQUENCE, vocabulary))
    if kind == "hybrid":
        return Graph(module_of(model, _read), (tokens, Port("attention_mask", (BATCH, SEQUENCE), True)), (logits,))
    masks = (Port("attention_mask", (BATCH, TOTAL), True), Port("position_ids", (BATCH, SEQUENCE), True))
    past: list[Port] = []
    present: list[Port] = []
    for layer, (key, value) in enumerate(_cache_shapes(model)):
        for name, (heads, width) in (("key", key), ("value", value)):
            past.append(Port(f"past_key_values.{layer}.{name}", (BATCH, heads, PAST, width)))
            present.append(Port(f"present.{layer}.{name}", (BATCH, heads, TOTAL, width)))
    return Graph(module_of(model, _continue), (tokens, *masks, *past), (logits, *present), 3)


def fixed(graph: Graph, sequence: int, past: int) -> Graph:
    """The same of one text, with numbers as axes.

    Where there is no past there are no inputs for it: compilers of NPUs take no tensors of no elements.

    Args:
        graph: of axes of any length.
        sequence: tokens of a text, and of a reply.
        past: tokens that keys and values are there of.
    """
    lengths = {"batch": 1, "sequence": sequence, "past": past, "total": past + sequence, "replies": sequence}

    def numbered(ports: tuple[Port, ...]) -> tuple[Port, ...]:
        return tuple(
            replace(port, axes=tuple(lengths[axis] if isinstance(axis, str) else axis for axis in port.axes))
            for port in ports
        )

    inputs = graph.inputs if past else graph.inputs[: graph.cached]
    return replace(graph, inputs=numbered(inputs), outputs=numbered(graph.outputs))


def sample(port: Port, dtype: Any, device: str) -> Any:
    """A tensor for a port, as long as `LENGTHS` says: zeros, and ones for a mask.

    Args:
        port: what it is for.
        dtype: torch's, of what is no whole number.
        device: where it lies.
    """
    import torch

    fill = torch.ones if port.name == "attention_mask" else torch.zeros
    whole = torch.int32 if port.bits == 32 else torch.long
    return fill(port.shape, dtype=whole if port.whole else dtype, device=device)


def module_of(model: Any, forward: Any) -> Any:
    """What is traced: a module, in evaluation mode, that calls ``forward`` with a model and plain tensors."""
    import torch

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return forward(self.model, *inputs)

    return Traced().eval().requires_grad_(False)


def _continue(model: Any, tokens: Any, mask: Any, positions: Any, *past: Any) -> tuple[Any, ...]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values  # an `update` would join them to empty ones
        cache.layers.append(layer)
    said = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return said.logits, *(held for layer in said.past_key_values.layers for held in (layer.keys, layer.values))


def _read(model: Any, tokens: Any, mask: Any) -> tuple[Any, ...]:
    return (model(input_ids=tokens, attention_mask=mask, use_cache=False).logits,)


def _encode(model: Any, tokens: Any, mask: Any, types: Any) -> tuple[Any, ...]:
    said = model(input_ids=tokens, attention_mask=mask, token_type_ids=types)
    return said.prediction_logits, said.seq_relationship_logits


def _answer(model: Any, tokens: Any, mask: Any, replies: Any) -> tuple[Any, ...]:
    return (model(input_ids=tokens, attention_mask=mask, decoder_input_ids=replies, use_cache=False).logits,)


def _cache_shapes(model: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and width of each layer's keys and of its values."""
    import torch
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [
        ((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3])) for layer in layers
    ]
