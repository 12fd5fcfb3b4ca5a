"""``genai_config.json``: what onnxruntime-genai reads beside a graph to generate text with it.

Its keys are those that the builder of onnxruntime-genai 0.18.0 writes (``models/builders/base.py``,
``make_genai_config``), for a graph whose keys and values are separate tensors of any length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from dconv.arch.layouts import size
from dconv.checkpoint.files import Made, read_json
from dconv.describe import Described
from dconv.export.graph import Graph
from dconv.sharding.parsed import is_list

FILE: Final = "genai_config.json"
_GENERATION: Final = "generation_config.json"
#: Models that the runtime treats in a way of their own where that is the graph's business, too; any other decoder is
#: what it calls llama: tokens, mask, positions, keys and values in, logits, keys and values out.
_TYPE: Final = "llama"
#: What config.json calls the number of query heads.
_HEADS: Final = ("num_attention_heads", "n_head")
#: Tokens that begin, end and fill a text.
_TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
#: What `search` takes of generation_config.json, with what the builder writes where it says nothing.
_SEARCH: Final = {
    "diversity_penalty": 0.0, "do_sample": False, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1,
    "num_return_sequences": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip


def config_of(model: Described, graph: Graph, filename: str) -> Made:
    """``genai_config.json`` of a decoder with a cache.

    Args:
        model: config.json and generation_config.json say the tokens that begin, end and fill a text.
        graph: of `dconv.export.graph.graph_of`, with keys and values of any length.
        filename: of the graph, beside which the file is.
    """
    keys = graph.inputs[graph.cached or 0 :: 2]
    _, heads, _, width = keys[0].axes
    config, said = model.config, generation_of(model)
    tokens = special_tokens(config, said)
    context = next((value for key in ("max_position_embeddings", "n_positions") if (value := config.get(key))), 2048)
    first, last, fill = (tokens.get(key) for key in _TOKENS)
    if fill is None:
        fill = last[0] if is_list(last) else last
    queries = next((config[name] for name in _HEADS if name in config), None)
    found: dict[str, Any] = {
        "model": {
            "bos_token_id": 1 if first is None else first,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": width,
                "hidden_size": size(model.facts, "hidden"),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                **({} if queries is None else {"num_attention_heads": queries}),
                "num_hidden_layers": len(keys),
                "num_key_value_heads": heads,
            },
            "eos_token_id": 2 if last is None else last,
            "pad_token_id": 0 if fill is None else fill,
            "type": _TYPE,
            "vocab_size": size(model.facts, "vocab"),
        },
        "search": {
            **{key: otherwise if (value := said.get(key)) is None else value for key, otherwise in _SEARCH.items()},
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "past_present_share_buffer": False,
        },
    }
    data = (json.dumps(found, indent=4) + "\n").encode()
    return Made(lambda: data)


def special_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens that begin, end and fill a text, by transformers' keys, where they are said; several may end one.

    Args:
        config: config.json.
        generation: generation_config.json, whose tokens win; null there says nothing.
    """
    said = ({key: file[key] for key in _TOKENS if file.get(key) is not None} for file in (config, generation))
    return {key: token for file in said for key, token in file.items()}


def generation_of(model: Described) -> Mapping[str, Any]:
    """generation_config.json of a source; empty where there is none, or none yet.

    Raises:
        Damaged: it is no JSON object.
    """
    path = model.source.side.get(_GENERATION)
    if path is None or isinstance(path, Made):
        return {}
    return read_json(path, what=_GENERATION)
