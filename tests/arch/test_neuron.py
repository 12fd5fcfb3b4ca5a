"""Neuron's table: its names, spelled out here, and its tensors, built here a second time with plain transposes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv.arch.neuron import BLOCKS, DENSE, ROWS, TABLES, Held, Scales, count_scales, lay_out, scale_of
from dconv.arch.registry import by_name
from dconv.checkpoint.source import expected_specs
from dconv.errors import Refused
from tests.fp8 import linear
from tests.models import config_of

#: Of each family, one layer's tensors: Neuron's name, those of HuggingFace it is made of, how FP8 is held.
_ATTENTION = [
    ("input_layernorm.weight", "input_layernorm.weight", DENSE),
    ("post_attention_layernorm.weight", "post_attention_layernorm.weight", DENSE),
    ("self_attn.qkv_proj.q_proj.weight", "self_attn.q_proj.weight", ROWS),
    ("self_attn.qkv_proj.k_proj.weight", "self_attn.k_proj.weight", ROWS),
    ("self_attn.qkv_proj.v_proj.weight", "self_attn.v_proj.weight", ROWS),
]
LAYER = {
    "llama": [
        *_ATTENTION,
        ("self_attn.o_proj.o_proj.weight", "self_attn.o_proj.weight", ROWS),
        ("mlp.gate_proj.weight", "mlp.gate_proj.weight", ROWS),
        ("mlp.up_proj.weight", "mlp.up_proj.weight", ROWS),
        ("mlp.down_proj.weight", "mlp.down_proj.weight", ROWS),
    ],
    "mixtral": [
        *_ATTENTION,
        ("self_attn.o_proj.o_proj.weight", "self_attn.o_proj.weight", ROWS),
        ("mlp.router.linear_router.weight", "block_sparse_moe.gate.weight", DENSE),
        ("mlp.expert_mlps.mlp_op.gate_up_proj.weight", "block_sparse_moe.experts.# w1 w3", BLOCKS),
        ("mlp.expert_mlps.mlp_op.down_proj.weight", "block_sparse_moe.experts.# w2", BLOCKS),
    ],
    "qwen3_moe": [
        *_ATTENTION,
        ("self_attn.o_proj.o_proj.weight", "self_attn.o_proj.weight", ROWS),
        ("self_attn.q_layernorm.weight", "self_attn.q_norm.weight", DENSE),
        ("self_attn.k_layernorm.weight", "self_attn.k_norm.weight", DENSE),
        ("mlp.router.linear_router.weight", "mlp.gate.weight", DENSE),
        ("mlp.expert_mlps.mlp_op.gate_up_proj.weight", "mlp.experts.# gate_proj up_proj", BLOCKS),
        ("mlp.expert_mlps.mlp_op.down_proj.weight", "mlp.experts.# down_proj", BLOCKS),
    ],
    "minimax_m2": [
        *_ATTENTION,
        ("self_attn.o_proj.o_proj.weight", "self_attn.o_proj.weight", DENSE),
        ("self_attn.q_norm.weight", "self_attn.q_norm.weight", DENSE),
        ("self_attn.k_norm.weight", "self_attn.k_norm.weight", DENSE),
        ("block_sparse_moe.router.linear_router.weight", "block_sparse_moe.gate.weight", DENSE),
        ("block_sparse_moe.router.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias", DENSE),
        ("block_sparse_moe.expert_mlps.mlp_op.gate_up_proj.weight", "block_sparse_moe.experts.# w1 w3", BLOCKS),
        ("block_sparse_moe.expert_mlps.mlp_op.down_proj.weight", "block_sparse_moe.experts.# w2", BLOCKS),
    ],
}


def _model(family: str, **sizes: Any) -> tuple[tuple[Held, ...], dict[str, NDArray[np.int64]], dict[str, Any]]:
    """Neuron's layout of a tiny model, HuggingFace's tensors with no two elements alike, and the config."""
    known = by_name(family)
    config = config_of(known, **sizes)
    specs = expected_specs(known, known.facts(config))
    counted, first = {}, 1
    for name, spec in specs.items():
        size = int(np.prod(spec.shape))
        counted[name] = np.arange(first, first + size).reshape(spec.shape)
        first += size
    return lay_out(known, known.facts(config)), counted, config


def _filled(held: Held, source: dict[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """What the slots say, taken literally: 0 where nothing lies."""
    out = np.zeros(held.shape, np.int64)
    for slot in held.slots:
        box = source[slot.tensor][tuple(map(slice, slot.region.start, slot.region.stop))]
        kept = [axis for axis in slot.axes if axis >= 0]
        lead = (np.newaxis,) * (len(slot.axes) - len(kept))
        out[tuple(map(slice, slot.start, slot.stored.stop))] = box.transpose(kept)[lead]
    return out


@pytest.mark.parametrize("family", sorted(LAYER))
def test_every_tensor_has_its_name_and_lies_where_it_should(family: str) -> None:
    held, source, config = _model(family)
    experts = range(config.get("num_local_experts") or config.get("num_experts") or 0)
    expected: dict[str, tuple[NDArray[np.int64], str]] = {
        "embed_tokens.weight": (source["model.embed_tokens.weight"], DENSE),
        "norm.weight": (source["model.norm.weight"], DENSE),
        "lm_head.weight": (source["lm_head.weight"], DENSE),
    }
    for layer in range(config["num_hidden_layers"]):
        for neuron, theirs, fp8 in LAYER[family]:
            stem, *halves = f"model.layers.{layer}.{theirs}".split()
            if halves:
                each = [[source[f"{stem.replace('#', str(e))}.{half}.weight"].T for half in halves] for e in experts]
                value = np.stack([np.concatenate(parts, axis=1) for parts in each])
            else:
                value = source[stem]
            expected[f"layers.{layer}.{neuron}"] = (value, fp8)
    assert {one.name: one.fp8 for one in held} == {name: fp8 for name, (_, fp8) in expected.items()}
    assert len(held) == len(expected)
    for one in held:
        assert np.array_equal(_filled(one, source), expected[one.name][0])
    taken = [spec.name for one in held for specs in one.sources for spec in specs]
    assert sorted(taken) == sorted(source)


def test_the_tables_are_the_four_families() -> None:
    assert TABLES.keys() == LAYER.keys()


def test_biases_of_llama_follow_their_weights() -> None:
    held, source, _ = _model("llama", attention_bias=True, mlp_bias=True)
    found = {one.name: one.sources[0][0].name for one in held if one.name.endswith(".bias")}
    assert {(a.split(".", 2)[2], b.split(".", 3)[3]) for a, b in found.items()} == {
        ("self_attn.qkv_proj.q_proj.bias", "self_attn.q_proj.bias"),
        ("self_attn.qkv_proj.k_proj.bias", "self_attn.k_proj.bias"),
        ("self_attn.qkv_proj.v_proj.bias", "self_attn.v_proj.bias"),
        ("self_attn.o_proj.o_proj.bias", "self_attn.o_proj.bias"),
        ("mlp.gate_proj.bias", "mlp.gate_proj.bias"),
        ("mlp.up_proj.bias", "mlp.up_proj.bias"),
        ("mlp.down_proj.bias", "mlp.down_proj.bias"),
    }
    assert sorted(found.values()) == sorted(name for name in source if name.endswith(".bias"))


def test_a_tied_model_has_one_embedding() -> None:
    held, _, _ = _model("llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in {one.name for one in held}


def test_scales_lie_as_their_experts_do() -> None:
    """A scale for every block, spread over its block, lies where the weights of that block lie."""
    rows, columns = 16, 8
    held, source, config = _model("minimax_m2", intermediate_size=48, hidden_size=64)
    scales, spread = {}, {}
    for name, weight in source.items():
        if ".experts." in name:
            blocks = (weight.shape[0] // rows, weight.shape[1] // columns)
            scale = weight.reshape(-1)[: blocks[0] * blocks[1]].reshape(blocks)
            scales[f"{name}_scale_inv"], spread[name] = scale, np.kron(scale, np.ones((rows, columns), np.int64))
    stacks = [one for one in held if one.fp8 == BLOCKS]
    assert len(stacks) == 2 * config["num_hidden_layers"]
    for stack in stacks:
        laid = stack.scales((rows, columns), "{}_scale_inv".format)
        assert laid.name == scale_of(stack.name) == stack.name.replace(".weight", ".scale")
        again = np.kron(_filled(laid, scales), np.ones((1, columns, rows), np.int64))
        assert np.array_equal(again, _filled(stack, spread))


def test_every_scale_of_minimax_m2_is_accounted_for() -> None:
    """As released: 62 layers of 256 experts with three matrices, and q, k, v, o: 47,864 scales."""
    family = by_name("minimax_m2")
    config = {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2"}
    facts = family.facts(config)
    quantised = {name: "f8_e4m3" for name in expected_specs(family, facts) if linear(name)}
    found = count_scales(lay_out(family, facts, quantised))
    assert found == Scales(kept=62 * 256 * 3, requantised=62 * 3, dropped=62)
    assert found.read == len(quantised) == 47_864


def test_experts_that_are_no_whole_number_of_blocks_are_refused() -> None:
    held, _, _ = _model("minimax_m2", intermediate_size=24, hidden_size=64)
    stack = next(one for one in held if one.fp8 == BLOCKS)
    with pytest.raises(Refused, match="no whole number of blocks"):
        stack.scales((16, 16), "{}_scale_inv".format)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("qwen3_moe", {"attention_bias": True}), ("qwen3_moe", {"mlp_only_layers": [1]}), ("gpt_oss", {}), ("qwen3", {})],
    ids=str,
)
def test_what_neuron_has_no_place_for_is_refused(family: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        _model(family, **sizes)
