"""Reading Megatron's args: old names, defaults and derived values resolved, so that one meaning has one form.

Sources: Megatron-LM's ``megatron/training/arguments.py`` (defaults, ``validate_args``), ``argument_utils.py``
(``core_transformer_config_from_args``), ``checkpointing.py`` (``load_args_from_checkpoint``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dconv.arch.fields import deep, flag, multiple, whole
from dconv.errors import Damaged
from dconv.sharding.dtypes import FROM_TORCH
from dconv.sharding.ops import FLOATS
from dconv.sharding.parsed import is_list_or_tuple

ARGS: Final = "Megatron args"

#: What Megatron takes for an arg that is not given (``arguments.py``, ``transformer_config.py``).
_DEFAULTS: Final[Mapping[str, object]] = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "norm_epsilon": 1e-5,
    "init_method_std": 0.02,
    "attention_dropout": 0.1,
    "add_bias_linear": True,
    "softmax_type": "vanilla",
    "group_query_attention": True,  # a store_true flag: where it is absent the namespace is not Megatron-LM's own
}
#: Args whose name changed in 2026 (before: ``core_transformer_config_from_args`` renamed them): new name, old name.
RENAMED: Final = {"layernorm_epsilon": "norm_epsilon", "layernorm_zero_centered_gamma": "apply_layernorm_1p"}
_DTYPES: Final = {"half": "float16", "float": "float32"}


def dtype_name(value: object) -> str:
    """``bfloat16`` for itself, ``torch.bfloat16`` and anything that prints so; empty for None."""
    name = "" if value is None else str(value).rpartition(".")[2]
    return _DTYPES.get(name, name)


def dtype_of(config: Mapping[str, object]) -> str:
    """The dtype of a model's plain weights, by dconv's name, as config.json says it; bf16 where it says none.

    Nor is a dtype of codes one: checkpoints in FP8 may say ``float8_e4m3fn``, of what is stored.
    """
    found = FROM_TORCH.get(dtype_name(config.get("dtype") or config.get("torch_dtype")), "")
    return found if found in FLOATS else "bf16"


def named_as_of_old(args: Mapping[str, object]) -> dict[str, object]:
    """The args under the names that Megatron-LM used until 2026."""
    return {RENAMED.get(arg, arg): value for arg, value in args.items()}


def read(args: Mapping[str, object]) -> dict[str, object]:
    """Args as Megatron means them: old names, defaults, and what ``validate_args`` derives."""
    given = {arg: value for arg, value in named_as_of_old(args).items() if value is not None}
    said = {**_DEFAULTS, **given}
    if said.get("use_rotary_position_embeddings"):
        said["position_embedding_type"] = "rope"
    if "disable_bias_linear" in given:  # its name until 2023, see load_args_from_checkpoint
        said["add_bias_linear"] = not given["disable_bias_linear"]
    # argument_utils.py: without the flag the groups are the heads, though the namespace says 1
    if not said["group_query_attention"] or "num_query_groups" not in said:
        said["num_query_groups"] = said.get("num_attention_heads")
    if "kv_channels" not in said:
        heads, hidden = (whole(said, arg, ARGS) for arg in ("num_attention_heads", "hidden_size"))
        said["kv_channels"] = multiple("hidden_size", hidden, "num_attention_heads", heads, ARGS)
    if "ffn_hidden_size" not in said:
        hidden = whole(said, "hidden_size", ARGS)
        said["ffn_hidden_size"] = int((4 * hidden * 2 / 3) / 64) * 64 if said.get("swiglu") else 4 * hidden
    return said


def biases(said: Mapping[str, object]) -> dict[str, bool]:
    """``megatron/core/transformer/attention.py`` and ``mlp.py``: which linear layers have a bias."""
    every, qkv = flag(said, "add_bias_linear", ARGS), flag(said, "add_qkv_bias", ARGS)
    return {"qkv_bias": every or qkv, "out_bias": every, "mlp_bias": every}


def window(said: Mapping[str, object]) -> tuple[int | None, list[bool]]:
    """Width as transformers counts it, and which layers slide (``is_layer_window_attention``, layers count from 1).

    Raises:
        Damaged: not a causal window, or not one entry a layer.
    """
    layers = deep(said, "num_layers", ARGS)
    size, skip = said.get("window_size"), said.get("window_attn_skip_freq")
    if size is None:
        return None, []
    if not is_list_or_tuple(size) or len(size) != 2 or not all(type(end) is int for end in size):
        raise Damaged("window_size is not a pair of whole numbers", where=ARGS, found=f"{size!r:.80}")
    if size[0] < 0:
        return None, []
    if is_list_or_tuple(skip) and len(skip) == layers:
        slides = [bool(slide) for slide in skip]
    elif skip is None or (type(skip) is int and skip > 0):
        slides = [skip is None or layer % skip != 0 for layer in range(1, layers + 1)]
    else:
        raise Damaged(
            "window_attn_skip_freq is neither a step nor one entry a layer", where=ARGS, found=f"{skip!r:.80}"
        )
    if size[1] != 0:
        raise Damaged("window_size looks ahead", where=ARGS, expected="(tokens before, 0)", found=f"{size!r:.80}")
    return (size[0] + 1, slides) if any(slides) else (None, [])
