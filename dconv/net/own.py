"""Models of families that transformers lacks, from config.json alone: code of a checkpoint is never run.

MiniCPM (1B, 2B, 4) is Granite with other names for its scalars, and DeepSeek-MoE a Llama; so transformers' layers of
those two families compute them, with experts of our own (`dconv.net.experts`) in the place of feed-forward layers. Of
MiniCPM-V there is the language model alone, a Qwen2 under a prefix: what it makes of words.
Sources: OpenBMB's ``modeling_minicpm.py`` and ``modeling_minicpmv.py``, DeepSeek's ``modeling_deepseek.py``; how the
scalars are read is `dconv.arch.mup`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from dconv.arch import mup
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family
from dconv.arch.rope import LONGROPE, rope_parameters
from dconv.arch.translate import CONFIG
from dconv.errors import Refused
from dconv.sharding.parsed import is_list, is_mapping

#: By the family's name, what an expert's gate, up and down are called in its checkpoints.
_USUAL: Final = ("gate_proj", "up_proj", "down_proj")
_EXPERT_PARTS: Final[dict[str, tuple[str, ...]]] = {
    "minicpm": (), "minicpm_moe": ("w1", "w3", "w2"), "deepseek": _USUAL, "generic_moe": _USUAL, "minicpmv": (),
}  # fmt: skip
#: What a language model's tensors begin with in the checkpoints of a family that sees.
_PREFIXES: Final = {"minicpmv": "llm."}
#: Keys of a config.json that say nothing of its language model, or another class.
_NOT_OF_WORDS: Final = ("architectures", "model_type", "auto_map", "vision_config", "slice_config", "version")
#: Of a ``sparse_config`` that does not say it: ``MiniCPMInfLLMv2Attention`` of MiniCPM4's ``modeling_minicpm.py``.
_DENSE_LENGTH: Final = 8192


def is_theirs(config: Mapping[str, object]) -> bool:
    """Whether transformers knows a config's ``model_type``."""
    from transformers import CONFIG_MAPPING

    return str(config.get("model_type")) in CONFIG_MAPPING


def is_ours(family: Family, config: Mapping[str, object]) -> bool:
    """Whether a model is built here: its family is one of these, and transformers has none of that ``model_type``."""
    return family.name in _EXPERT_PARTS and not is_theirs(config)


def is_computed(family: Family) -> bool:
    """Whether models of a family are built at all: here, or by transformers."""
    config = {"model_type": family.config.model_type}
    return is_ours(family, config) or is_theirs(config)


def obstacle(family: Family, config: Mapping[str, object]) -> str:
    """What of a config, of a family that `is_ours`, is not computed here; empty where all of it is."""
    return "\n".join(family.config.unsayable(config))


def require(family: Family, config: Mapping[str, object], length: int) -> None:
    """Refuse, before the first byte is written, what `model` would refuse.

    Args:
        family: of the model.
        config: config.json.
        length: tokens of the longest sequence that will be asked.

    Raises:
        Refused: nobody builds the model, the config says more than these layers compute, or its attention is sparse at
            this length.
    """
    if is_ours(family, config):
        _refuse(family, config)
        _refuse_sparse(config, length)
    elif not is_theirs(config):
        from transformers import __version__

        raise Refused(
            f"a {family.name} is not computed here, nothing was written",
            where=CONFIG,
            expected="a model_type that transformers knows, or one of " + ", ".join(_EXPERT_PARTS),
            found=f"transformers {__version__} has none of type {config.get('model_type')}",
        )


def _refuse(family: Family, config: Mapping[str, object]) -> None:
    if found := obstacle(family, config):
        raise Refused(
            f"a {family.name} with this config is not computed here, nothing was written",
            where=CONFIG,
            found=found,
            expected=f"what all models of {family.name} have",
        )


