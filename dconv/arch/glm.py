"""GLM-4 in transformers' form: as first published (``glm``), and as of 0414 (``glm4``).

The second also normalises what leaves attention and feed-forward.

Half of each head is rotated, neighbours together; gate and up are one tensor. Megatron names of those norms:
mcore-bridge's (``model/gpts/glm4.py``), since neither Megatron-LM nor Megatron-Bridge has them.
"""

from __future__ import annotations

from dataclasses import replace

from dconv.arch.attention import Biases
from dconv.arch.carried import POST_NORMS, POST_NORMS_LACKING
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Row
from dconv.arch.layouts import copied, gate_up_in_one
from dconv.arch.llama import LLAMA
from dconv.arch.rotary import Rope

_CONFIG = DecoderConfig(
    "glm", "GlmForCausalLM",
    {
        **COMMON, "vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7, "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    bias=Biases(qkv="attention_bias"),
    rope=Rope(part="partial_rotary_factor", interleaved=True),
)  # fmt: skip
_CONFIG_4 = replace(
    _CONFIG, model_type="glm4", architecture="Glm4ForCausalLM", constants=POST_NORMS, lacking=(POST_NORMS_LACKING,)
)

_FC1 = "decoder.layers.*.mlp.linear_fc1.weight"
_ATTENTION_NORM = "decoder.layers.*.self_attention.post_self_attn_layernorm.weight"
_MLP_NORM = "decoder.layers.*.mlp.post_mlp_layernorm.weight"


def post_norms(attention: str, mlp: str) -> tuple[Row, ...]:
    """Norms of what leaves attention and feed-forward, by their HuggingFace names."""
    return (
        Row(_ATTENTION_NORM, f"model.layers.*.{attention}.weight", copied("hidden")),
        Row(_MLP_NORM, f"model.layers.*.{mlp}.weight", copied("hidden")),
    )


GLM = LLAMA.derive("glm", _CONFIG, drop=(_FC1,), add=(
    Row(_FC1, "model.layers.*.mlp.gate_up_proj.weight", gate_up_in_one("ffn", "hidden")),
))  # fmt: skip
GLM4 = GLM.derive("glm4", _CONFIG_4, add=post_norms("post_self_attn_layernorm", "post_mlp_layernorm"))
FAMILIES = (GLM, GLM4)
