"""How BMTrain's config.json (MiniCPM's trainers; also ModelCenter's spelling) and HuggingFace's say the same thing.

Sources: the config that MiniCPM's BMTrain converters write (``dim_model``, ``eps``, ``base``, ``tie_lm_head`` …), and
ModelCenter's ``model_center/model/config/llama_config.py`` (``norm_eps``, ``tied``, ``att_bias`` …).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family
from dconv.arch.fields import flag, multiple, number, whole
from dconv.arch.layouts import Facts
from dconv.arch.rope import rope_parameters
from dconv.arch.translate import CONFIG
from dconv.errors import Refused

_WHERE: Final = "BMTrain's config.json"
#: Sizes under their two names.
_SIZES: Final = {
    "dim_model": "hidden_size",
    "dim_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "dim_head": "head_dim",
    "vocab_size": "vocab_size",
}
#: MiniCPM's scalars, the same on both sides.
SCALES: Final = ("scale_emb", "scale_depth", "dim_model_base")
#: Values with which BMTrain's models compute what Llama's do. The base is constant in ModelCenter.
_PLAIN: Final[Mapping[str, tuple[object, ...]]] = {
    "activate_fn": ("silu", "gated_silu"),
    "ffn_activate_fn": ("gated_silu",),
    "pos_bias_type": ("rotary",),
    "qk_norm": (False,),
    "norm_bias": (False,),
    "proj_bias": (False,),
    "length_scale": (False,),
    "attn_scale": (True,),
    "post_layer_norm": (False,),
    "int8": (False,),
    "rope_scaling_type": ("", "none", "default"),
    "rope_scaling_factor": (1, 1.0),
    "pose_prob": (0, 0.0),
}
_CONSTANT_BASE: Final = 10000.0
#: Carried along as they are; none of them is of the function.
_CARRIED: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_bmtrain(config: Mapping[str, object]) -> bool:
    """Whether a config.json has BMTrain's keys."""
    return "dim_model" in config and "hidden_size" not in config


