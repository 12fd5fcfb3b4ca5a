"""ModelOpt's checkpoints against what ModelOpt 0.47.0 itself makes of them (recorded)."""

from __future__ import annotations

import fnmatch
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dconv
from dconv.arch.registry import by_name
from dconv.checkpoint.huggingface import open_source
from dconv.coded.beside import MODELOPT_FILE as FILE
from dconv.coded.modelopt import Int4, Smoothed
from dconv.coded.modelopt_config import METHODS, Form, config_of
from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from dconv.sharding.region import Region
from tests.quant.models import write_normal
from tests.quant.recorded.modelopt_export import FOLDER, TOKENS

VALUES = load_file(FOLDER.with_suffix(".safetensors"))
KINDS = sorted(path.name for path in FOLDER.iterdir())
#: Those whose values ModelOpt rounds to fp32 more than once: by so much they may differ from what is rounded once.
ROUNDED = {"int4_awq": 2**-22, "nvfp4_smooth": 2**-22}
LAYER = "model.layers.0"
Q, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"
Tensors = dict[str, torch.Tensor]
Said = dict[str, Any]


def exported(folder: Path, kind: str) -> Path:
    return shutil.copytree(FOLDER / kind, folder)


def rewritten(
    source: Path, tensors: Callable[[Tensors], object] | None = None, said: Callable[[Said], object] | None = None
) -> Path:
    """With other tensors, or another ``quantization_config``, which then is the only one."""
    if tensors:
        held = load_file(source / "model.safetensors")
        tensors(held)
        save_file(held, source / "model.safetensors", {"format": "pt"})
    if said:
        config = json.loads((source / "config.json").read_text())
        said(config["quantization_config"])
        (source / "config.json").write_text(json.dumps(config))
        (source / FILE).unlink()
    return source


def dense(source: Path, out: Path, **options: Any) -> Tensors:
    convert(Request(source, "hf", out, **options))
    return load_file(out / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("int8")])
def test_decoded_as_modelopt_does(tmp_path: Path, kind: str) -> None:
    own = {name.partition("/")[2]: value for name, value in VALUES.items() if name.startswith(f"{kind}/")}
    assert own
    bound = ROUNDED.get(kind, 0)
    found = dense(FOLDER / kind, tmp_path / "out", dtype="f32" if bound else "bf16")
    for name, value in own.items():
        # where ModelOpt rounds once, bit for bit
        torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=bound, atol=0)


@pytest.mark.parametrize("kind", ["int8", "int8_smooth"])
def test_the_function_is_the_one_before_the_export(tmp_path: Path, kind: str) -> None:
    """A scale of a layer's inputs is in the plain weight, or in the norm before, where ModelOpt had folded it."""
    convert(Request(FOLDER / kind, "hf", tmp_path / "out", dtype="f32"))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(logits, VALUES[f"{kind}/logits"], rtol=0, atol=1e-6)


def test_no_kind_is_without_a_proof() -> None:
    assert {name.partition("/")[0] for name in VALUES} == set(KINDS)


