"""Models from before megatron-core (until 2023): nested names, and three orders of query, key and value.

Names become those of megatron-core's local spec. The orders are strides: every third row of a head is a box like any
other. Sources: ``megatron/model/{language_model,transformer,gpt_model,bert_model,t5_model}.py`` of Megatron-LM 2.0 to
23.08 (names); ``fix_query_key_value_ordering`` in its ``checkpointing.py`` (orders by ``checkpoint_version``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

from dconv.arch.layouts import Facts, size
from dconv.checkpoint.names import HEAD
from dconv.checkpoint.shards import Shard, Shards
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import is_mapping
from dconv.sharding.region import Region
from dconv.sharding.tensor import Extent, Stored

_Rank = TypeVar("_Rank")

_MODEL: Final = "language_model"
#: Of what ``language_model`` holds and what lies beside it, in the order of trial.
_NAMES: Final = (
    (r"language_model\.(embedding|pooler|output_layer)\.(.+)", r"\1.\2"),
    (r"language_model\.(?:encoder|transformer)\.(.+)", r"encoder.\1"),
    (r"language_model\.decoder\.(.+)", r"decoder.\1"),
    (r"word_embeddings_for_head\.weight", HEAD),
    (r"lm_head\.bias", "output_layer.bias"),
    (r"lm_head\.(?:layernorm|norm)\.(.+)", r"lm_head.layer_norm.\1"),
)
#: The same below a layer. ``layernorm_qkv``, ``proj`` and ``layernorm_mlp`` are Transformer Engine's own layer.
_IN_LAYER: Final = (
    (r"(?:input_norm|input_layernorm)\.(.+)", r"input_layernorm.\1"),
    (r"(?:self_)?attention\.query_key_value\.(.+)", r"self_attention.linear_qkv.\1"),
    (r"(?:self_)?attention\.dense\.(.+)", r"self_attention.linear_proj.\1"),
    (r"inter_attention\.query\.(.+)", r"cross_attention.linear_q.\1"),
    (r"inter_attention\.key_value\.(.+)", r"cross_attention.linear_kv.\1"),
    (r"inter_attention\.dense\.(.+)", r"cross_attention.linear_proj.\1"),
    (r"post_inter_attention_(?:layer)?norm\.(.+)", r"pre_mlp_layernorm.\1"),
    (r"post_attention_(?:layer)?norm\.(.+)", r"pre_mlp_layernorm.\1"),
    (r"mlp\.dense_h_to_4h\.(.+)", r"mlp.linear_fc1.\1"),
    (r"mlp\.dense_4h_to_h\.(.+)", r"mlp.linear_fc2.\1"),
    (r"self_attention\.layernorm_qkv\.(.+)", r"self_attention.linear_qkv.\1"),
    (r"self_attention\.proj\.(.+)", r"self_attention.linear_proj.\1"),
    (r"layernorm_mlp\.(layer_norm_.+)", r"mlp.linear_fc1.\1"),
    (r"layernorm_mlp\.(fc[12])_(.+)", r"mlp.linear_\1.\2"),
)
_LAYER: Final = re.compile(r"((?:encoder|decoder)\.layers\.\d{1,9}\.)(.+)")
_FINAL: Final = re.compile(r"((?:encoder|decoder)\.final_)norm(\..+)")
#: A layer with two attentions has a norm more, and the first of the three names that others have second.
_CROSS: Final = ("decoder.", "post_attention_", "pre_cross_attn_layernorm")

#: Rows that are made of several tensors, and of how many.
_MERGED: Final = re.compile(r".+\.(?:self_attention\.linear_(qkv)|cross_attention\.linear_kv)\.(?:weight|bias)")
#: ``checkpoint_version`` from which rows are [heads, parts, width], as megatron-core has them.
_SETTLED: Final = 2.0
_VERSIONS: Final = (0, 1.0, 2.0, 3.0)
#: Namespaces of before May 2020 do not say which GELU: then there was only the one by tanh.
_EARLY: Final[Mapping[str, object]] = {"bias_gelu_fusion": True}


def is_classic(chunk: Mapping[Any, Any]) -> bool:
    """Whether a state dict is one of Megatron-LM's older model classes: nested, under ``language_model``."""
    return _MODEL in chunk


