"""A config.json as the metadata of a GGUF, and the tables that it stores as tensors: `dconv.arch.gguf` the other way.

The keys of each architecture are those that llama.cpp's own converter writes (``set_gguf_parameters`` and
``generate_extra_tensors`` in ``conversion/*.py`` of 2026-11, as vendored by llama-cpp-python 0.3.36). Nothing here
decides whether they say enough: what was written is read back, and another model than the one that went in is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Final

from dconv.arch import predictors, registry
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family
from dconv.arch.fields import number, positive, whole
from dconv.arch.gguf import ARCHS, config_of
from dconv.arch.gguf_metadata import Metadata, fp32
from dconv.arch.gguf_parts import SCALES, SIGMOID, SIZES, SOFTMAX
from dconv.arch.gguf_rope import FREQUENCIES, LONG, SHORT, llama3_factors, longrope_attention
from dconv.arch.layouts import Facts, size
from dconv.arch.rope import rope_parameters
from dconv.arch.translate import CONFIG
from dconv.errors import Refused
from dconv.sharding.parsed import is_list, is_list_or_tuple, is_mapping
from dconv.sharding.region import Index

Hf = Mapping[str, Any]
Values = dict[str, Any]
#: Args of Megatron that say nothing of the function, or that no GGUF has.
_UNSAID: Final = frozenset({"init_method_std", "attention_dropout", "bf16", "fp16", "seq_length"})


@dataclass(frozen=True)
class Written:
    """What a GGUF says of a model.

    Attributes:
        values: keys, ``general.architecture`` among them.
        tables: small tensors of fp32 that stand for numbers of the config, by name.
    """

    arch: str
    values: Values
    tables: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


def _arch(family: Family) -> tuple[str, DecoderConfig]:
    """GGUF's architecture for a family, and its config.

    Raises:
        Refused: it has none, or none that is known here.
    """
    found = next((name for name, arch in ARCHS.items() if family.name in arch.families), None)
    if found is None or not isinstance(family.config, DecoderConfig):
        known = sorted({name for arch in ARCHS.values() for name in arch.families})
        folds = family.mup is not None
        raise Refused(
            f"a {family.name} has no architecture in GGUF, nothing was written",
            expected="one of " + ", ".join(known),
            found=family.name,
            do="--mup2llama folds its scalars into the weights first" if folds else "",
        )
    return found, family.config


def written(family: Family, config: Hf) -> Written:
    """The metadata of a model, those of its vocabulary excepted.

    Raises:
        Refused: see `_arch`.
        Damaged: a value of the wrong type.
    """
    arch, known = _arch(family)
    known.unsayable(config)  # reads the keys that the family knows, each by its type
    said: Values = {**known.defaults, **config, "experts": known.facts(config).get("experts")}
    said |= {**known.filling(said), "model_type": known.model_type}
    heads = said["num_attention_heads"]
    said["num_key_value_heads"] = said["num_key_value_heads"] or heads
    said["head_width"] = said.get("head_dim") or said["hidden_size"] // heads
    values, tables = _WRITE[arch](said)
    own = {f"{arch}.{key}": value for key, value in values.items() if value is not None}
    return Written(arch, {"general.architecture": arch, **own}, tables)


def check(family: Family, config: Hf, made: Written, shapes: Mapping[str, Index]) -> None:
    """That what was written says all of the config, by reading it back.

    Args:
        family: of the model.
        config: its config.json.
        made: of `written`.
        shapes: of GGUF's tensors.

    Raises:
        Refused: llama.cpp would compute another function, or what is computed cannot be told.
    """
    metadata = Metadata(made.arch, made.values, shapes, lambda name: [fp32(x) for x in made.tables[name]], "the output")
    try:
        back = config_of(metadata)
    except Refused as fault:
        raise _unsaid(family, made.arch, f"{fault.where}: expected {fault.expected}, found {fault.found}") from fault
    other = registry.detect(back, None)
    ours, theirs = family.config.to_args(config, False), other.config.to_args(back, False)
    odd = [
        f"{arg} {ours.get(arg)!r:.60}, in the GGUF {theirs.get(arg)!r:.60}"
        for arg in sorted(ours.keys() | theirs.keys())
        if arg not in _UNSAID and not _same(ours.get(arg), theirs.get(arg))
    ]
    lost, found = family.config.unsayable(config), other.config.unsayable(back)
    odd += sorted(set(lost) ^ set(found))
    if odd:
        raise _unsaid(family, made.arch, "\n".join(odd))


def _same(a: Any, b: Any) -> bool:
    """Equal, as far as fp32 tells; of rotary tables by the newer name of their kind."""
    if is_mapping(a) and is_mapping(b):
        ours, theirs = ({**one, "type": None, "rope_type": one.get("rope_type") or one.get("type")} for one in (a, b))
        return all(_same(ours.get(key), theirs.get(key)) for key in ours.keys() | theirs.keys())
    if is_list_or_tuple(a) and is_list_or_tuple(b):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool):
        return a == b or fp32(float(a)) == fp32(float(b))
    return a == b


def _unsaid(family: Family, arch: str, found: str) -> Refused:
    return Refused(
        f"a GGUF of {arch} cannot say all of this {family.name} config, nothing was written",
        where=CONFIG,
        expected="what llama.cpp computes for this architecture",
        found=found,
    )


def not_loaded(made: Written) -> str:
    """Why llama.cpp's own loader does not take what its converter writes; "" where it does.

    Source: ``src/models/deepseek2.cpp`` and ``olmoe.cpp`` of 2026-10.
    """

    def said(key: str) -> Any:
        return made.values.get(f"{made.arch}.{key}")

    if made.arch == "deepseek2" and said("attention.q_lora_rank") is None and said("block_count") not in (26, 27, 48):
        return "queries of full rank, which it has in DeepSeek-V2-Lite's 27 layers alone"
    if made.arch == "olmoe" and said("attention.head_count") != said("attention.head_count_kv"):
        return "fewer heads of keys than of queries, whose norms it takes to be alike"
    return ""


def without_predictors(config: Hf, facts: Facts) -> Hf:
    """The config of what a GGUF holds: llama.cpp's converter leaves token predictors out."""
    return predictors.without(config) if size(facts, "mtp") else config


