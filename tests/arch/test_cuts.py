"""How tensor parallelism cuts what no logits can judge: layers that megatron-core lacks, or has with TransformerEngine.

Sources: Megatron-Bridge's ``minimax_m2_provider.py`` (norms of all heads have a rank's heads), ``gemma2_bridge.py`` and
mcore-bridge's ``glm4.py``, ``olmo2.py`` (norms behind a layer are whole); megatron-core's ``moe_layer.py`` (latent
projections are duplicated) and ``router.py`` (its bias is whole).
"""

from __future__ import annotations

import pytest

from dconv.arch.registry import by_name
from tests.models import config_of, facts_of

#: family, Megatron's name below ``decoder.layers.3``, HuggingFace's below the layer in their order, and the axis along
#: which a rank holds a stretch; None: it holds all.
CUTS: list[tuple[str, str, str, int | None]] = [
    ("minimax_m2", "self_attention.q_layernorm", "self_attn.q_norm", 0),
    ("minimax_m2", "self_attention.k_layernorm", "self_attn.k_norm", 0),
    ("minimax_m2", "mlp.router.expert_bias", "block_sparse_moe.e_score_correction_bias", None),
    ("olmoe", "self_attention.q_layernorm", "self_attn.q_norm", 0),
    ("olmoe", "self_attention.k_layernorm", "self_attn.k_norm", 0),
    ("olmo2", "self_attention.q_layernorm", "self_attn.q_norm", 0),
    ("olmo2", "self_attention.k_layernorm", "self_attn.k_norm", 0),
    ("olmo2", "self_attention.post_self_attn_layernorm", "post_attention_layernorm", None),
    ("olmo2", "mlp.post_mlp_layernorm", "post_feedforward_layernorm", None),
    ("qwen3", "self_attention.q_layernorm", "self_attn.q_norm", None),
    ("gemma2", "self_attention.linear_proj.post_layernorm", "post_attention_layernorm", None),
    ("gemma2", "mlp.linear_fc2.post_layernorm", "post_feedforward_layernorm", None),
    ("gemma3_text", "self_attention.q_layernorm", "self_attn.q_norm", None),
    ("gemma3_text", "self_attention.k_layernorm", "self_attn.k_norm", None),
    ("gemma3_text", "self_attention.linear_proj.post_layernorm", "post_attention_layernorm", None),
    ("gemma3_text", "mlp.linear_fc2.post_layernorm", "post_feedforward_layernorm", None),
    ("glm4", "self_attention.post_self_attn_layernorm", "post_self_attn_layernorm", None),
    ("glm4", "mlp.post_mlp_layernorm", "post_mlp_layernorm", None),
    ("minicpm_moe", "mlp.router", "mlp.gate", None),
    ("minicpm_moe", "mlp.experts.1.linear_fc1", "mlp.experts.1.w1 mlp.experts.1.w3", 0),
    ("minicpm_moe", "mlp.experts.1.linear_fc2", "mlp.experts.1.w2", 1),
    ("nemotron_h", "mlp.fc1_latent_proj", "mixer.fc1_latent_proj", None),
    ("nemotron_h", "mlp.fc2_latent_proj", "mixer.fc2_latent_proj", None),
    ("nemotron_h", "mlp.experts.1.linear_fc1", "mixer.experts.1.up_proj", 0),
    ("nemotron_h", "mlp.experts.1.linear_fc2", "mixer.experts.1.down_proj", 1),
]


def _weight(name: str) -> str:
    return name if name.endswith("bias") else f"{name}.weight"


@pytest.mark.parametrize(("name", "megatron", "hf", "axis"), CUTS)
def test_a_rank_holds_its_stretch_or_all(name: str, megatron: str, hf: str, axis: int | None) -> None:
    family = by_name(name)
    config = config_of(family, **({"moe_latent_size": 8} if name == "nemotron_h" else {}))
    wanted = f"decoder.layers.3.{_weight(megatron)}"
    entry = next(one for one in family.entries(facts_of(family, config)) if one.fused.name == wanted)
    layer = "backbone.layers.3." if name == "nemotron_h" else "model.layers.3."
    assert [spec.name for spec in entry.fused.specs] == [layer + _weight(one) for one in hf.split()]
    assert (entry.fused.axis if entry.fused.parallel else None) == axis
    assert not entry.fused.either


@pytest.mark.parametrize("name", ["minimax_m2", "deepseek_v3", "glm4_moe", "nemotron_h"])
def test_what_corrects_a_router_s_choice_keeps_its_precision(name: str) -> None:
    """megatron-core holds it in fp32 (``_maintain_float32_expert_bias``), whatever the other weights are."""
    rows = [row for row in by_name(name).rows if row.megatron.endswith("router.expert_bias")]
    assert rows
    assert all(row.keeps for row in rows)