def flat(chunk: Mapping[Any, Any]) -> dict[str, object]:
    """A nested state dict under megatron-core's names, but for the stack of a GPT: see `settle`.

    Raises:
        Damaged: two tensors would have one name.
    """
    found: dict[str, object] = {}
    for name, value in leaves(chunk, ""):
        ours = _renamed(name)
        if ours in found:
            raise Damaged("two tensors of a classic Megatron model are one", where=name, found=ours)
        found[ours] = value
    return found


def leaves(tree: Mapping[Any, Any], prefix: str, depth: int = 0) -> Iterator[tuple[str, object]]:
    """What a nested state dict holds, under names with a dot between their parts."""
    for key, value in tree.items():
        if is_mapping(value) and depth < 4:
            yield from leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _renamed(name: str) -> str:
    name = _first(_NAMES, name)
    name = _FINAL.sub(r"\1layernorm\2", name)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    stack, second, cross = _CROSS
    if name.startswith(stack) and layer[2].startswith(second):
        return f"{layer[1]}{cross}.{layer[2].rpartition('.')[2]}"
    return layer[1] + _first(_IN_LAYER, layer[2])


def _first(rules: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, result in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(result)
    return name


def settle(chunks: Mapping[_Rank, list[dict[str, Any]]]) -> dict[_Rank, list[dict[str, Any]]]:
    """The same chunks, by rank, with the layers of a GPT called a decoder's, as megatron-core does.

    Classic models call the only stack they have the encoder. A head for masked words makes it a BERT.
    """
    every = {name.partition(".")[0] for held in chunks.values() for chunk in held for name in chunk}
    if "lm_head" in every or "decoder" in every:
        return dict(chunks)
    return {place: [{_as_decoder(n): v for n, v in chunk.items()} for chunk in held] for place, held in chunks.items()}


def _as_decoder(name: str) -> str:
    return f"decoder.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else name


def version(said: object, where: str) -> float:
    """``checkpoint_version``; a file without one is of version 0.

    Raises:
        Refused: not one whose order is known.
    """
    found = 0 if said is None else said
    if isinstance(found, bool) or found not in _VERSIONS:
        raise Refused(
            "a classic Megatron model of unknown row order, nothing was written",
            where=f"checkpoint_version in {where}",
            expected="none, 0, 1.0, 2.0 or 3.0",
            found=f"{said!r:.40}",
        )
    return float(str(found))


def full_args(args: Mapping[str, object] | None) -> dict[str, object] | None:
    """Args with what the earliest of them leave unsaid."""
    return None if args is None else {**_EARLY, **args}


def reorder(shards: Shards, order: float, facts: Facts) -> Shards:
    """Shards whose merged rows are in megatron-core's order.

    Args:
        shards: of all ranks, by name.
        order: ``checkpoint_version``.
        facts: what config and tensors tell of the model.

    Raises:
        Damaged: rows that are no whole heads.
        Refused: query groups in a version that had none.
    """
    if order >= _SETTLED:
        return shards
    if facts["groups"] != facts["heads"]:
        raise Refused(
            "query groups in a checkpoint from before there were any, nothing was written",
            where=f"checkpoint_version {order:g}",
            expected=f"{facts['heads']} query groups, as many as heads",
            found=str(facts["groups"]),
            do="--hf-config DIR supplies the right config",
        )
    width = size(facts, "head_dim")
    return {name: [_by_head(name, shard, order, width) for shard in held] for name, held in shards.items()}


def _by_head(name: str, shard: Shard, order: float, width: int) -> Shard:
    merged = _MERGED.fullmatch(name)
    if merged is None:
        return shard
    parts = 3 if merged[1] else 2
    spec, extent = shard.stored.spec, shard.stored.extents[0]
    if not spec.shape or spec.shape[0] % (parts * width):
        raise Damaged(
            "a shard cuts through an attention head",
            where=f"{name} in {extent.file}",
            expected=f"a multiple of {parts * width} rows",
            found=str(spec.shape),
        )
    heads = spec.shape[0] // (parts * width)
    row, *others = extent.strides
    extents: list[Extent] = []
    for head in range(heads):
        for part in range(parts):
            # version 0: [parts, heads, width]; version 1: [heads, width, parts]
            first, step = ((part * heads + head) * width, 1) if order == 0 else (head * width * parts + part, parts)
            start = ((head * parts + part) * width, *[0] * len(others))
            box = Region(start, (width, *spec.shape[1:]))
            extents.append(Extent(box, extent.file, extent.offset + first * row, (step * row, *others)))
    return replace(shard, stored=Stored(spec, tuple(extents)))
