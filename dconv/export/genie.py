"""A decoder's graph as Qualcomm's Genie runs it: positions come as angles, masks as what is added to scores.

Genie opens graphs by the names and shapes of their inputs. It takes the tokens as int32, the mask [1, 1, text, all],
of each position the cosines and the sines of half a head's width, and gives of the keys and values those of the new
tokens alone, which it puts into its cache itself; keys are transposed. Where in the cache something lies is Genie's
business: no number in the graph depends on it.

Source: quic/ai-hub-models 0.46 (BSD-3-Clause), ``qai_hub_models/models/_shared/llm/model.py`` (``_get_input_spec``,
``_get_output_names``, ``LLMBase.forward``), whose graphs Genie runs. Their attention is written by hand, a head at a
time; here it is transformers' own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from dconv.errors import Refused
from dconv.export.graph import PAST, SEQUENCE, TOTAL, Graph, Port, module_of

#: Of `dconv.request.Request.ports`.
NAME: Final = "genie"
#: Kinds of rotation that Genie computes the angles of as transformers does.
KINDS: Final = ("default", "llama3")
_TRIED: Final = 8


def graph_of(model: Any, plain: Graph) -> Graph:
    """The graph of a decoder.

    Args:
        model: of transformers, as `dconv.export.traced.weightless` has it.
        plain: its graph as `dconv.export.graph.graph_of` has it.

    Raises:
        Refused: no cache of keys and values, or positions that are no angles which Genie computes.
    """
    if plain.cached is None:
        raise _refused(model, "it has no cache of keys and values")
    rotary, half = _rotary(model)
    cached = plain.inputs[plain.cached :]
    past: list[Port] = []
    present: list[Port] = []
    for layer, (key, value) in enumerate(zip(cached[::2], cached[1::2], strict=True)):
        (_, heads, _, width), deep = key.axes, value.axes[3]
        if width != deep:
            raise _refused(model, f"keys {width} and values {deep} wide")
        for direction, length, held in (("in", PAST, past), ("out", SEQUENCE, present)):
            held.append(Port(f"past_key_{layer}_{direction}", (heads, 1, width, length)))
            held.append(Port(f"past_value_{layer}_{direction}", (heads, 1, length, width)))
    inputs = (
        Port("input_ids", (1, SEQUENCE), True, 32),
        Port("attention_mask", (1, 1, SEQUENCE, TOTAL)),
        *(Port(f"position_ids_{name}", (1, 1, SEQUENCE, half)) for name in ("cos", "sin")),
        *past,
    )
    logits = replace(plain.outputs[0], axes=(1, *plain.outputs[0].axes[1:]))
    return Graph(module_of(model, _forward(rotary)), inputs, (logits, *present), 4)


def _forward(rotary: Any) -> Any:
    def forward(model: Any, tokens: Any, mask: Any, cos: Any, sin: Any, *past: Any) -> tuple[Any, ...]:
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer

        class Newest(DynamicLayer):
            """Attention sees all of it, and what is new of it is kept."""

            def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
                self.newest = key_states, value_states
                past: Any = self
                return torch.cat((past.keys, key_states), -2), torch.cat((past.values, value_states), -2)

        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = Newest()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys.permute(1, 0, 3, 2), values.permute(1, 0, 2, 3)
            cache.layers.append(layer)
        places = torch.zeros(tokens.shape, dtype=torch.long)  # the angles are given: nothing is computed of these
        with _turned(rotary, cos[0], sin[0]):
            said = model(
                input_ids=tokens, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
            )
        layers: list[Any] = cache.layers
        new: list[tuple[Any, Any]] = [layer.newest for layer in layers]
        return said.logits, *(
            held for keys, values in new for held in (keys.permute(1, 0, 3, 2), values.permute(1, 0, 2, 3))
        )

    return forward


@contextmanager
def _turned(rotary: Any, cos: Any, sin: Any) -> Generator[None]:
    """Have a model's rotary embedding answer with given angles, [1, text, half] each, for a while."""
    import torch

    whole = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def given(x: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        return tuple(part.to(x.dtype) for part in whole)

    rotary.forward = given
    try:
        yield
    finally:
        del rotary.forward


def _rotary(model: Any) -> tuple[Any, int]:
    """The one module that answers with angles, and how many of them a head has.

    Raises:
        Refused: see `graph_of`.
    """
    import torch

    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    if len(found) != 1:
        raise _refused(model, "positions are no rotation" if not found else f"{len(found)} kinds of rotation")
    (rotary,) = found
    kind = getattr(rotary, "rope_type", None)
    if kind not in KINDS or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise _refused(model, f"rope_type {kind}")
    half = len(rotary.inv_freq)
    places = torch.arange(_TRIED)[None]
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, 1), places)
    angles = places[..., None].float() * rotary.inv_freq.cpu()
    for said, wanted in ((cos, angles.cos()), (sin, angles.sin())):
        if tuple(said.shape) != (1, _TRIED, 2 * half) or not torch.allclose(said, torch.cat([wanted, wanted], -1)):
            raise _refused(model, "angles in another order than that of two halves")
    return rotary, half


def _refused(model: Any, found: str) -> Refused:
    return Refused(
        "Genie cannot run this model, nothing was written",
        where=type(model).__name__,
        expected=f"a decoder with a cache, rope_type {' or '.join(KINDS)}",
        found=found,
        do='"toolkit": "onnxruntime"',
    )
