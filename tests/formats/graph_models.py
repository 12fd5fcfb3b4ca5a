"""A graph that was written, run by torch alone, and what transformers says to the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

FILES = {"torch_export": "model.pt2", "torchscript": "model.pt"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
#: Batch, new tokens and tokens in the cache: none is as it was traced (2, 3, 5); 24 is whole chunks of tiny models.
LENGTHS = ((1, 1, 0), (1, 1, 9), (3, 1, 40), (2, 24, 0), (1, 30, 1), (4, 2, 6))


@dataclass(frozen=True)
class Graph:
    """A graph as torch loads it.

    Attributes:
        inputs: name -> axes.
    """

    call: Callable[..., Any]
    inputs: dict[str, list[int | str]]
    dtype: torch.dtype

    @property
    def cached(self) -> list[list[int | str]]:
        return [axes for name, axes in self.inputs.items() if name.startswith("past_key_values.")]

    def empty(self, batch: int) -> list[torch.Tensor]:
        sizes = {"batch": batch, "past": 0}
        return [torch.zeros([sizes.get(str(axis), axis) for axis in axes], dtype=self.dtype) for axes in self.cached]

    def step(self, tokens: torch.Tensor, cache: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        batch, length = tokens.shape
        past = cache[0].shape[2]
        places = torch.arange(past, past + length).expand(batch, length)
        logits, *cache = self.call(tokens, torch.ones(batch, past + length, dtype=torch.long), places, *cache)
        return logits, cache


def load(folder: Path, format: str) -> Graph:
    said: dict[str, Any] = {"ports.json": ""}
    if format == "torch_export":
        call = torch.export.load(str(folder / FILES[format]), extra_files=said).module()
    else:
        call = torch.jit.load(str(folder / FILES[format]), _extra_files=said)
    ports = json.loads(said["ports.json"])
    return Graph(call, {it["name"]: it["axes"] for it in ports["inputs"]}, getattr(torch, ports["outputs"][0]["dtype"]))


@torch.no_grad()
def farthest(graph: Graph, model: PreTrainedModel) -> float:
    """The largest difference of a logit over `LENGTHS`, relative to the largest logit of transformers."""
    torch.manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    worst = 0.0
    for batch, new, past in LENGTHS:
        tokens = torch.randint(0, vocabulary, (batch, past + new))
        mask = torch.ones_like(tokens)
        if graph.cached:
            cache = graph.empty(batch)
            if past:
                _, cache = graph.step(tokens[:, :past], cache)
            found = [graph.step(tokens[:, past:], cache)[0]]
            # in as many steps as ours: in bf16 another order of sums may send a token to another expert
            theirs = model(input_ids=tokens[:, :past], use_cache=True).past_key_values if past else None
            expected = [model(input_ids=tokens[:, past:], past_key_values=theirs).logits]
        elif "token_type_ids" in graph.inputs:
            types = torch.randint(0, 2, tokens.shape)
            mask[0, -1] = past == 0 and new == 1  # padding, but of no row all of it
            found = list(graph.call(tokens, mask, types))
            said = model(input_ids=tokens, token_type_ids=types, attention_mask=mask)
            expected = [said.prediction_logits, said.seq_relationship_logits]
        elif "decoder_input_ids" in graph.inputs:
            replies = torch.randint(0, vocabulary, (batch, new + 2))
            found = list(graph.call(tokens, mask, replies))
            expected = [model(input_ids=tokens, attention_mask=mask, decoder_input_ids=replies).logits]
        else:
            found = list(graph.call(tokens, mask))
            expected = [model(input_ids=tokens, use_cache=False).logits]
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            apart = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
            worst = max(worst, float(apart) if bool(torch.isfinite(apart)) else float("inf"))
    return worst
