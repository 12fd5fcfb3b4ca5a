"""The dense decoder families, and which of them a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

from dconv.arch.args import ARGS
from dconv.arch.attention import Biases, Grouped, Window
from dconv.arch.decoder import DecoderConfig
from dconv.arch.rotary import Rope
from dconv.arch.translate import Config
from dconv.errors import Refused

C = TypeVar("C", bound=Config)


def detect_by_args(args: Mapping[str, object], configs: Iterable[C]) -> C:
    """The first family that these args fit; a family that allows more stands after the one that allows less.

    Query-key norms are qwen3's, a bias on q, k, v alone qwen2's, a window on every layer mistral's; what mistral
    without a window and llama share is called llama.

    Raises:
        Damaged: a value of the wrong type.
        Refused: none fits.
    """
    reasons: dict[str, str] = {}
    for config in configs:
        against = config.matches_args(args)
        if not against:
            return config
        reasons[config.model_type] = " ".join("; ".join(against).split())
    raise Refused(
        "these Megatron args are none of the families known here, nothing was written",
        where=ARGS,
        found="\n".join(f"not {family}: {why:.200}" for family, why in reasons.items()),
        do="name the family with --model-type and supply a config.json with --hf-config DIR",
    )


#: What most of transformers' decoder classes take for keys that config.json omits.
COMMON: Final[Mapping[str, object]] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_MISTRAL: Final = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN: Final[Mapping[str, object]] = {
    **COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_BIAS = "attention_bias"
_LATE = Window("late", switch=True)
LLAMA = DecoderConfig(
    "llama", "LlamaForCausalLM", COMMON, bias=Biases(_BIAS, _BIAS, "mlp_bias"), rope=Rope(longrope=True)
)
MISTRAL = DecoderConfig(
    "mistral", "MistralForCausalLM", {**COMMON, **_MISTRAL, "sliding_window": 4096}, window=Window("all")
)
QWEN2 = DecoderConfig("qwen2", "Qwen2ForCausalLM", _QWEN, bias=Biases(qkv=True), window=_LATE)
QWEN3 = DecoderConfig(
    "qwen3", "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, Grouped(True), Biases(_BIAS, _BIAS), _LATE
)
