"""What config.json claims of FP8, held against what is stored, block sizes and transformers' own reading."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.arch.registry import by_name
from dconv.coded.listing import Entry, right_list
from dconv.coded.places import loaded_as
from dconv.report.blocks import blocks_of
from dconv.sharding.tensor import TensorSpec
from tests.cli.conftest import Dconv
from tests.cli.precision import RELEASED, Q, listing, report
from tests.fp8 import BLOCK, linear, write_fp8
from tests.models import config_of


def kinds(path: Path) -> list[str]:
    return [fault["kind"] for fault in report(path)["faults"]]


# --------------------------------------------------------------------------------------------- what the config claims

WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "attention is in FP8, its layers' names are listed": (
        {"modules_to_not_convert": [*RELEASED, *(f"model.layers.{i}.self_attn" for i in range(4))]},
        "excluded",
        "model.layers.{0..3}.self_attn.q_proj",
    ),
    "attention is in FP8, its name's part is listed": (
        {"modules_to_not_convert": [*RELEASED, "self_attn"]},
        "excluded",
        "model.layers.{0..3}.self_attn.o_proj",
    ),
    "one projection by the end of its name": (
        {"ignored_layers": [*RELEASED, "k_proj"]},
        "excluded",
        "model.layers.{0..3}.self_attn.k_proj",
    ),
    "experts": (
        {"modules_to_not_convert": [*RELEASED, "model.layers.1.mlp.experts"]},
        "excluded",
        "model.layers.1.block_sparse_moe.experts.{0..3}.w{1..3}",
    ),
    "the output layer is not in FP8, nor listed": ({"modules_to_not_convert": ["gate"]}, "not_excluded", "lm_head"),
    "another model's list": ({"modules_to_not_convert": [*RELEASED, "visual"]}, "absent", "visual"),
    "no list of names": ({"modules_to_not_convert": "lm_head"}, "list", "modules_to_not_convert"),
    "not an expression": ({"modules_to_not_convert": [*RELEASED, "(("]}, "list", "(("),
    "one that would take forever": ({"modules_to_not_convert": [*RELEASED, "(a+)+$"]}, "list", "(a+)+$"),
    "another block size": ({"modules_to_not_convert": RELEASED, "weight_block_size": [32, 16]}, "block", Q),
    "no block size": ({"modules_to_not_convert": RELEASED, "weight_block_size": "absent"}, "block", Q),
    "a block size that is none": (
        {"modules_to_not_convert": RELEASED, "weight_block_size": [0, 16]},
        "block",
        "quantization_config.weight_block_size",
    ),
    "one scale a tensor": ({"modules_to_not_convert": RELEASED, "weight_block_size": None}, "block", Q),
    "another method": ({"quant_method": "gptq"}, "unsaid", "model.layers.{0..3}.self_attn.q_proj"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_config_is_named(dconv: Dconv, tmp_path: Path, what: str) -> None:
    quantization, kind, name = WRONG[what]
    model = write_fp8(tmp_path / "model", quantization=quantization)
    faults = report(model)["faults"]
    assert [fault["kind"] for fault in faults] == [kind]
    named = " ".join(faults[0]["where"])
    assert name in named or (name == Q and "model.layers.{0..3}.self_attn.q_proj.weight" in named)
    shown = dconv("inspect", model)
    assert shown.code == 0
    assert "wrong  " in shown.out and name.split(".")[-1] in shown.out
    assert all(len(line) <= 100 for line in shown.out.splitlines())


def test_attention_in_bf16_and_not_listed(tmp_path: Path) -> None:
    """A list that names what attention is in does not leave attention out, as transformers reads it."""
    quantised = lambda name: linear(name) and "self_attn" not in name  # noqa: E731
    said = report(listing(tmp_path / "part", [*RELEASED, "self_attn"], quantised=quantised))
    (fault,) = said["faults"]
    assert (fault["kind"], fault["count"]) == ("not_excluded", 16)
    assert "self_attn" in fault["what"]
    right = said["not_converted"]["right"]
    assert sorted(right) == ["gate", "k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    assert kinds(listing(tmp_path / "right", right, quantised=quantised)) == []


def test_some_layers_in_fp8(tmp_path: Path) -> None:
    """Where layers of a class differ, whole names are right; half of a layer's experts can be listed in no way."""
    said = report(listing(tmp_path / "a", RELEASED, quantised=lambda n: linear(n) and ".2.self_attn.q_" not in n))
    assert "model.layers.2.self_attn.q_proj" in said["not_converted"]["right"]
    assert [(fault["kind"], fault["where"]) for fault in said["faults"]] == [
        ("not_excluded", ["model.layers.2.self_attn.q_proj"])
    ]
    (mixed,) = [each for each in said["classes"] if each["class"] == "self_attn.q_proj"]
    assert mixed["layers"] == {"f8_e4m3 with scales": [0, 1, 3], "bf16": [2]}
    partly = listing(
        tmp_path / "b", RELEASED, quantised=lambda name: linear(name) and "2.block_sparse_moe.experts.1" not in name
    )
    assert kinds(partly) == ["experts"]


def test_a_config_that_says_fp8_of_plain_weights(tmp_path: Path) -> None:
    assert kinds(listing(tmp_path / "model", RELEASED, quantised=lambda name: False)) == ["nothing"]


