"""``inspect --explain``: what encodings cost, taken once more by transformers, ml_dtypes and the formats' formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_qparams
from numpy.typing import NDArray
from safetensors.torch import load_file

import dconv
from dconv.coded.places import place_of
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.cli.explained import BLOCK, Weights, linear, plain, said, stored_in


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("plain") / "source")


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    convert(Request(source, "fp8", source.with_name("fp8"), block_size=BLOCK))
    return source.with_name("fp8")


# ------------------------------------------------------------------------------------------------ what encodings cost


def by_transformers(x: NDArray[np.float64], block: tuple[int, int], scale_fmt: str | None = None) -> NDArray[Any]:
    """There and back, with its own quantiser, on the tensor padded to whole blocks."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    hub: Any = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))
    padded = np.pad(x.astype(np.float32), [(0, -n % of) for n, of in zip(x.shape, block, strict=True)])
    found = Fp8Quantize(hub).convert({"a.weight": torch.from_numpy(padded)})  # pyright: ignore[reportCallIssue]
    scale = found["a.weight_scale_inv"].double().numpy()
    grid = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)
    return (found["a.weight"].double().numpy() * grid)[: x.shape[0], : x.shape[1]]


def by_mx(x: NDArray[np.float64], kind: Any, largest: float, rule: str = "floor", kept: int = 1) -> NDArray[np.float64]:
    """The rules as they are described, block by block.

    Args:
        kept: bits of mantissa whose half step ``even`` adds.
    """
    found = np.zeros(x.shape)
    for at in np.ndindex(x.shape[0], x.shape[1] // 32):
        cut = (at[0], slice(32 * at[1], 32 * at[1] + 32))
        most = np.abs(x[cut]).max()
        if most:
            power = np.floor(np.log2(most))
            if rule == "even":
                power += most / 2.0**power >= 2 - 2.0 ** -(kept + 1)
            power = np.ceil(np.log2(most / largest)) if rule == "ceil" else power - np.floor(np.log2(largest))
            unit = 2.0**power
            found[cut] = np.clip(x[cut] / unit, -largest, largest).astype(kind).astype(np.float64) * unit
    return found


def by_whole(x: NDArray[np.float64], zeros: bool) -> NDArray[np.float64]:
    """Nearest of 16 codes, a group of 128 at a time; without zero points as compressed-tensors has them."""
    args = QuantizationArgs(num_bits=4, type=QuantizationType.INT, symmetric=not zeros)
    found = np.zeros(x.shape)
    for at in np.ndindex(x.shape[0], x.shape[1] // 128):
        cut = (at[0], slice(128 * at[1], 128 * at[1] + 128))
        group = torch.from_numpy(x[cut])
        scale, _ = calculate_qparams(group.min().reshape(1), group.max().reshape(1), args)
        step = max(float(scale.half()), 2.0**-24)
        zero = round(max(-float(group.min()), 0) / step) if zeros else 8
        codes = [min(max(round(value / step) + zero, 0), 15) for value in x[cut].tolist()]
        found[cut] = [(code - zero) * step for code in codes]
    return found


def by_nvfp4(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """compressed-tensors' formula, block by block, in fp32 as there."""
    f32, found = np.float32, np.zeros(x.shape)
    whole = f32(1) / f32(np.abs(x).max()) * f32(2688)
    for at in np.ndindex(x.shape[0], x.shape[1] // 16):
        cut = (at[0], slice(16 * at[1], 16 * at[1] + 16))
        scale = f32((f32(np.abs(x[cut]).max()) / f32(6) * whole).astype(ml_dtypes.float8_e4m3fn)) or f32(0.125)
        scaled = x[cut].astype(f32) / (scale / whole)
        codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
        found[cut] = codes * np.float64(scale) / np.float64(whole)
    return found


ENCODERS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "fp8_block": lambda x: by_transformers(x, (128, 128)),
    "fp8_block ue8m0": lambda x: by_transformers(x, (128, 128), "ue8m0"),
    "fp8_tensor": lambda x: by_transformers(x, (x.shape[0], x.shape[1])),
    "mxfp8": lambda x: by_mx(x, ml_dtypes.float8_e4m3fn, 448, "even"),
    "mxfp6_e2m3": lambda x: by_mx(x, ml_dtypes.float6_e2m3fn, 7.5),
    "mxfp6_e3m2": lambda x: by_mx(x, ml_dtypes.float6_e3m2fn, 28),
    "mxfp4": lambda x: by_mx(x, ml_dtypes.float4_e2m1fn, 6),
    "nvfp4": by_nvfp4,
}


MICRO: dict[str, tuple[Any, float, int]] = {
    "mxfp8": (ml_dtypes.float8_e4m3fn, 448, 1),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 7.5, 3),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 28, 2),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 6, 1),
}
WHOLE = {"int4": False, "int4 zeros": True}