def test_nvfp4s_second_scale_multiplies(tmp_path: Path) -> None:
    twice = rewritten(exported(tmp_path / "twice", "nvfp4"), lambda held: held[f"{Q}.weight_scale_2"].mul_(2))
    once, doubled = (dense(path, tmp_path / f"{path.name} dense") for path in (FOLDER / "nvfp4", twice))
    name = f"{Q}.weight"
    assert once[name].any()
    assert torch.equal(doubled[name], once[name] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_by_tensor_parallel_ranks_and_back(tmp_path: Path, kind: str) -> None:
    whole = dense(FOLDER / kind, tmp_path / "whole")
    request = Request(FOLDER / kind, "megatron", tmp_path / "megatron", parallel=Parallel(tp=2), divisor=8)
    convert(request)
    again = dense(tmp_path / "megatron", tmp_path / "again")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_rows_in_pairs_cut_anywhere() -> None:
    """W4A16_AWQ by its definition, element by element; scales of columns on top."""
    draw = random.Random(3)
    rng = np.random.default_rng(3)
    rows, columns, group = 10, 24, 8
    held = [
        rng.integers(0, 256, (rows // 2, columns), np.uint8),
        rng.standard_normal((rows, columns // group)).astype("<f4"),
        rng.standard_normal(columns),
    ]

    def read(number: int, region: Region, dtype: str) -> Any:
        del dtype
        return held[number][tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))]

    def expected(row: int, column: int) -> float:
        code = int(held[0][row // 2, column]) >> 4 * (row % 2) & 15
        return (code - 16 * (code > 7)) * float(held[1][row, column // group])

    for _ in range(200):
        (top, bottom), (left, right) = (sorted(draw.sample(range(n + 1), 2)) for n in (rows, columns))
        box = Region((top, left), (bottom - top, right - left))
        wanted = np.array([[expected(row, column) for column in range(left, right)] for row in range(top, bottom)])
        plain = Int4(group, "f32")
        assert np.array_equal(plain(box, "f64", 1.0, read).view("<f8"), wanted)
        assert np.array_equal(plain(box, "f32", 1.0, read).view("<f4"), wanted.astype("<f4"))
        smooth = Smoothed(plain, 2)(box, "f32", 2.0, read).view("<f4")
        assert np.array_equal(smooth, (2 * wanted * held[2][left:right]).astype("<f4"))


# ------------------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize("kind", KINDS)
def test_either_config_is_enough(tmp_path: Path, kind: str) -> None:
    first, second = exported(tmp_path / "first", kind), exported(tmp_path / "second", kind)
    (first / FILE).unlink()
    config = json.loads((second / "config.json").read_text())
    del config["quantization_config"]
    (second / "config.json").write_text(json.dumps(config))
    both, one, other = (dense(path, tmp_path / f"{path.name} dense") for path in (FOLDER / kind, first, second))
    assert all(torch.equal(one[name], value) and torch.equal(other[name], value) for name, value in both.items())
    out = tmp_path / "second dense"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / FILE).exists()


@pytest.mark.parametrize("method", METHODS)
def test_whatever_the_method_is_called(tmp_path: Path, method: str) -> None:
    source = exported(tmp_path / "source", "nvfp4")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (source / "config.json").write_text(json.dumps(config))
    assert len(prepare(Request(source, "hf", tmp_path / "out")).source.coded) == 7


def test_a_file_that_says_nothing(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "nvfp4")
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    (source / FILE).write_text("{}")
    with pytest.raises(Damaged, match="does not speak of"):
        prepare(Request(source, "hf", tmp_path / "out"))


def test_configs_that_disagree_are_refused(tmp_path: Path) -> None:
    source = exported(tmp_path / "source", "nvfp4")
    said = json.loads((source / FILE).read_text())
    said["quantization"]["quant_algo"] = "FP8"
    (source / FILE).write_text(json.dumps(said))
    with pytest.raises(Refused, match="do not agree") as error:
        open_source(source)
    assert "fp8 and nvfp4" in str(error.value)


def test_a_file_of_another_method_is_not_looked_at(tmp_path: Path) -> None:
    write_normal(tmp_path / "plain", by_name("llama"))
    convert(Request(tmp_path / "plain", "fp8", tmp_path / "source"))
    (tmp_path / "source" / FILE).write_bytes((FOLDER / "nvfp4" / FILE).read_bytes())
    assert prepare(Request(tmp_path / "source", "hf", tmp_path / "out")).source.coded


def test_wildcards_are_those_of_a_shell() -> None:
    """``exclude_modules``: every kind of entry, against the standard library's own reading."""
    draw = random.Random(1)

    def word(letters: str) -> str:
        return "".join(draw.choices(letters, k=draw.randrange(1, 7)))

    matched = 0
    for _ in range(3000):
        entries = [word("ab.*?[") for _ in range(draw.randrange(4))]
        module = word("ab.")
        found = config_of({"quant_algo": "FP8", "ignore": entries}, ["FP8"]).leaves_out(module)
        wanted = any(fnmatch.fnmatchcase(module, entry) for entry in entries)
        assert found == wanted, (entries, module)
        matched += wanted
    assert 300 < matched < 2700


def test_layers_may_be_said_by_what_they_are_in() -> None:
    """ModelOpt names a layer's experts as one, and writes a tensor for each."""
    layers = {"a.experts": {"quant_algo": "NVFP4", "group_size": 16}, "a.gate": {"quant_algo": "fp8"}}
    said = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    known = config_of({"quantization": said}, ["FP8", "NVFP4"])
    assert known.form_of("a.experts.3.up_proj", "") == Form("NVFP4", 16)
    assert known.form_of("a.gate", "") == Form("FP8")
    with pytest.raises(Damaged, match="does not speak of"):
        known.form_of("a.expertsy.up_proj", "")


def test_scales_of_activations_and_caches_are_left_out_by_name(tmp_path: Path) -> None:
    left_out = prepare(Request(FOLDER / "fp8_kv", "hf", tmp_path / "out")).plan.target.left_out
    names = [f"{Q}.input_scale", f"{LAYER}.self_attn.k_proj.k_scale", f"{LAYER}.self_attn.v_proj.v_scale"]
    assert all("activations or of a cache" in left_out[name] for name in names)


def test_an_affine_caches_shift_is_no_bias(tmp_path: Path) -> None:
    name = f"{LAYER}.self_attn.k_proj.k_bias"
    source = rewritten(exported(tmp_path / "source", "fp8_kv"), lambda held: held.update({name: torch.ones(1)}))
    assert name in prepare(Request(source, "hf", tmp_path / "out")).plan.target.left_out


def test_a_cache_alone_leaves_the_weights_plain(tmp_path: Path) -> None:
    write_normal(tmp_path / "source", by_name("llama"))
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "ignore": [], "kv_cache_scheme": {"num_bits": 8}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.self_attn.k_proj.k_scale"
    rewritten(tmp_path / "source", lambda held: held.update({name: torch.ones(())}))
    job = prepare(Request(tmp_path / "source", "hf", tmp_path / "out"))
    assert not job.source.coded
    assert name in job.plan.target.left_out


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_each_by_itself(tmp_path: Path, family: str) -> None:
    """What dconv writes for compressed-tensors, under ModelOpt's names: two writers, the same weights."""
    write_normal(tmp_path / "plain", by_name(family))
    convert(Request(tmp_path / "plain", "mx", tmp_path / "source", quant="nvfp4"))
    held = load_file(tmp_path / "source" / "model.safetensors")
    packed = [name.removesuffix("_packed") for name in held if name.endswith("_packed")]
    assert any("experts.3." in name for name in packed)
    for name in packed:  # powers of two have exact reciprocals
        held[f"{name}_global_scale"] = torch.exp2(held[f"{name}_global_scale"].log2().floor())
    save_file(held, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    expected = dense(tmp_path / "source", tmp_path / "expected", dtype="f32")
    for name in packed:
        held[name] = held.pop(f"{name}_packed")
        held[f"{name}_scale_2"] = (1 / held.pop(f"{name}_global_scale")).reshape(())
    save_file(held, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    found = dense(tmp_path / "source", tmp_path / "found", dtype="f32")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ------------------------------------------------------------------------------------------------------ what is wrong


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda held: held.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda held: held.update({name: value})


WRONG: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scale": ("nvfp4", drop(f"{Q}.weight_scale"), "lacks a part"),
    "no second scale": ("nvfp4", drop(f"{Q}.weight_scale_2"), "lacks a part"),
    "no scale of a tensor": ("fp8_kv", drop(f"{Q}.weight_scale"), "lacks a part"),
    "no scale of blocks": ("fp8_blocks", drop(f"{DOWN}.weight_scale"), "lacks a part"),
    "no scale of groups": ("int4_awq", drop(f"{Q}.weight_scale"), "lacks a part"),
    "no codes": ("nvfp4", drop(f"{Q}.weight"), "none beside them"),
    "plain": ("nvfp4", put(f"{Q}.weight", torch.ones(32, 32)), "none beside them"),
    "one too many": ("fp8_kv", put(f"{Q}.weight_scale_2", torch.ones(())), "no use for"),
    "more scales": ("fp8_kv", put(f"{Q}.weight_scale", torch.ones(32)), "not what the config makes it"),
    "fewer scales": ("nvfp4", lambda held: held.update({f"{Q}.weight_scale": held[f"{Q}.weight_scale"][:8]}), "32, 2"),
    "other blocks": ("fp8_blocks", put(f"{DOWN}.weight_scale", torch.ones(1, 1, 3, 1)), "[1, 2] by FP8_PB_WO"),
    "groups": ("int4_awq", put(f"{Q}.weight_scale", torch.ones(32, 5)), "by W4A16_AWQ"),
    "columns": ("int4_awq", put(f"{DOWN}.pre_quant_scale", torch.ones(32)), "pre_quant_scale"),
    "codes of others": ("fp8_kv", put(f"{Q}.weight", torch.zeros(32, 16, dtype=torch.uint8)), "f8_e4m3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_missing_or_odd_is_named(tmp_path: Path, case: str) -> None:
    kind, edit, words = WRONG[case]
    source = rewritten(exported(tmp_path / "source", kind), edit)
    with pytest.raises(Damaged) as error:
        prepare(Request(source, "hf", tmp_path / "out"))
    assert words in str(error.value)


def test_groups_that_do_not_divide_the_columns(tmp_path: Path) -> None:
    """Where config.json alone is there, which does not say their size."""
    source = rewritten(exported(tmp_path / "source", "int4_awq"), put(f"{Q}.weight_scale", torch.ones(32, 5)))
    (source / FILE).unlink()
    with pytest.raises(Damaged, match="do not divide"):
        prepare(Request(source, "hf", tmp_path / "out"))


SAID: dict[str, tuple[str, Said, type[DconvError], str]] = {
    "rounded twice": ("nvfp4", {"quant_algo": "W4A8_AWQ"}, Refused, "does not decode"),
    "two small matrices": ("nvfp4", {"quant_algo": "NVFP4_SVD"}, Refused, "does not decode"),
    "of one layer": (
        "mixed", {"quantized_layers": {Q: {"quant_algo": "FP8"}, DOWN: {"quant_algo": "X"}}}, Refused, DOWN,
    ),
    "groups of another size": ("nvfp4", {"group_size": 32}, Refused, "one scale for 16 columns"),
    "zero points": ("int4_awq", {"has_zero_point": True}, Refused, "zero points"),
    "embedding": ("nvfp4", {"nvfp4_embed": True}, Refused, "input_scale"),
    "left out": ("nvfp4", {"ignore": [Q]}, Damaged, "leaves out"),
    "left out by a wildcard": ("nvfp4", {"ignore": ["lm_head", "model.layers.0.self*"]}, Damaged, "leaves out"),
    "not spoken of": ("mixed", {"quantized_layers": {Q: {"quant_algo": "FP8"}}}, Damaged, "does not speak of"),
    "no layers": ("mixed", {"quantized_layers": {}}, Damaged, "quantized_layers"),
    "nothing": ("nvfp4", {"quant_algo": None}, Damaged, "does not speak of"),
    "no name": ("nvfp4", {"quant_algo": 4}, Damaged, "quant_algo"),
    "no list": ("nvfp4", {"ignore": {"a": 1}}, Damaged, "ignore"),
    "no table": ("mixed", {"quantized_layers": [Q]}, Damaged, "quantized_layers"),
    "no group": ("int4_awq", {"group_size": -1}, Damaged, "group_size"),
    "endless": ("nvfp4", {"ignore": ["a" * 1000]}, Damaged, "too long"),
    "many wildcards": ("nvfp4", {"ignore": [f"*{n}*" for n in range(2000)]}, Damaged, "wildcard"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_the_config_must_not_say(tmp_path: Path, case: str) -> None:
    kind, change, error, words = SAID[case]
    source = rewritten(exported(tmp_path / "source", kind), said=lambda said: said.update(change))
    with pytest.raises(error) as found:
        prepare(Request(source, "hf", tmp_path / "out"))
    assert type(found.value) is error
    assert words in str(found.value)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.experts.gate_up_proj_weight_scale"
    source = rewritten(exported(tmp_path / "source", "nvfp4"), put(name, torch.ones(2, 2, 32)))
    with pytest.raises(Refused, match="experts are in codes in one tensor"):
        prepare(Request(source, "hf", tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------------- explained


def test_explained_with_its_own_meaning() -> None:
    explained = json.loads(json.dumps(dconv.inspect(FOLDER / "nvfp4", explain="modelopt").to_dict()))["explained"]
    text = json.dumps(explained)
    assert "both multiply" in text
    assert "what multiplies all of them" in text
    assert "what divides" not in text