def test_deepseek_lists_nothing(tmp_path: Path) -> None:
    """As DeepSeek-V3 is released: no list, and its router, output layer and predictor's projection not in FP8."""
    model = write_fp8(tmp_path / "model", "deepseek_v3", num_nextn_predict_layers=1)
    said = report(model)
    assert said["faults"] == []
    assert "model.layers.4.self_attn.kv_b_proj" in said["with_scales"]
    assert said["not_converted"]["listed"] is None


def test_a_tied_output_layer(tmp_path: Path) -> None:
    """It is not stored, and FP8 would be made of it where a list does not name it."""
    plain = {"family": "qwen3", "tie_word_embeddings": True}
    assert kinds(listing(tmp_path / "a", ["norm"], **plain)) == ["not_excluded"]
    assert kinds(listing(tmp_path / "b", ["lm_head"], **plain)) == []
    assert kinds(listing(tmp_path / "c", "absent", **plain)) == []


@pytest.mark.parametrize("what", ["scale", "weight", "shape"])
def test_what_does_not_pair_is_refused_and_reported(dconv: Dconv, tmp_path: Path, what: str) -> None:
    def edit(specs: dict[str, TensorSpec]) -> None:
        scale = f"{Q}_scale_inv"
        if what == "shape":
            specs[scale] = TensorSpec(scale, (1, 5), "f32")
        else:
            del specs[{"scale": scale, "weight": Q}[what]]

    model = listing(tmp_path / "model", RELEASED, edit=edit)
    ran = dconv("inspect", model, "--json")
    assert ran.code == 0 and ran.json["refused"]
    (fault,) = ran.json["precision"]["faults"]
    assert fault["kind"] == {"scale": "unscaled", "weight": "idle", "shape": "block"}[what]
    assert "self_attn.q_proj.weight" in fault["where"][0]


# ---------------------------------------------------------------------------------------- the same as transformers

NAMES = [
    "lm_head", "model.layers.0.self_attn", "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.experts", "model.embed_tokens",
]  # fmt: skip
PATTERNS = [
    *("lm_head", "gate", "mlp.gate", "self_attn", "model.layers.1", "model.layers.*", "model.layers.*.self_attn"),
    *("q_proj", "proj", ".*gate", "model", "head", r"model\.layers\.(0|1)", "model.layers.0.self_attn.", "x|lm_head"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_entry_is_read_as_transformers_reads_it(pattern: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    for name in NAMES:
        assert Entry(pattern).excludes(name) is not should_convert_module(name, [pattern]), (pattern, name)


MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in range(3)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.gate", "block_sparse_moe.experts.0.w1")
] + ["lm_head"]


@given(st.sets(st.sampled_from(MODULES)))
@settings(deadline=None)
def test_the_right_list_is_right(quantised: set[str]) -> None:
    """Whatever is quantised: transformers' own rule takes exactly the rest out."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    plain: dict[str, list[str]] = {}
    for module in MODULES:
        if module not in quantised:
            plain.setdefault(module.split(".", 3)[-1].replace("experts.0", "experts.*"), []).append(module)
    right = right_list(plain, quantised)
    renamed = [f"{entry}.".replace(".block_sparse_moe.", ".mlp.").removesuffix(".") for entry in right]
    for module in MODULES:
        assert should_convert_module(loaded_as(module), renamed) is (module in quantised), (module, right)


def test_what_transformers_would_put_into_fp8(tmp_path: Path) -> None:
    """Its own replacement of layers, with the right list, makes FP8 of the modules with scales and of no other."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, MiniMaxM2Config
    from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear

    said = report(listing(tmp_path / "model", RELEASED))
    config = config_of(by_name("minimax_m2"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MiniMaxM2Config(**config))
    how = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK))
    model = replace_with_fp8_linear(model, said["not_converted"]["right"], how, pre_quantized=True)
    made = {n for n, m in model.named_modules() if isinstance(m, FP8Linear) or type(m).__name__.startswith("FP8Expert")}
    assert made == {loaded_as(module) for module in said["with_scales"]}


# ------------------------------------------------------------------------------------------------------- block sizes


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(1, 50),
    st.integers(1, 50),
)
def test_what_shapes_admit(weights: list[tuple[int, int]], rows: int, columns: int) -> None:
    """Against trying every size."""

    def scale(shape: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
        return math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)

    pairs = {str(i): (shape, scale(shape, rows, columns)) for i, shape in enumerate(weights)}
    found = blocks_of({"quantization_config": {"weight_block_size": [rows, columns]}}, pairs)
    assert found.disagree == () and found.admitted is not None
    for axis in (0, 1):
        fits = [b for b in range(1, 100) if all(math.ceil(w[axis] / b) == s[axis] for w, s in pairs.values())]
        low, high = found.admitted[axis]
        assert fits == list(range(low, (99 if high is None else high) + 1))


def test_shapes_that_no_size_fits() -> None:
    pairs = {"a": ((32, 32), (2, 2)), "b": ((32, 32), (4, 4))}
    found = blocks_of({"quantization_config": {"weight_block_size": [16, 16]}}, pairs)
    assert (found.admitted, found.disagree) == (None, ("b",))
