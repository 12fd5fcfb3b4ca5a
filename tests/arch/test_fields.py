"""No key of config.json that changes the function is lost in Megatron's args, whatever family has it.

Every field of every real config class is changed, one at a time. A config that transformers takes and runs is either
refused by name, or what the args alone give back computes the same with the same weights. Transformers is the judge of
which keys matter: none is listed here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from dconv.arch.registry import by_name, families
from dconv.errors import DconvError
from tests.oracles import hf

#: Of a tokenizer, of files and of the run: no class computes logits from them.
NO_FUNCTION = {field.name for field in dataclasses.fields(PretrainedConfig)} - {"tie_word_embeddings"} | {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "_name_or_path"),
}
_OPEN = (1, 2, 8, 0.5, True, "gelu", [1, 1], 48, 16)
_WORDS = (
    *("gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "swish", "relu2"),
    *("full", "greedy", "group_limited_greedy", "gated-silu", "gated-gelu", "absolute"),
)
_SCALED = {"factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", **_SCALED}
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 777.5},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "partial_rotary_factor": 0.25},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 0.5},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 3.0, **_SCALED},
    {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0,
     "original_max_position_embeddings": 8192},
    _YARN,
    *({**_YARN, key: value} for key, value in (
        ("attention_factor", 0.5), ("beta_fast", 16.0), ("beta_slow", 2.0), ("truncate", False), ("mscale", 0.6),
        ("mscale_all_dim", 0.6), ("rope_theta", 500.0), ("partial_rotary_factor", 0.5),
    )),
    {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    *({"rope_type": "longrope", "short_factor": [1.5] * pairs, "long_factor": [2.0] * pairs, **_SCALED}
      for pairs in (2, 4, 8)),
)  # fmt: skip
TOKENS = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(4))
#: Gains of norms and all else are drawn apart from what transformers starts them at.
_SMALL = {"num_hidden_layers": 2, "vocab_size": 301}
SIZES: dict[str, dict[str, Any]] = {
    "nemotron_h": {"vocab_size": 301, "chunk_size": 128},
    "mamba2": {**_SMALL, "chunk_size": 256},
    "bamba": {"vocab_size": 301},
    "llava": {},
    "t5": {"num_layers": 2, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
}


def others(value: object) -> Iterator[object]:
    """What a field could be instead."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, value - 1, value // 2, 0, 3, None)
    elif isinstance(value, float):
        yield from (value * 2 + 0.5, value / 2, 0.0, None)
    elif isinstance(value, str):
        yield from _WORDS
    elif isinstance(value, list):
        yield from (value[::-1], value[1:], [0], [1])
        for kind in {str(one) for one in value} | {"sliding_attention", "full_attention"}:
            yield [kind] * len(value)
        yield [*value[:-1], "sliding_attention"]
        yield [0.05, 0.1]
    elif value is None:
        yield from _OPEN