_Made = tuple[Values, dict[str, list[float]]]
_Write = Callable[[Hf], _Made]


def _common(said: Hf, *, heads: bool = True, ffn: str = "intermediate_size") -> Values:
    """What all have, without rotation; the width of a head only with ``heads``."""
    values: Values = {ours: whole(said, key, CONFIG) for key, ours in SIZES.items()}
    values["feed_forward_length"] = said[ffn]
    values["attention.layer_norm_rms_epsilon"] = float(said["rms_norm_eps"])
    if heads:
        values |= dict.fromkeys(("attention.key_length", "attention.value_length"), said["head_width"])
    return values


def _rotation(said: Hf) -> Values:
    return {**rope_parameters(said)}


def _rotated(said: Hf) -> int:
    """Elements of a head that are rotated, by the part that the config says."""
    return int(said["head_width"] * _rotation(said).get("partial_rotary_factor", 1.0))


def _rope(said: Hf) -> Values:
    rope = _rotation(said)
    values: Values = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for key, ours in (
            ("attention_factor", "yarn_attn_factor"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")
        ):  # fmt: skip
            values[f"rope.scaling.{ours}"] = float(rope[key]) if rope.get(key) is not None else None
    elif kind in ("longrope", "su"):
        values["rope.scaling.type"] = "longrope"
    return values


def _experts(said: Hf, width: str = "") -> Values:
    values: Values = {"expert_count": said["experts"], "expert_used_count": said["num_experts_per_tok"]}
    return {**values, "expert_feed_forward_length": said[width]} if width else values


def _factors(said: Hf) -> dict[str, list[float]]:
    """The tables of a longrope."""
    rope = _rotation(said)
    return {
        name: [number({key: factor}, key, CONFIG) for factor in factors]
        for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))
        if is_list(factors := rope.get(key))
    }


