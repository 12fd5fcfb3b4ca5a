"""Granite 3: Llama's tensors and names (Megatron-Bridge has no such family), with four multipliers in the config."""

from __future__ import annotations

from dataclasses import replace

from dconv.arch import mup
from dconv.arch.attention import Biases, Scaled
from dconv.arch.carried import Carried
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.llama import LLAMA

_CONFIG = DecoderConfig(
    "granite", "GraniteForCausalLM",
    {
        **COMMON, "attention_bias": False, "mlp_bias": False, "embedding_multiplier": 1.0, "logits_scaling": 1.0,
        "residual_multiplier": 1.0, "attention_multiplier": 1.0,
    },
    bias=Biases("attention_bias", "attention_bias", "mlp_bias"),
    more=(
        Scaled("attention_multiplier"),
        Carried({
            "embedding_multiplier": "embeddings are multiplied by it",
            "residual_multiplier": "what attention and feed-forward add is multiplied by it",
            "logits_scaling": "logits are divided by it",
        }),
    ),
)  # fmt: skip

GRANITE = replace(LLAMA.derive("granite", _CONFIG), mup=mup.GRANITE)
FAMILIES = (GRANITE,)
