"""The MiniCPM line: 1B and 2B, MiniCPM4 and 4.1, with experts, with block-sparse feed-forward layers, and MiniCPM3.

All scale the embedding, each residual and the head's input (muP) by numbers of the config, which stay there. Sources:
OpenBMB's ``modeling_minicpm.py`` (its defaults), transformers' ``modeling_minicpm3.py``, and for BlockFFN the converter
``convert_bmt_to_hf.py`` and ``BlockMLP`` of thunlp/BlockFFN. MiniCPM5 and others are plain Llamas by their config.json.

Sparse attention by InfLLM-v2 has no tensors of its own: the mean of some keys stands for them (``CompressK`` of
MiniCPM4's ``modeling_minicpm.py``), so that a checkpoint is the dense one with a ``sparse_config``. One trained by NSA
has some (compression, its positions, gates), under names that no public MiniCPM checkpoint, model or converter shows:
looked for in the repositories of OpenBMB and thunlp, forks of Megatron-LM with MiniCPM's converters, and NSA's own
implementations, which agree on none. They are refused as tensors in no row, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from dconv.arch import mup
from dconv.arch.attention import Biases
from dconv.arch.carried import Carried, Kept
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.deepseek import ATTENTION_NAMES, LATENT
from dconv.arch.experts import Experts
from dconv.arch.family import Family, Row
from dconv.arch.latent import Latent, LatentRope
from dconv.arch.layouts import as_stored
from dconv.arch.llama import LLAMA
from dconv.arch.moe import DENSE, DENSE_NAMES, ROUTED
from dconv.arch.rotary import Rope
from dconv.arch.routing import Router

_SCALED: Final = Carried({
    "scale_emb": "the embedding times it",
    "scale_depth": "what each block adds times it / sqrt(layers)",
    "dim_model_base": "the head's input times it / hidden_size",
}, idle=mup.minicpm_ones)  # fmt: skip
_KEPT: Final = Kept({
    "sparse_config": "InfLLM-v2 attention, which leaves out blocks of a long context",
    "mup_denominator": "",  # of heads that guess ahead
})  # fmt: skip
_BIAS: Final = "attention_bias"

MINICPM_CONFIG: Final = DecoderConfig(
    "minicpm", "MiniCPMForCausalLM",
    {
        **COMMON, "initializer_range": 0.1, "tie_word_embeddings": True, "scale_emb": 1, "scale_depth": 1,
        "dim_model_base": 1,
    },
    bias=Biases(_BIAS, _BIAS),
    rope=Rope(longrope=True),
    more=(_SCALED, _KEPT),
)  # fmt: skip
_MOE_CONFIG: Final = replace(
    MINICPM_CONFIG,
    defaults={**MINICPM_CONFIG.defaults, "num_experts_per_tok": 2},
    more=(_SCALED, Experts(Router(), ("num_experts",), "intermediate_size")),
)
_BLOCK_CONFIG: Final = replace(
    MINICPM_CONFIG,
    more=(_SCALED, _KEPT, Kept(dict.fromkeys((
        "ffn_type", "ffn_gated", "num_experts", "expert_size", "router_act", "norm_after_router", "norm_scale",
        "block_implementation", "attention_type", "moe_routing_strategy", "num_shared_experts", "moe_top_k",
        "moe_top_p",
    ), ""), table="block_ffn")),
    lacking=("BlockFFN: blocks of a feed-forward layer that a normalised ReLU switches on",),
)  # fmt: skip
_MINICPM3_CONFIG: Final = DecoderConfig(
    "minicpm3", "MiniCPM3ForCausalLM",
    {
        **COMMON, "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 62,
        "num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 32768,
        "initializer_range": 0.1, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "kv_lora_rank": 256,
        "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": None, "scale_emb": 12,
        "scale_depth": 1.4, "dim_model_base": 256,
    },
    Latent(even=True),
    rope=LatentRope(halves=True, longrope=True),
    more=(_SCALED, _KEPT),
    only={"attention_bias": False, "mlp_bias": False},
)  # fmt: skip
#: BlockFFN's published models: latent attention as MiniCPM3's.
_LATENT_BLOCK_CONFIG: Final = replace(
    _MINICPM3_CONFIG,
    model_type=MINICPM_CONFIG.model_type,
    architecture=MINICPM_CONFIG.architecture,
    defaults={**_MINICPM3_CONFIG.defaults, **MINICPM_CONFIG.defaults, "head_dim": None},
    more=_BLOCK_CONFIG.more,
    lacking=_BLOCK_CONFIG.lacking,
)

_MLP, _HF = "decoder.layers.*.mlp", "model.layers.*.mlp"
_EXPERT = f"{_HF}.experts.#"
#: A block-sparse layer's tensors, under the same names on both sides: MiniCPM4's, and BlockFFN's as published, of which
#: some have a norm behind the router.
_BLOCK: Mapping[str, str] = dict.fromkeys(
    ("moe_router.weight", "router_norm.weight", "moe_w_in.weight", "moe_w_out.weight"), "block_ffn"
)
_PUBLISHED = {
    **dict.fromkeys(("router_proj.weight", "up_proj", "down_proj"), "block_ffn"),
    "router_norm.weight": "router_norm",
}


def _block_sparse(name: str, mark: str, tensors: Mapping[str, str]) -> Family:
    """Layers with these tensors beside dense ones; they are of any shape, and exist by the fact that is given."""
    blocks = (Row(f"{_MLP}.{tensor}", f"{_HF}.{tensor}", as_stored(), when=fact) for tensor, fact in tensors.items())
    rows = (*DENSE, replace(ROUTED[0], when="block_ffn"), *blocks)
    family = LLAMA.derive(name, _BLOCK_CONFIG, drop=DENSE_NAMES, add=rows, marks=(mark,))
    return replace(family, either=(("block_ffn", "dense"),))


# fmt: off
MINICPM = LLAMA.derive("minicpm", MINICPM_CONFIG)
MINICPM_MOE = LLAMA.derive("minicpm_moe", _MOE_CONFIG, drop=DENSE_NAMES, marks=(".mlp.experts.",), add=(
    *ROUTED[:2],
    replace(ROUTED[2], hf=f"{_EXPERT}.w{{1,3}}.weight"),
    replace(ROUTED[3], hf=f"{_EXPERT}.w2.weight"),
))
MINICPM_BLOCKFFN = _block_sparse("minicpm_blockffn", ".mlp.moe_router.", _BLOCK)
BLOCKFFN = _block_sparse("blockffn", ".mlp.router_proj.", _PUBLISHED)
BLOCKFFN_MLA = BLOCKFFN.derive("blockffn_mla", _LATENT_BLOCK_CONFIG, drop=ATTENTION_NAMES, add=LATENT, marks=(
    ".kv_a_proj_with_mqa.", ".linear_kv_down_proj.",
))
MINICPM3 = LLAMA.derive("minicpm3", _MINICPM3_CONFIG, drop=ATTENTION_NAMES, add=LATENT)
# fmt: on
#: An MLA model whose args say nothing of BlockFFN is MiniCPM3.
FAMILIES = (
    replace(MINICPM, mup=mup.MINICPM),
    replace(MINICPM_MOE, mup=mup.MINICPM_MOE),
    *(replace(one, mup=mup.MINICPM_ITSELF) for one in (MINICPM_BLOCKFFN, MINICPM3, BLOCKFFN_MLA, BLOCKFFN)),
)