def _llama3(said: Hf) -> dict[str, list[float]]:
    rope = _rotation(said)
    if rope["rope_type"] != "llama3":
        return {}
    numbers = {**_LLAMA3, **rope}
    for key in ("rope_theta", "factor", *_LLAMA3):
        positive(numbers, key, CONFIG)
    return {FREQUENCIES: llama3_factors(rope["rope_theta"], said["head_width"], numbers)}


#: What ``_compute_llama3_parameters`` demands, and llama.cpp's converter takes where it is not said.
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _llama(said: Hf) -> _Made:
    values = {
        **_common(said), **_rope(said), "vocab_size": said["vocab_size"], "rope.dimension_count": said["head_width"],
    }  # fmt: skip
    if said["model_type"] == "mixtral":
        values |= _experts(said)
    return values, _llama3(said)


def _granite(said: Hf) -> _Made:
    return {
        **_common(said, heads=False), **_rope(said), "vocab_size": said["vocab_size"],
        "rope.dimension_count": said["hidden_size"] // said["num_attention_heads"],
        **{ours: number(said, key, CONFIG) for key, ours in SCALES.items()},
    }, _llama3(said)  # fmt: skip


def _minicpm(said: Hf) -> _Made:
    return {
        **_common(said, heads=False), **_rope(said),
        "embedding_scale": number(said, "scale_emb", CONFIG),
        "residual_scale": number(said, "scale_depth", CONFIG) / sqrt(said["num_hidden_layers"]),
        "logit_scale": said["hidden_size"] / positive(said, "dim_model_base", CONFIG),
    }, _factors(said)  # fmt: skip


def _minicpm3(said: Hf) -> _Made:
    rotated = said["qk_rope_head_dim"]
    return {
        **_common(said, heads=False), "vocab_size": said["vocab_size"],
        "attention.q_lora_rank": said["q_lora_rank"], "attention.kv_lora_rank": said["kv_lora_rank"],
        "attention.key_length": said["qk_nope_head_dim"] + rotated, "rope.dimension_count": rotated,
    }, _factors(said)  # fmt: skip


def _plain(said: Hf) -> _Made:
    return {**_common(said), **_rope(said)}, {}


def _qwen2_moe(said: Hf) -> _Made:
    return {
        **_common(said, heads=False), **_rope(said), **_experts(said, "moe_intermediate_size"),
        "expert_shared_feed_forward_length": said["shared_expert_intermediate_size"],
    }, {}  # fmt: skip


def _qwen3_moe(said: Hf) -> _Made:
    return {**_common(said), **_rope(said), **_experts(said, "moe_intermediate_size")}, {}


def _olmoe(said: Hf) -> _Made:
    return {**_common(said, heads=False), **_rope(said), **_experts(said)}, {}


def _minimax_m2(said: Hf) -> _Made:
    rotated = said.get("rotary_dim")  # transformers 5 says the part instead
    return {
        **_common(said), **_rope(said), **_experts(said, "intermediate_size"), "expert_gating_func": SIGMOID,
        "rope.dimension_count": _rotated(said) if rotated is None else whole(said, "rotary_dim", CONFIG),
    }, {}  # fmt: skip


def _gpt_oss(said: Hf) -> _Made:
    return {
        **_common(said), **_rope(said), **_experts(said, "intermediate_size"),
        "attention.sliding_window": said["sliding_window"],
    }, {}  # fmt: skip


def _gemma(said: Hf) -> _Made:
    return _common(said), {}


def _gemma2(said: Hf) -> _Made:
    caps = {key: None if said[key] is None else float(said[key])
            for key in ("attn_logit_softcapping", "final_logit_softcapping")}  # fmt: skip
    return {**_common(said), **caps, "attention.sliding_window": said["sliding_window"]}, {}


