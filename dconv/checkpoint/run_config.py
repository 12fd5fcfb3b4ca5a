"""Megatron-Bridge's ``run_config.yaml``: the model's config as its checkpoints carry it, instead of Megatron-LM's args.

Read as plain data (``_target_`` names what Bridge would call; here it is only compared), and written beside the args,
so that Bridge loads a converted checkpoint as one of its own. Source: ``megatron/bridge/models/gpt_provider.py`` (field
names), ``megatron/bridge/training/model_load_save.py`` (what is read), Megatron-Bridge 0.6.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dconv.arch.carried import NO_PRE_NORMS, POST_NORMS, RESCALING
from dconv.checkpoint.files import read_small
from dconv.checkpoint.pickled import bounded
from dconv.errors import Damaged
from dconv.sharding.parsed import is_mapping

NAME: Final = "run_config.yaml"

#: Its dataclasses take some 15 kB.
_MAX_BYTES: Final = 4 << 20
_PROVIDER: Final = "megatron.bridge.models.gpt_provider.GPTModelProvider"
#: Providers whose fields say all that their models compute. Others (Gemma's, OLMoE's …) bring layers of their own.
_BY_FIELDS: Final = re.compile(
    r"megatron\.bridge\..*\.(?:GPT|MLA|(?:Code)?Llama(?:2|3|31|32)|Mistral(?:Small3)?|Qwen(?:2|25|3|3MoE)|"
    r"DeepSeek\w*|Moonlight)ModelProvider\w*"
)
_SILU: Final = "torch.nn.functional.silu"
_QUICK_GELU: Final = "megatron.core.fusions.fused_bias_geglu.quick_gelu"
_TARGET: Final = "_target_"

#: Fields whose arg has another name.
_ARG_OF: Final = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
#: Fields written under their arg's own name.
_SAME: Final = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization",
    "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
    "attention_dropout", "hidden_dropout", "init_method_std", "position_embedding_type", "rotary_percent",
    "rotary_base", "rotary_interleaved", "rope_scaling_factor", "yarn_original_max_position_embeddings",
    "yarn_beta_fast", "yarn_beta_slow", "yarn_correction_range_round_to_int", "seq_length", "window_size",
    "window_attn_skip_freq", "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "vocab_size",
    "make_vocab_size_divisible_by", "multi_latent_attention", "bf16", "fp16", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size", "sequence_parallel",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "moe_ffn_hidden_size", "moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
    "moe_router_topk", "moe_router_num_groups", "moe_router_group_topk", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_dtype",
    "moe_router_enable_expert_bias",
)  # fmt: skip
#: Args of models that this provider does not build.
_UNSAID: Final = (
    *RESCALING, *POST_NORMS, *NO_PRE_NORMS, "qk_layernorm_full_width", "multi_latent_attention", "mtp_num_layers",
    "moe_router_group_score_topk",
)  # fmt: skip
#: Args that are no fields: said otherwise below, older names, or of a run. Others are fields of the same name.
_NO_FIELDS: Final = {
    *("max_position_embeddings", "norm_epsilon", "apply_layernorm_1p", "untie_embeddings_and_output_weights"),
    *("add_position_embedding", "num_query_groups", "group_query_attention", "use_rotary_position_embeddings"),
    *("swiglu", "quick_geglu", "squared_relu", "padded_vocab_size", "no_save_optim", "no_save_rng", "iteration"),
    *("consumed_train_samples", "consumed_valid_samples", "params_dtype", "transformer_impl", "ckpt_format"),
}


def read_args(path: Path) -> tuple[dict[str, object] | None, str]:
    """Megatron-LM's args for a ``run_config.yaml``, or why it does not tell the model; neither without such a file.

    Raises:
        Damaged: it is no YAML, or has no model.
    """
    import yaml  # most checkpoints have no such file

    if not path.exists():
        return None, ""
    data = read_small(path, what=NAME)
    if len(data) > _MAX_BYTES or b"<<" in data:  # merged maps may double at every level
        raise Damaged("no run config that Megatron-Bridge writes", where=str(path), found=f"{len(data)} bytes")
    try:
        run: Any = yaml.safe_load(data)
    except (ValueError, RecursionError, yaml.YAMLError) as fault:
        raise Damaged("not a YAML file", where=str(path), found=str(fault)[:200]) from fault
    bounded(run, where=str(path), nodes=100_000)
    model = run.get("model") if is_mapping(run) else None
    if not is_mapping(model):
        raise Damaged("no model in Megatron-Bridge's run config", where=str(path), expected="a mapping under model")
    target = model.get(_TARGET)
    if target is not None and not _BY_FIELDS.fullmatch(str(target)):
        return None, f"{NAME} of {target!s:.120}, whose code computes what its fields do not say"
    return _to_args({str(key): value for key, value in model.items()}), ""


def _to_args(model: Mapping[str, Any]) -> dict[str, object]:
    plain = {key: _plain(value) for key, value in model.items()}
    args = {field: value for field, value in plain.items() if field not in _ARG_OF}
    args |= {arg: plain[field] for field, arg in _ARG_OF.items() if field in plain}
    args["max_position_embeddings"] = plain.get("seq_length")
    args["untie_embeddings_and_output_weights"] = not plain.get("share_embeddings_and_output_weights")
    args["group_query_attention"] = plain.get("num_query_groups") is not None
    activation = args.pop("activation_func", None) if plain.get("gated_linear_unit") is True else None
    args["swiglu"], args["quick_geglu"] = activation == _SILU, activation == _QUICK_GELU
    if activation in (_SILU, _QUICK_GELU):
        del args["gated_linear_unit"]  # these two args set it
    if plain.get("should_pad_vocab") is not True:  # then the size is that of the tensor
        args["padded_vocab_size"] = plain.get("vocab_size")
    return args


def _plain(value: Any) -> object:
    """A ``_target_`` by its name, everything else as it is."""
    named = value.get(_TARGET) if is_mapping(value) else None
    return named if isinstance(named, str) else value


def can_say(args: Mapping[str, object]) -> bool:
    """Whether `dump` has words for the model: a provider of GPT with a gated SiLU, all of whose layers are alike."""
    alike = args.get("moe_layer_freq") in (None, 1)
    other = args.get("is_hybrid_model") or args.get("vision_model_type")
    return alike and bool(args.get("swiglu")) and not other and not any(args.get(arg) for arg in _UNSAID)


def dump(args: Mapping[str, object], vocabulary: int, tp: int) -> bytes:
    """The ``run_config.yaml`` of a model that it `can_say`, ``vocabulary`` rows before padding, on ``tp`` ranks."""
    grouped = args.get("group_query_attention")
    dtype = "torch." + ("bfloat16" if args.get("bf16") else "float16" if args.get("fp16") else "float32")
    others = {*_SAME, *_ARG_OF.values(), *_NO_FIELDS}
    model = {
        _TARGET: _PROVIDER,
        **{name: args[name] for name in _SAME if name in args},
        **{field: args[arg] for field, arg in _ARG_OF.items() if arg in args},
        **{name: value for name, value in args.items() if name not in others and value not in (None, False)},
        "num_query_groups": args.get("num_query_groups") if grouped else args.get("num_attention_heads"),
        "share_embeddings_and_output_weights": not args.get("untie_embeddings_and_output_weights"),
        "gated_linear_unit": True,
        "activation_func": _named(_SILU),
        # Bridge pads nothing that it imports and exports the padding, too: asked for only where it cannot do without
        "should_pad_vocab": vocabulary % tp != 0,
        "params_dtype": _named(dtype),
        "pipeline_dtype": _named(dtype),
    }
    stored = {"save_optim": False, "save_rng": False, "ckpt_format": "torch_dist", "fully_parallel_save": False}
    lines = [
        line
        for section, entries in (("checkpoint", stored), ("model", model))
        for line in (f"{section}:", *(f"  {name}: {_scalar(value)}" for name, value in entries.items()))
    ]
    return ("\n".join(lines) + "\n").encode()


def _scalar(value: object) -> str:
    """JSON is YAML but for small numbers: 1e-05 would be read as text."""
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def _named(target: str) -> dict[str, object]:
    return {_TARGET: target, "_call_": False}
