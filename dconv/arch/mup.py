"""muP scalars of a config.json, and which weights they can be folded into so that a plain model computes the same.

Every scalar multiplies what a linear map gives or takes, so the map's weights (and its bias, where the scalar is on
what the map gives) can carry it. Found by keys, never by a model's name. Sources: OpenBMB's ``modeling_minicpm.py`` and
its ``minicpm2llama.py``; transformers' ``modeling_granite.py`` and ``modeling_minicpm3.py``; thunlp/BlockFFN's
``modeling_minicpm.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from dconv.arch.carried import rescales
from dconv.arch.fields import positive, whole
from dconv.arch.layouts import Facts
from dconv.arch.rope import LONGROPE, rope_parameters
from dconv.arch.translate import CONFIG, Said
from dconv.errors import Refused

#: Keys by which a config.json says that a model has muP scalars, whatever the model is called.
KEYS: Final = (
    *("scale_emb", "scale_depth", "dim_model_base"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor and the weights that carry it.

    Attributes:
        words: the factor as a formula of config.json's keys.
        value: the same, computed in fp64 from config.json (with the class's defaults) and the facts.
        tensors: patterns of HuggingFace's names in the model to be folded.
    """

    words: str
    value: Callable[[Said, Facts], float]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Mup:
    """How a family's scalars are folded.

    Attributes:
        keys: the scalars' keys of config.json.
        factors: by the part of the model that they concern; a tied model's head counts as one of its own, made from
            the embedding as it is stored.
        to: the family that computes the folded model; "" is the model's own, with scalars that multiply by 1.
        config: the folded model's config.json, from the family's own (with its class's defaults) and the facts.
        dropped: keys that the folded model has nothing for, with what that means.
    """

    keys: tuple[str, ...]
    factors: Mapping[str, Factor] = field(hash=False)
    to: str
    config: Callable[[Said, Facts], dict[str, object]]
    dropped: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)


def scalars(config: Mapping[str, object]) -> dict[str, object]:
    """The muP scalars that this config.json says, those left out that change nothing whatever the model."""
    return {key: config[key] for key in KEYS if rescales(key, config.get(key))}


def _said(key: str) -> Callable[[Said, Facts], float]:
    return lambda said, _: 1.0 if said.get(key) is None else positive(said, key, CONFIG)


def _inverse(key: str) -> Callable[[Said, Facts], float]:
    return lambda said, facts: 1.0 / _said(key)(said, facts)


def _depth(said: Said, facts: Facts) -> float:
    """``null`` stands for sqrt(layers): transformers' ``configuration_minicpm3.py``."""
    if said.get("scale_depth") is None:
        return 1.0
    return positive(said, "scale_depth", CONFIG) / math.sqrt(facts["layers"])


def _width(said: Said, facts: Facts) -> float:
    """``null`` stands for hidden_size: the same."""
    return 1.0 if said.get("dim_model_base") is None else positive(said, "dim_model_base", CONFIG) / facts["hidden"]


def _softmax(said: Said, facts: Facts) -> float:
    """Scores are scaled by the key's value; Llama scales them by 1 / sqrt(head_dim) in any case."""
    return positive(said, "attention_multiplier", CONFIG) * math.sqrt(facts["head_dim"])


#: Keys that mean the same in every decoder here, and those of a run; what config.json says of them goes along.
_CARRIED: Final = (
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "dtype", "torch_dtype"),
)
_SIZES: Final = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "groups",
    "head_dim": "head_dim",
}


def _plain(architecture: str, model_type: str, said: Said, facts: Facts) -> dict[str, object]:
    """A config.json that holds no key but those of `_SIZES` and `_CARRIED`.

    Raises:
        Refused: a key that changes what is computed and that no scalar of muP is.
    """
    foreign = {key: said[key] for key in said if key not in KEYS and rescales(key, said[key])}
    if foreign:
        raise Refused(
            f"{model_type} would compute something else, nothing was written",
            where=f"{CONFIG}: {', '.join(foreign)}",
            found="\n".join(f"{key} {value!r:.60}" for key, value in foreign.items()),
            expected="muP scalars and nothing more that scales",
        )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{key: facts[fact] for key, fact in _SIZES.items()},
        **{key: said[key] for key in _CARRIED if key in said},
        "tie_word_embeddings": False,
    }