def _gemma3(said: Hf) -> _Made:
    tables: Hf = said.get("rope_parameters") or {}
    full: Hf = tables.get("full_attention") or {}
    slides: Hf = tables.get("sliding_attention") or {}
    scaled: Hf = said.get("rope_scaling") or {}
    whole: Hf = {**said, "rope_parameters": None, "rope_scaling": {**full, **scaled}}
    cap = said.get("final_logit_softcapping")
    return {
        **_common(said), **_rope(whole),
        "rope.freq_base_swa": float(slides.get("rope_theta", said["rope_local_base_freq"])),
        "attention.sliding_window": said["sliding_window"],
        "final_logit_softcapping": float(cap) if cap else None,
    }, {}  # fmt: skip


def _glm4(said: Hf) -> _Made:
    return {**_common(said), **_rope(said), "rope.dimension_count": _rotated(said)}, {}


def _phi3(said: Hf) -> _Made:
    rope = _rotation(said)
    context, key = said["max_position_embeddings"], "original_max_position_embeddings"
    before = whole({key: said.get(key) or rope.get(key) or context}, key, CONFIG)
    tables = _factors(said)
    return {
        **_common(said, heads=False), "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.original_context_length": before,
        "rope.scaling.attn_factor": longrope_attention(context, before) if tables else None,
        "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * said["hidden_size"])
        // said["num_attention_heads"],
        "attention.sliding_window": said["sliding_window"] or 0,
    }, tables  # fmt: skip


def _late(said: Hf) -> Values:
    return {
        **_experts(said, "moe_intermediate_size"), "vocab_size": said["vocab_size"],
        "leading_dense_block_count": said["first_k_dense_replace"],
        "expert_shared_count": said["n_shared_experts"] or 0,
    }  # fmt: skip


def _deepseek(said: Hf) -> _Made:
    return {
        **_common(said, heads=False), **_rope(said), **_late(said), "rope.dimension_count": said["head_width"],
        "rope.scaling.type": "none", "expert_weights_scale": 1.0,
        "expert_gating_func": SOFTMAX if said.get("scoring_func") else None,
    }, {}  # fmt: skip


def _deepseek2(said: Hf) -> _Made:
    rank, rotated = said["kv_lora_rank"], said["qk_rope_head_dim"]
    multiplier = _rotation(said).get("mscale_all_dim")
    scale = said.get("routed_scaling_factor")
    return {
        **_common(said, heads=False), **_rope(said), **_late(said),
        "attention.head_count_kv": 1,  # attention absorbs kv_b: all heads share one key
        "attention.q_lora_rank": said["q_lora_rank"], "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotated, "attention.value_length": rank,
        "attention.key_length_mla": said["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": said["v_head_dim"],
        "rope.dimension_count": rotated,
        "expert_group_count": said.get("n_group") or 1, "expert_group_used_count": said.get("topk_group") or 1,
        "expert_gating_func": SIGMOID if said["model_type"] == "deepseek_v3" else SOFTMAX,
        "expert_weights_scale": None if scale is None else float(scale),
        "expert_weights_norm": True if said.get("norm_topk_prob") else None,
        "rope.scaling.yarn_log_multiplier": None if multiplier is None else 0.1 * float(str(multiplier)),
    }, {}  # fmt: skip


_WRITE: Final[Mapping[str, _Write]] = {
    "llama": _llama, "granite": _granite, "minicpm": _minicpm, "minicpm3": _minicpm3, "qwen2": _plain, "qwen3": _plain,
    "qwen2moe": _qwen2_moe, "qwen3moe": _qwen3_moe, "olmo2": _plain, "olmoe": _olmoe, "minimax-m2": _minimax_m2,
    "gpt-oss": _gpt_oss, "gemma": _gemma, "gemma2": _gemma2, "gemma3": _gemma3, "glm4": _glm4, "phi3": _phi3,
    "deepseek": _deepseek, "deepseek2": _deepseek2,
}  # fmt: skip