def changed(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """config.json with one thing changed, and what."""
    for key in config:
        if isinstance(config[key], dict) and key.endswith("_config"):
            for what, inner in changed(config[key]):
                yield f"{key}: {what}", {**config, key: inner}
        elif key not in NO_FUNCTION and key != "model_type":
            for value in others(config[key]):
                yield f"{key} {value!r}", {**config, key: value}
    if (rope := config.get("rope_parameters")) is not None:
        flat = {key: value for key, value in rope.items() if not isinstance(value, dict)}
        for one in ROPES:
            yield f"rope_parameters {one}", {**config, "rope_parameters": {"rope_theta": 10000.0, **flat, **one}}
            bare = {key: value for key, value in config.items() if key != "rope_parameters"}
            yield f"rope_scaling {one}", {**bare, "rope_scaling": one, **{k: v for k, v in flat.items() if "_fac" in k}}


def built(config: PretrainedConfig, architecture: str) -> Any:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    return getattr(transformers, architecture)(config).float().eval().requires_grad_(False)


def answer(model: Any) -> torch.Tensor:
    if model.config.model_type == "t5":
        return hf.logits(model, TOKENS, decoder_input_ids=TOKENS)
    if model.config.model_type == "llava":
        vision = model.config.vision_config
        side = vision.image_size
        pixels = torch.randn(1, vision.num_channels, side, side, generator=torch.Generator().manual_seed(5))
        patches = (side // vision.patch_size) ** 2 + (model.config.vision_feature_select_strategy == "full")
        image = torch.full((1, patches), model.config.image_token_index)
        return hf.logits(model, torch.cat([image, TOKENS], 1), pixel_values=pixels)
    return hf.logits(model, TOKENS)


def weights(model: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    found = {}
    for name, tensor in sorted(model.state_dict().items()):
        spread = torch.randn(tensor.shape, generator=draw) / (tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else 4)
        start = float("norm" in name.lower() or "ln_" in name or ".ln." in name)
        found[name] = spread + start if tensor.is_floating_point() else tensor
    return found


def computed(config: PretrainedConfig, architecture: str) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    """Random weights and the logits; None where transformers' code stumbles over this config: no model then."""
    try:
        model = built(config, architecture)
        values = weights(model)
        model.load_state_dict(values)
        expected = answer(model)
    except Exception:
        return None
    return (values, expected) if bool(expected.isfinite().all()) else None


def read(kind: type[PretrainedConfig], config: dict[str, Any]) -> PretrainedConfig | None:
    try:
        return kind.from_dict(copy.deepcopy(config))
    except Exception:  # of transformers' validation: no config of this class
        return None


def said(config: dict[str, Any], before: str = "") -> dict[str, str]:
    """What a config says beside `NO_FUNCTION`, tables within it flattened."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found |= said(value, f"{key}.")
        elif key not in NO_FUNCTION:
            found[before + key] = repr(value)
    return found


def unlike(one: PretrainedConfig, other: PretrainedConfig) -> set[tuple[str, str | None, str | None]]:
    first, second = said(one.to_dict()), said(other.to_dict())
    return {(key, first.get(key), second.get(key)) for key in first | second if first.get(key) != second.get(key)}


def moved(real: PretrainedConfig, back: PretrainedConfig, architecture: str) -> str:
    """How the second computes something else with the same weights; empty where it does not."""
    before = computed(real, architecture)
    if before is None:
        return ""
    values, expected = before
    try:
        model = built(back, architecture)
        model.load_state_dict(values)
        found = answer(model)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    return "" if apart < 1e-4 else f"logits {apart:.1e} apart"


@pytest.mark.parametrize("name", [name for name in families() if by_name(name).config.model_type in CONFIG_MAPPING])
def test_no_field_is_lost_in_the_args(name: str) -> None:
    family = by_name(name).config
    kind: Any = CONFIG_MAPPING[family.model_type]
    original, _ = hf.tiny(name, **SIZES.get(name, _SMALL))
    config = {**original.to_dict(), "architectures": [family.architecture]}
    usual = read(kind, family.to_hf(family.to_args(config)))
    assert usual is not None
    assert not moved(original, usual, family.architecture)
    harmless = unlike(original, usual)
    lost, taken, refused = [], 0, 0
    for what, other in changed(config):
        real = read(kind, other)
        if real is None:
            continue
        try:
            args = family.to_args(other)
        except DconvError:
            refused += 1
            continue
        taken += 1
        try:
            back = read(kind, family.to_hf(args))
        except DconvError as refusal:
            lost += [f"{what}: {refusal}"] if computed(real, family.architecture) else []
            continue
        if back is None:
            lost += [f"{what}: the class does not take it back"] if computed(real, family.architecture) else []
        elif unlike(real, back) - harmless and (why := moved(real, back, family.architecture)):
            lost.append(f"{what}: {why}")
    assert not lost, "\n".join(lost)
    assert taken > 20, "nothing was judged"
    assert refused > 5, "nothing was refused"