def _refuse_stretch(said: Said) -> None:
    """MiniCPM's own code takes a longrope's stretch from the two context lengths, transformers' from keys where given.

    Raises:
        Refused: the two would differ.
    """
    rope = rope_parameters(said)
    if rope["rope_type"] != LONGROPE:
        return
    original = rope.get("original_max_position_embeddings") or said["original_max_position_embeddings"]
    lengths = {"max": said["max_position_embeddings"], "original": original}
    stretch = whole(lengths, "max", CONFIG) / whole(lengths, "original", CONFIG)
    odd = {key: rope[key] for key in ("factor", "attention_factor") if rope.get(key, stretch) != stretch}
    if odd:
        raise Refused(
            "longrope is stretched by one number in MiniCPM's code and by another in a LLaMA's, nothing was written",
            where=f"{CONFIG}: rope_scaling",
            expected=f"max_position_embeddings / original_max_position_embeddings, {stretch:g}",
            found="\n".join(f"{key} {value!r:.40}" for key, value in odd.items()),
            do="take the key out: MiniCPM's code does not read it",
        )


def llama(said: Said, facts: Facts) -> dict[str, object]:
    """A Llama's config.json of these sizes, with the keys that a run has.

    Raises:
        Refused: a key that changes what is computed and that no scalar of muP is.
    """
    biases = {"attention_bias": facts["qkv_bias"], "mlp_bias": facts["mlp_bias"]}
    return {**_plain("LlamaForCausalLM", "llama", said, facts), **biases}


def _minicpm_llama(said: Said, facts: Facts) -> dict[str, object]:
    _refuse_stretch(said)
    return llama(said, facts)


def _minicpm_mixtral(said: Said, facts: Facts) -> dict[str, object]:
    _refuse_stretch(said)
    routing = {"num_local_experts": facts["experts"], "num_experts_per_tok": said["num_experts_per_tok"]}
    return {**_plain("MixtralForCausalLM", "mixtral", said, facts), **routing, "sliding_window": None}


def minicpm_ones(said: Said) -> dict[str, object]:
    """MiniCPM's scalars that multiply by 1.

    transformers' class insists on whole numbers for two of them; sqrt(n) / sqrt(n) is 1 also in floating point.
    """
    layers, hidden = (whole(said, key, CONFIG) for key in ("num_hidden_layers", "hidden_size"))
    return {"scale_emb": 1, "scale_depth": math.sqrt(layers), "dim_model_base": hidden}


def _idle(said: Said, _: Facts) -> dict[str, object]:
    """The family's own config.json; its class has other scalars for absent keys, so that these must be said."""
    return {**said, **minicpm_ones(said), "tie_word_embeddings": False}


_EMBEDDING: Final = ("model.embed_tokens.weight",)
_HEAD: Final = ("lm_head.weight",)
#: What a block adds to the stream leaves it through these: ``w2`` of an expert; ``moe_w_out`` of a block-sparse layer,
#: or ``down_proj`` without ``.weight``.
_ADDED: Final = (
    *("model.layers.*.self_attn.o_proj.*", "model.layers.*.mlp.down_proj.*", "model.layers.*.mlp.down_proj"),
    *("model.layers.*.mlp.experts.*.w2.*", "model.layers.*.mlp.moe_w_out.*"),
)
_MINICPM_KEYS: Final = ("scale_emb", "scale_depth", "dim_model_base")
_MINICPM_FACTORS: Final = {
    "embedding": Factor("scale_emb", _said("scale_emb"), _EMBEDDING),
    "residual": Factor("scale_depth / sqrt(num_hidden_layers)", _depth, _ADDED),
    "head": Factor("dim_model_base / hidden_size", _width, _HEAD),
}
_GRANITE_FACTORS: Final = {
    "embedding": Factor("embedding_multiplier", _said("embedding_multiplier"), _EMBEDDING),
    "query": Factor("attention_multiplier * sqrt(head_dim)", _softmax, ("model.layers.*.self_attn.q_proj.*",)),
    "residual": Factor("residual_multiplier", _said("residual_multiplier"), _ADDED),
    "head": Factor("1 / logits_scaling", _inverse("logits_scaling"), _HEAD),
}
_DENSE: Final = {"sparse_config": "dense attention instead of InfLLM-v2's, which leaves out blocks of a long context"}

MINICPM: Final = Mup(_MINICPM_KEYS, _MINICPM_FACTORS, "llama", _minicpm_llama, _DENSE)
MINICPM_MOE: Final = Mup(_MINICPM_KEYS, _MINICPM_FACTORS, "mixtral", _minicpm_mixtral)
#: Of those that no LLaMA computes: latent attention, block-sparse layers.
MINICPM_ITSELF: Final = Mup(_MINICPM_KEYS, _MINICPM_FACTORS, "", _idle)
GRANITE: Final = Mup(KEYS[3:], _GRANITE_FACTORS, "llama", llama)