def _longest(config: Mapping[str, object]) -> int | None:
    """The tokens up to which InfLLM-v2 attends to all that came before, as is computed here; None without it."""
    sparse = config.get("sparse_config")
    if not is_mapping(sparse):
        return None
    said = sparse.get("dense_len", _DENSE_LENGTH)
    return said - 1 if isinstance(said, int) else 0


def _refuse_sparse(config: Mapping[str, object], length: int) -> None:
    """Raises Refused where a sequence is so long that attention leaves out blocks of it."""
    most = _longest(config)
    if most is not None and length > most:
        raise Refused(
            "sparse attention (InfLLM-v2) is not computed here, nothing was written",
            where=f"{CONFIG}: sparse_config",
            expected=f"at most {most:,} tokens, of which all are attended to (dense_len)",
            found=f"{length:,} tokens",
            do="shorter samples: --quantization-config '{\"seqlen\": …}'",
        )


def model(family: Family, config: Mapping[str, object], attention: str, dtype: str = "float32") -> Any:
    """A model with random weights on torch's current device.

    Args:
        family: one that `is_ours`.
        config: config.json.
        attention: transformers' name of the implementation.
        dtype: torch's name of the parameters' dtype.

    Returns:
        A model of transformers; ``expert_parts`` is what an expert's gate, up and down are called in its checkpoint,
        ``stored_under`` what the names of its tensors begin with there.

    Raises:
        Damaged: see `dconv.arch.translate.Config.facts`.
        Refused: the config says more than these layers compute.
    """
    import torch
    import transformers

    declared = family.config
    _refuse(family, config)
    defaults: Mapping[str, object] = declared.defaults if isinstance(declared, DecoderConfig) else {}
    facts, said = declared.facts(config), _without_stretch({**defaults, **config})
    if family.mup:
        kin, settled = "Granite", _as_granite(family.mup, said, facts)
    elif family.name in _PREFIXES:
        kin, settled = "Qwen2", {key: value for key, value in said.items() if key not in _NOT_OF_WORDS}
    else:
        kin, settled = "Llama", mup.llama(said, facts)
    named = config.get("architectures")
    kind: Any = type(
        str(named[0]) if is_list(named) and named else declared.architecture,
        (getattr(transformers, f"{kin}ForCausalLM"),),
        {
            "__module__": __name__,
            "expert_parts": _EXPERT_PARTS[family.name],
            "stored_under": _PREFIXES.get(family.name, ""),
        },
    )
    plain = getattr(transformers, f"{kin}Config").from_dict({**settled, "tie_word_embeddings": facts["tied"]})
    net = kind._from_config(plain, dtype=getattr(torch, dtype), attn_implementation=attention)
    if "moe" in facts:
        from dconv.net.experts import put_experts

        put_experts(net, facts, declared.to_args(config))
    if _longest(config) is not None:

        def look(_module: Any, _args: Any, given: Mapping[str, Any]) -> None:
            _refuse_sparse(config, given["input_ids"].shape[1])

        net.register_forward_pre_hook(look, with_kwargs=True)
    return net


def _as_granite(scalars: mup.Mup, said: Mapping[str, object], facts: Mapping[str, Any]) -> dict[str, object]:
    factors = {part: factor.value(said, facts) for part, factor in scalars.factors.items()}
    return {
        **scalars.config(said, facts),
        "model_type": "granite",
        "embedding_multiplier": factors["embedding"],
        "residual_multiplier": factors["residual"],
        "logits_scaling": 1 / factors["head"],
        "attention_multiplier": 1 / math.sqrt(facts["head_dim"]),
    }


def _without_stretch(said: dict[str, object]) -> dict[str, object]:
    """MiniCPM's own code takes a longrope's stretch from the two context lengths and reads no other key."""
    if rope_parameters(said)["rope_type"] != LONGROPE:
        return said
    ropes = {key: said.get(key) for key in ("rope_scaling", "rope_parameters")}
    return said | {
        key: {name: value for name, value in rope.items() if name not in ("factor", "attention_factor")}
        for key, rope in ropes.items()
        if is_mapping(rope)
    }
