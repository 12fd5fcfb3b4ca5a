"""`inspect`'s precision report: which modules have scales, and whether config.json says the same."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.arch.registry import by_name
from dconv.coded.listing import Entry, right_list
from dconv.coded.places import loaded_as
from dconv.examine import inspect
from dconv.pipeline import Request, convert
from dconv.report.blocks import blocks_of
from dconv.sharding.coords import Parallel
from dconv.sharding.tensor import TensorSpec
from tests.cli.conftest import Dconv
from tests.fp8 import BLOCK, linear, write_fp8
from tests.models import config_of, tensors, write_random

RELEASED = ["gate", "e_score_correction_bias", "lm_head"]
Q = "model.layers.0.self_attn.q_proj.weight"


def report(path: Path) -> dict[str, Any]:
    said = inspect(path).to_dict()["precision"]
    return json.loads(json.dumps(said))


def kinds(path: Path) -> list[str]:
    return [fault["kind"] for fault in report(path)["faults"]]


def listing(path: Path, listed: object, **options: Any) -> Path:
    return write_fp8(path, quantization={"modules_to_not_convert": listed}, **options)


# ------------------------------------------------------------------------------------------- what is stored, exactly


def test_exactly_the_modules_with_scales(tmp_path: Path) -> None:
    """A MiniMax-M2 as released: told by the file's own header, nothing is wrong with it."""
    model = listing(tmp_path / "model", RELEASED)
    said, stored = report(model), tensors(model)
    in_fp8 = {name.removesuffix(".weight") for name, (dtype, _, _) in stored.items() if dtype == "F8_E4M3"}
    assert set(said["with_scales"]) == in_fp8 == {n.removesuffix(".weight_scale_inv") for n in stored if "_scale" in n}
    assert len(said["with_scales"]) == len(in_fp8) == 4 * (4 + 3 * 4)
    assert said["without_scales"] == ["lm_head"]
    assert said["faults"] == []
    assert said["block"] == {
        "size": [BLOCK, BLOCK], "said_by": "config.json", "shapes_admit": [[16, 23], [16, 23]], "agree": True,
    }  # fmt: skip
    assert sorted(said["not_converted"]["right"]) == ["gate", "lm_head"]
    classes = {each["class"]: each for each in said["classes"]}
    assert classes["self_attn.q_proj"]["states"] == {"f8_e4m3 with scales": 4}
    assert classes["block_sparse_moe.experts.*.w2"]["states"] == {"f8_e4m3 with scales": 16}
    assert classes["block_sparse_moe.gate"]["role"] == "router"
    assert sum(each["count"] for each in said["classes"]) == sum("_scale" not in name for name in stored)


def test_scales_are_counted(tmp_path: Path) -> None:
    """Count, range, and the histogram, against numpy on the file's bytes; by layer and class as well."""
    model = listing(tmp_path / "model", RELEASED)
    values = {n: np.frombuffer(data, "<f4") for n, (_, _, data) in tensors(model).items() if n.endswith("_scale_inv")}
    together = np.concatenate(list(values.values())).astype(np.float64)
    said = report(model)
    found = said["scales"]
    assert (found["count"], found["zeros"], found["negative"], found["broken"]) == (len(together), 0, 0, 0)
    assert (found["low"], found["high"]) == (together.min(), together.max())
    edges = [low for low, _ in found["bins"]]
    for low, n in found["bins"]:
        assert n == ((together >= low) & (together < low * 2**0.25)).sum()
    assert edges == sorted(edges) and sum(n for _, n in found["bins"]) == len(together)
    cell = next(c for c in said["cells"] if c["name"] == "model.layers.2.block_sparse_moe.experts.*.w1")
    theirs = np.concatenate([v for n, v in values.items() if n.startswith("model.layers.2.") and ".w1." in n])
    assert (cell["scales"]["count"], cell["scales"]["low"]) == (len(theirs), theirs.min())


def test_experts_of_a_layer_are_one_cell(tmp_path: Path) -> None:
    model = listing(tmp_path / "model", RELEASED, num_local_experts=64)
    cells = report(model)["cells"]
    assert len(cells) == 4 * 13 + 3
    assert {cell["count"] for cell in cells if "experts" in cell["kind"]} == {64}