def to_hf(config: Mapping[str, object], shown: Mapping[str, int], *, tied: bool, dtype: str) -> dict[str, object]:
    """HuggingFace's config.json: a Llama's, or with MiniCPM's scalars a MiniCPM's.

    Args:
        config: BMTrain's.
        shown: sizes that the tensors show, by BMTrain's keys; they stand for keys that are not there.
        tied: no output projection is stored.
        dtype: torch's name for that of the weights.

    Raises:
        Damaged: a missing or impossible value.
        Refused: a model that computes something else.
    """
    odd = [
        f"{key} {config[key]!r:.60}"
        for key, plain in _PLAIN.items()
        if config.get(key) is not None and config[key] not in plain
    ]
    scales = {key: config[key] for key in SCALES if config.get(key) is not None}
    if scales and len(scales) < len(SCALES):
        odd.append(f"{', '.join(scales)} without {', '.join(key for key in SCALES if key not in scales)}")
    if scales and config.get("scale") is False:
        odd.append("scale false beside MiniCPM's scalars")
    if odd:
        raise Refused(
            "BMTrain's config says a model that is neither Llama nor MiniCPM, nothing was written",
            where=_WHERE,
            found="\n".join(odd),
            do="--hf-config DIR supplies a config.json",
        )
    said = {**shown, **{key: value for key, value in config.items() if value is not None}}
    if "num_kv_heads" not in said and "num_heads" in said:
        said["num_kv_heads"] = said["num_heads"]
    eps = "eps" if "eps" in said else "norm_eps"
    base = number({"base": said.get("base", said.get("rope_theta", _CONSTANT_BASE))}, "base", _WHERE)
    says_tied = next((flag(said, key, _WHERE) for key in ("tie_lm_head", "tied") if key in said), tied)
    kind = ("MiniCPMForCausalLM", "minicpm") if scales else ("LlamaForCausalLM", "llama")
    context = next((said[key] for key in ("max_length", "orig_max_length") if key in said), None)
    return {
        "architectures": [kind[0]],
        "model_type": kind[1],
        **{theirs: whole(said, ours, _WHERE) for ours, theirs in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": number(said, eps, _WHERE),
        "rope_theta": base,
        "rope_scaling": None,
        "initializer_range": number({"init_std": 0.02, **said}, "init_std", _WHERE),
        "attention_bias": flag(said, "att_bias", _WHERE),
        "mlp_bias": flag(said, "ffn_bias", _WHERE),
        "tie_word_embeddings": says_tied,
        "torch_dtype": dtype,
        **({"max_position_embeddings": context} if context is not None else {}),
        **scales,
        **{key: said.get(key) for key in _CARRIED},
    }


def from_hf(family: Family, facts: Facts, config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """BMTrain's config.json for a model of a family that is Llama's in all but name, or MiniCPM's.

    Args:
        family: of the model.
        facts: of the model.
        config: HuggingFace's.
        dtype: BMTrain's name for that of the weights (``bf16``, ``fp16``, ``fp32``).

    Raises:
        Refused: something that BMTrain's config has no key for.
    """
    kind = family.config
    if not isinstance(kind, DecoderConfig) or facts.get("experts") or facts.get("mla"):
        raise Refused(
            f"BMTrain has no model like {family.name}, nothing was written",
            expected="a dense decoder as Llama or MiniCPM",
        )
    said = {**kind.defaults, **config}
    rope = rope_parameters(said)
    # of what Megatron cannot say, all but where a bias is and MiniCPM's scalars, for which there are keys here
    lost = [line for line in family.config.unsayable(config) if not line.startswith((*SCALES, "qkv_bias"))]
    lost += [line for line in family.config.needs(config) if not line.startswith(SCALES)]
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        lost.append(f"rope {rope['rope_type']}, rotated share {rope.get('partial_rotary_factor', 1.0)}")
    if facts.get("qk_norm"):
        lost.append("norms of query and key heads")
    if facts["qkv_bias"] != facts["out_bias"]:
        lost.append("a bias on q, k, v and none on the output projection: att_bias is for all four")
    if kind.to_args(config, strict=False).get("window_size"):
        lost.append(f"sliding_window {said.get('sliding_window')!r:.40}")
    scales = {key: config[key] for key in SCALES if config.get(key) is not None}
    if scales and family.config.model_type != "minicpm":
        lost.append(f"{', '.join(scales)} in a {family.name}")
    if lost:
        raise Refused(
            f"BMTrain's config cannot say all of this {family.name}, nothing was written",
            where=CONFIG,
            expected="what Llama computes, or MiniCPM with its scalars",
            found="\n".join(lost),
        )
    sizes = {"hidden": "dim_model", "ffn": "dim_ff", "layers": "num_layers", "heads": "num_heads",
             "groups": "num_kv_heads", "head_dim": "dim_head", "vocab": "vocab_size"}  # fmt: skip
    eps = number(said, "rms_norm_eps", CONFIG)
    return {
        "_dtype": dtype,
        "activate_fn": "silu",
        **{key: int(facts[fact]) for fact, key in sizes.items()},
        "eps": eps,
        "base": rope["rope_theta"],
        "init_std": number(said, "initializer_range", CONFIG),
        "dropout_p": 0.0,
        "qk_norm": False,
        "att_bias": bool(facts["qkv_bias"]),
        "ffn_bias": bool(facts["mlp_bias"]),
        "rope_scaling_type": "",
        "rope_scaling_factor": 1,
        "max_length": whole(said, "max_position_embeddings", CONFIG),
        "tie_lm_head": bool(facts["tied"]),
        **scales,
        **{key: config[key] for key in _CARRIED if config.get(key) is not None},
    }


def sizes_shown(shapes: Mapping[str, tuple[int, ...]], num_heads: object) -> dict[str, int]:
    """The sizes that follow exactly from shapes, by BMTrain's keys.

    Args:
        shapes: by HuggingFace's names.
        num_heads: query heads; without them the size of a head is unknown.

    Raises:
        Damaged: the heads do not divide the projection.
    """
    found: dict[str, int] = {}
    vocabulary = shapes.get("model.embed_tokens.weight", ())
    if len(vocabulary) == 2:
        found = {"vocab_size": vocabulary[0], "dim_model": vocabulary[1]}
    q, k = (shapes.get(f"model.layers.0.self_attn.{name}_proj.weight", ()) for name in "qk")
    if len(q) == len(k) == 2 and type(num_heads) is int and num_heads > 0:
        found["dim_head"] = multiple("project_q", q[0], "num_heads", num_heads, _WHERE)
        found["num_kv_heads"] = multiple("project_k", k[0], "dim_head", found["dim_head"], _WHERE)
    gate = shapes.get("model.layers.0.mlp.gate_proj.weight", ())
    return {**found, "dim_ff": gate[0]} if len(gate) == 2 else found