def check_cost(found: dict[str, Any], before: Weights, after: Weights) -> None:
    errors = {name: np.abs(after[name] - before[name]) for name in before}
    relative = {n: np.sqrt(np.square(e).sum() / np.square(before[n]).sum()) for n, e in errors.items()}
    whole = np.sqrt(sum(np.square(e).sum() for e in errors.values()) / sum(np.square(b).sum() for b in before.values()))
    assert found["relative_error"] == pytest.approx(whole, rel=1e-5)
    largest = max(errors, key=lambda name: errors[name].max())
    assert found["largest_error"] == pytest.approx(errors[largest].max(), rel=1e-5)
    assert found["where"] == largest
    assert found["weights"] == sum(value.size for value in before.values())
    assert found["zeroed"] == sum(int(((after[n] == 0) & (b != 0)).sum()) for n, b in before.items())
    worst = sorted(relative, key=lambda name: -relative[name])[: len(found["worst"])]
    assert [each["tensor"] for each in found["worst"]] == worst
    assert [each["relative_error"] for each in found["worst"]] == pytest.approx([relative[n] for n in worst], rel=1e-5)
    kinds = {place_of(name, value.shape).kind for name, value in before.items()}
    assert set(found["classes"]) == kinds


@pytest.mark.parametrize("state", ["plain", "coded"])
def test_costs_are_what_others_codecs_lose(source: Path, coded: Path, state: str) -> None:
    if state == "plain":
        tensors = load_file(source / "model.safetensors")
        before = {name: value.double().numpy() for name, value in tensors.items() if linear(name)}
        found = said(source, "fp8")
    else:
        before, found = stored_in(coded).weights(), said(coded, "fp8")
    assert found["sample"]["whole"] and found["sample"]["tensors"] == len(before) == found["tensors"]
    costs = {cost["encoding"]: cost for cost in found["costs"]}
    assert set(costs) - {"neuron / 2", "neuron / (448/240)"} - WHOLE.keys() == set(ENCODERS)
    for name, encode in ENCODERS.items():
        check_cost(costs[name], before, {tensor: encode(value) for tensor, value in before.items()})


@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
def test_mx_by_the_rule_that_is_asked_for(source: Path, rule: str) -> None:
    before = {n: v.double().numpy() for n, v in load_file(source / "model.safetensors").items() if linear(n)}
    found = said(source, "mx", scale_rule=rule)
    assert found["scale_rule"] == rule and said(source, "mx")["scale_rule"] == ""
    costs = {cost["encoding"]: cost for cost in found["costs"]}
    for name, (kind, largest, kept) in MICRO.items():
        check_cost(costs[name], before, {n: by_mx(value, kind, largest, rule, kept) for n, value in before.items()})


def test_rules_are_those_that_convert_has(tmp_path: Path) -> None:
    """Without one asked for: what the codes that are written are off, the plain source being known."""
    model = plain(tmp_path / "plain", "llama")
    costs = {cost["encoding"]: cost for cost in said(model, "mx")["costs"]}
    before = {n: v.double().numpy() for n, v in load_file(model / "model.safetensors").items() if linear(n)}
    for name in MICRO:
        convert(Request(model, "mx", tmp_path / name, quant=name))
        convert(Request(tmp_path / name, "hf", tmp_path / name / "dense", dtype="f32"))
        after = load_file(tmp_path / name / "dense" / "model.safetensors")
        check_cost(costs[name], before, {n: after[n].double().numpy() for n in before})


@pytest.mark.parametrize(("word", "focus"), [("gptq", ["int4"]), ("awq", ["int4 zeros"]), ("int4", [*WHOLE])])
def test_whole_numbers_cost_what_nearest_does(tmp_path: Path, word: str, focus: list[str]) -> None:
    model = plain(tmp_path / "plain", "llama", num_hidden_layers=1, hidden_size=128, intermediate_size=256, head_dim=32)
    before = {n: v.double().numpy() for n, v in load_file(model / "model.safetensors").items() if linear(n)}
    costs = {cost["encoding"]: cost for cost in said(model, word)["costs"]}
    for name, zeros in WHOLE.items():
        check_cost(costs[name], before, {tensor: by_whole(value, zeros) for tensor, value in before.items()})
    text = dconv.inspect(model, explain=word).text()
    assert "calibration (GPTQ, AWQ) does better" in text.replace("\n  ", " ")
    assert [line.removeprefix("Worst in ") for line in text.splitlines() if line.startswith("Worst")] == focus