def test_scales_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few values at a time, also of a tensor that lies transposed in its file, gives the same."""
    import torch

    from dconv.report import statistics

    model = listing(tmp_path / "model", RELEASED)
    before = report(model)["scales"]
    state: dict[str, torch.Tensor] = {}
    dtypes = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16}
    for name, (dtype, shape, data) in tensors(model).items():
        state[name] = torch.frombuffer(bytearray(data), dtype=dtypes[dtype]).reshape(shape)
        if name.endswith("_scale_inv"):
            state[name] = state[name].t().contiguous().t()
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    monkeypatch.setattr(statistics, "_VALUES", 5)
    assert report(model)["scales"] == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
def test_values_that_are_no_scales(tmp_path: Path, value: float) -> None:
    said = report(listing(tmp_path / "model", RELEASED, value=value))
    assert [fault["kind"] for fault in said["faults"]] == ["values"]
    assert said["faults"][0]["count"] == 64
    assert said["scales"]["broken"] + said["scales"]["negative"] == said["scales"]["count"]


def test_scales_as_exponents(tmp_path: Path) -> None:
    """E8M0: a byte b is 2^(b - 127)."""

    def edit(specs: dict[str, TensorSpec]) -> None:
        for name, spec in specs.items():
            if name.endswith("_scale_inv"):
                specs[name] = TensorSpec(name, spec.shape, "f8_e8m0")

    found = report(listing(tmp_path / "model", RELEASED, edit=edit))["scales"]
    assert (found["low"], found["high"]) == (2.0**-127, 2.0**-127)


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


# ------------------------------------------------------------------------------------------------------ other models


@pytest.mark.parametrize("format", ["hf", "legacy", "torch_dist"])
def test_classes_are_the_same_in_each_container(hf: Path, made: Callable[[str], Path], format: str) -> None:
    said, there = report(made(format)), report(hf)
    by_class = {each["class"]: each["states"] for each in said["classes"]}
    assert by_class == {each["class"]: each["states"] for each in there["classes"]}
    assert said["faults"] == [] and said["block"] is None and said["scales"] is None
    assert {cell["layer"] for cell in said["cells"]} == {-1, 0, 1, 2, 3}


def test_mixed_dtypes(tmp_path: Path) -> None:
    """A Mixtral in bf16 with routers in f32, through Megatron as well, and one with a projection of its own."""

    def mixtral(folder: str, *others: str) -> Path:
        def edit(specs: dict[str, TensorSpec]) -> None:
            names = [name for name in specs if any(part in name for part in others)]
            specs.update({name: TensorSpec(name, specs[name].shape, "f32") for name in names})

        plain = {"quantised": lambda name: False, "quantization": None}
        model = write_fp8(tmp_path / folder, "mixtral", edit=edit, **plain)
        config = json.loads((model / "config.json").read_text())
        del config["quantization_config"]
        (model / "config.json").write_text(json.dumps(config))
        return model

    model = mixtral("model", "gate")
    convert(Request(model, "megatron", tmp_path / "out", parallel=Parallel(tp=2)))
    for path in (model, tmp_path / "out"):
        classes = {each["class"]: each for each in report(path)["classes"]}
        assert classes["block_sparse_moe.gate"]["states"] == {"f32": 4}
        assert classes["block_sparse_moe.experts.*.w1"]["states"] == {"bf16": 16}
    classes = {each["class"]: each for each in report(mixtral("odd", "1.self_attn.o_"))["classes"]}
    assert classes["self_attn.o_proj"]["layers"] == {"bf16": [0, 2, 3], "f32": [1]}


def test_packed_codes_of_another_method(dconv: Dconv, tmp_path: Path) -> None:
    """gpt-oss as released: what is decoded is reported as the codes that it is; no claims of FP8 are looked for."""
    blocks = "model.layers.{}.mlp.experts.down_proj_{}"

    def edit(specs: dict[str, TensorSpec]) -> None:
        for layer in range(4):
            del specs[f"model.layers.{layer}.mlp.experts.down_proj"]
            for what, last in (("blocks", (16,)), ("scales", ())):
                name = blocks.format(layer, what)
                specs[name] = TensorSpec(name, (4, 32, 2, *last), "u8")

    model = write_fp8(
        tmp_path / "model",
        "gpt_oss",
        quantised=lambda n: False,
        edit=edit,
        quantization={"quant_method": "mxfp4"},
        intermediate_size=64,
    )
    ran = dconv("inspect", model, "--json").json
    assert not ran["refused"]
    said = ran["precision"]
    assert (said["method"], said["faults"], said["block"]) == ("mxfp4", [], None)
    assert (
        Counter({e["class"]: e["states"].get("e2m1 codes", 0) for e in said["classes"]})["mlp.experts.down_proj"] == 4
    )
    assert "mxfp4, as config.json says" in dconv("inspect", model).out


@pytest.mark.parametrize("family", ["minicpm", "granite", "llama"])
def test_mup_scalars_and_their_meaning(dconv: Dconv, tmp_path: Path, family: str) -> None:
    known = by_name(family)
    model = write_random(tmp_path / "model", known, config_of(known))
    convert(Request(model, "megatron", tmp_path / "out"))
    for path in (model, tmp_path / "out"):
        found, shown = dconv("inspect", path, "--json").json["mup"], dconv("inspect", path).out
        if family == "llama":
            assert found == {} and "muP" not in shown
            continue
        factors = {part: factor["factor"] for part, factor in found["factors"].items()}
        if family == "minicpm":
            assert factors == {"embedding": 12, "residual": 1.4 / math.sqrt(4), "head": 256 / 32}
            assert found["scalars"] == {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
        else:
            assert factors == {"embedding": 12, "query": 0.125 * math.sqrt(8), "residual": 0.22, "head": 1 / 8}
        assert "--mup2llama" in shown and all(factor["formula"] in shown for factor in found["factors"].values())