@pytest.mark.parametrize("container", ["hf", "megatron"])
def test_experts_that_are_one_tensor_for_all(tmp_path: Path, container: str) -> None:
    """Of each the rows that FORMAT mx codes: [experts, in, out] turned, whatever container has them."""
    model = plain(tmp_path / "plain", "gpt_oss")
    before = {
        f"{n}[{expert}]": matrix.T.double().numpy()
        for n, v in load_file(model / "model.safetensors").items()
        if n.endswith(("experts.gate_up_proj", "experts.down_proj"))
        for expert, matrix in enumerate(v)
    }
    if container == "megatron":
        convert(Request(model, "megatron", tmp_path / "megatron", parallel=Parallel(ep=2)))
        model = tmp_path / "megatron"
    found = said(model, "mxfp4")
    assert found["weights"] == found["sample"]["weights"] == sum(value.size for value in before.values())
    assert {cost["encoding"] for cost in found["costs"]} >= {*ENCODERS}
    for cost in found["costs"]:
        if cost["encoding"] not in ("fp8_tensor", "nvfp4", *WHOLE):  # scales of all experts together
            encode = ENCODERS[cost["encoding"]]
            wrong = sum(np.square(encode(value) - value).sum() for value in before.values())
            whole = sum(np.square(value).sum() for value in before.values())
            assert cost["relative_error"] == pytest.approx(np.sqrt(wrong / whole), rel=1e-5)
    shown = said(model, "fp8")["example"]
    expert, row, column = shown["index"]
    assert shown["weight"] == before[f"{shown['tensor']}[{expert}]"][row, column]


def test_neurons_costs_are_those_of_its_format(coded: Path) -> None:
    """ml_dtypes' e4m3 as IEEE has it; codes are divided in fp64 and rounded once."""
    there = stored_in(coded)
    costs = {cost["encoding"]: cost for cost in said(coded)["costs"]}
    for name, by in (("neuron / 2", 2.0), ("neuron / (448/240)", 448 / 240)):
        after = {}
        for tensor, codes in there.codes.items():
            rounded = (codes.double().numpy() / by).astype(ml_dtypes.float8_e4m3).astype(np.float64)
            after[tensor] = rounded * by * there.each(tensor)
        check_cost(costs[name], there.weights(), after)
    assert costs["neuron / 2"]["relative_error"] < 1e-3 < costs["neuron / (448/240)"]["relative_error"]


def test_codes_that_are_kept_cost_nothing(tmp_path: Path, source: Path, coded: Path) -> None:
    assert said(coded)["kept"] == ""
    for options, kept in (({}, "fp8_block"), ({"scale_format": "ue8m0"}, "fp8_block ue8m0")):
        convert(Request(source, "fp8", tmp_path / kept, **options))
        found = said(tmp_path / kept)
        assert found["kept"] == kept and kept not in {cost["encoding"] for cost in found["costs"]}
        convert(Request(tmp_path / kept, "fp8", tmp_path / f"{kept} again", **options))
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in (kept, f"{kept} again")]
        assert files[0] == files[1]


def test_the_example_of_a_plain_model(source: Path) -> None:
    found = said(source, "fp8_block")["example"]
    weights = load_file(source / "model.safetensors")[found["tensor"]].double().numpy()
    at = tuple(found["index"])
    back = by_transformers(weights, (128, 128))
    row, column = (128 * i for i in found["block"])
    assert found["weight"] == weights[at] and found["decoded"] == pytest.approx(back[at], rel=1e-6)
    assert found["largest"] == np.abs(weights[row : row + 128, column : column + 128]).max()
    assert found["scale"] == pytest.approx(found["largest"] / 448, rel=1e-6)
    code = np.uint8(found["code"]).view(ml_dtypes.float8_e4m3fn)
    assert found["value"] == float(code) and found["decoded"] == found["value"] * found["scale"]


def test_any_container_gives_the_same(tmp_path: Path, source: Path) -> None:
    convert(Request(source, "megatron", tmp_path / "megatron", parallel=Parallel(tp=2, pp=2, ep=2)))
    first, second = said(source, "fp8"), said(tmp_path / "megatron", "fp8")
    assert first.pop("sample")["weights"] == second.pop("sample")["weights"]
    assert first == second


def test_columns_that_are_no_whole_groups_are_left_out(tmp_path: Path) -> None:
    costs = {
        cost["encoding"]: cost for cost in said(plain(tmp_path / "a", "llama", intermediate_size=72), "mxfp4")["costs"]
    }
    for name, encoding in costs.items():
        assert encoding["left_out"] == (2 if name.startswith(("mx", "nvfp4")) else 14 if name in WHOLE else 0), name
