"""Block FP8 checkpoints as Neuron's and back, each file read by safetensors and judged by torch's own e4m3."""

from __future__ import annotations

import json
import random
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")

from safetensors.torch import load_file, save_file  # noqa: E402

from dconv.arch.registry import by_name  # noqa: E402
from dconv.cli import main  # noqa: E402
from dconv.errors import Damaged, DconvError, Refused, UsageError  # noqa: E402
from dconv.pipeline import Request, convert, prepare, run  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from dconv.sharding.rank import Settings  # noqa: E402
from dconv.sharding.tensor import TensorSpec  # noqa: E402
from tests.fp8 import BLOCK, linear, write_fp8  # noqa: E402
from tests.models import config_of, tree_digest, write_random  # noqa: E402

Tensors = dict[str, "torch.Tensor"]
FAMILIES = ("llama", "mixtral", "qwen3_moe", "minimax_m2")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
}
#: Rounding to bf16, of the dense weights that come back.
BF16 = 2.0**-8


def released(folder: Path, family: str = "minimax_m2", **options: Any) -> Path:
    """As MiniMax-M2 is released, in small: FP8 with every finite code, router and bias in fp32, the rest in bf16."""

    def routers(specs: dict[str, TensorSpec]) -> None:
        for name in specs:
            if family == "minimax_m2" and name.endswith((".gate.weight", "e_score_correction_bias")):
                specs[name] = replace(specs[name], dtype="f32")
        options.get("edit", lambda _: None)(specs)

    known = {**SIZES, **{k: v for k, v in options.items() if k not in ("edit", "quantised", "value", "quantization")}}
    given = {k: v for k, v in options.items() if k in ("quantised", "value", "quantization")}
    write_fp8(folder, family, edit=routers, **given, **known)
    path = folder / "model.safetensors"
    body = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", body[:8])
    draw = np.random.default_rng(7)
    finite = np.setdiff1d(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    for name, entry in json.loads(body[8 : 8 + length]).items():
        if name == "__metadata__" or name.endswith("_scale_inv"):
            continue
        low, high = (8 + length + at for at in entry["data_offsets"])
        if entry["dtype"] == "F8_E4M3":
            body[low:high] = draw.choice(finite, high - low).tobytes()
        elif entry["dtype"] == "F32":
            body[low:high] = draw.normal(0, 1, (high - low) // 4).astype("<f4").tobytes()
        else:
            wide = draw.normal(0, 1, (high - low) // 2).astype("<f4").view("<u4")
            body[low:high] = (wide >> 16).astype("<u2").tobytes()
    path.write_bytes(body)
    return folder


def loaded(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def spread(scale: torch.Tensor, shape: tuple[int, ...], block: int = BLOCK) -> torch.Tensor:
    wide = scale.double().repeat_interleave(block, -2).repeat_interleave(block, -1)
    return wide[..., : shape[-2], : shape[-1]]


def dense(tensors: Tensors) -> Tensors:
    """HuggingFace's weights as transformers reads them: code × scale of its block, here in fp64."""
    return {
        name: tensor.double() * spread(tensors[f"{name}_scale_inv"], tuple(tensor.shape))
        if f"{name}_scale_inv" in tensors
        else tensor.double()
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def stacks(source: Tensors, layer: int, *, halved: bool = True) -> dict[str, torch.Tensor]:
    """What MiniMax-M2's experts of a layer should be, from HuggingFace's tensors."""
    here = f"model.layers.{layer}.block_sparse_moe.experts"
    by = 2.0 if halved else 448.0 / 240.0

    def joined(*names: str, scales: bool) -> torch.Tensor:
        def one(expert: int, name: str) -> torch.Tensor:
            weight = source[f"{here}.{expert}.{name}.weight"]
            if scales:
                return (source[f"{here}.{expert}.{name}.weight_scale_inv"].double() * by).float().T
            return bits((weight.float() / by).to(torch.float8_e4m3fn)).T

        return torch.stack([torch.cat([one(e, name) for name in names], 1) for e in range(4)])

    there = f"layers.{layer}.block_sparse_moe.expert_mlps.mlp_op"
    return {
        f"{there}.gate_up_proj.weight": joined("w1", "w3", scales=False),
        f"{there}.gate_up_proj.scale": joined("w1", "w3", scales=True),
        f"{there}.down_proj.weight": joined("w2", scales=False),
        f"{there}.down_proj.scale": joined("w2", scales=True),
    }


@pytest.mark.parametrize("halved", [True, False])
def test_minimax_m2_as_neuron_holds_it(tmp_path: Path, halved: bool) -> None:
    source = loaded(released(tmp_path / "model"))
    weights = dense(source)
    convert(Request(tmp_path / "model", "neuron", tmp_path / "out", neuron_rescale="2" if halved else "448/240"))
    found = loaded(tmp_path / "out")
    expected = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    for layer in range(2):
        here, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for name, tensor in stacks(source, layer, halved=halved).items():
            made = bits(found[name]) if name.endswith("weight") else found[name]
            assert torch.equal(made, tensor), name
            expected.add(name)
        same = {
            "input_layernorm.weight": "input_layernorm.weight",
            "post_attention_layernorm.weight": "post_attention_layernorm.weight",
            "self_attn.q_norm.weight": "self_attn.q_norm.weight",
            "self_attn.k_norm.weight": "self_attn.k_norm.weight",
            "block_sparse_moe.router.linear_router.weight": "block_sparse_moe.gate.weight",
            "block_sparse_moe.router.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
        }
        for ours, name in same.items():
            assert found[here + ours].dtype == source[theirs + name].dtype
            assert torch.equal(bits(found[here + ours]), bits(source[theirs + name]))
            expected.add(here + ours)
        for part in "qkv":
            weight, scale = (found[f"{here}self_attn.qkv_proj.{part}_proj.{kind}"] for kind in ("weight", "scale"))
            wanted = weights[f"{theirs}self_attn.{part}_proj.weight"]
            assert (weight.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (len(wanted), 1))
            largest = wanted.abs().amax(1, keepdim=True)
            assert torch.allclose(scale.double(), largest / 240, rtol=2**-22, atol=0)
            assert weight.float().abs().max() == 240
            error = (weight.double() * scale - wanted).abs()
            assert (error <= torch.maximum(wanted.abs() / 16, scale * 2.0**-10) * (1 + 2**-18)).all()
            expected |= {f"{here}self_attn.qkv_proj.{part}_proj.{kind}" for kind in ("weight", "scale")}
        output, wanted = found[f"{here}self_attn.o_proj.o_proj.weight"], weights[f"{theirs}self_attn.o_proj.weight"]
        assert output.dtype == torch.bfloat16
        assert ((output.double() - wanted).abs() <= wanted.abs() * BF16).all()
        expected.add(f"{here}self_attn.o_proj.o_proj.weight")
    assert found.keys() == expected
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected, "a loader of one file needs its index, too"


@pytest.mark.parametrize("scale", ["multiplier", "reciprocal"])
@pytest.mark.parametrize("rescale", ["2", "448/240"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_within_the_stated_bound(tmp_path: Path, family: str, rescale: str, scale: str) -> None:
    """Experts by the bound of their rescaling, rows by that of e4m3, everything else by bf16 or not at all."""
    source = loaded(released(tmp_path / "model", family))
    before = dense(source)
    asked = Request(tmp_path / "model", "neuron", tmp_path / "neuron", neuron_rescale=rescale, neuron_scale=scale)
    convert(asked)
    convert(Request(tmp_path / "neuron", "hf", tmp_path / "back"))
    back = loaded(tmp_path / "back")
    assert back.keys() == before.keys()
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    for name, weight in before.items():
        if f"{name}_scale_inv" not in source:
            assert torch.equal(bits(back[name]), bits(source[name])), name
            continue
        unit = spread(source[f"{name}_scale_inv"], tuple(weight.shape))
        largest = weight.abs().amax(1, keepdim=True)
        if ".experts." in name:
            lost = unit * 2.0**-9 if rescale == "2" else torch.maximum(weight.abs() / 16, unit * 2.0**-9)
        elif family == "minimax_m2" and "o_proj" in name:
            lost = torch.zeros_like(weight)
        else:
            lost = torch.maximum(weight.abs() / 16, largest / 240 * 2.0**-10) * (1 + 2**-18)
        error = (back[name].double() - weight).abs()
        assert (error <= lost + (weight.abs() + lost) * (BF16 + 2**-22)).all(), name


def test_experts_go_back_to_fp8_without_another_rounding(tmp_path: Path) -> None:
    """Neuron's byte is HuggingFace's byte: codes and scales of experts are moved, and are worth what they were."""
    source = loaded(released(tmp_path / "model"))
    convert(Request(tmp_path / "model", "neuron", tmp_path / "neuron"))
    convert(Request(tmp_path / "neuron", "fp8", tmp_path / "fp8", block_size=(BLOCK, BLOCK)))
    back = loaded(tmp_path / "fp8")
    assert back.keys() == source.keys()
    for name in (name for name in source if ".experts." in name and name.endswith(".weight")):
        assert torch.equal(back[f"{name}_scale_inv"], source[f"{name}_scale_inv"] * 2)
        assert torch.equal(bits(back[name]), bits((source[name].float() / 2).to(torch.float8_e4m3fn)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_only_moved(tmp_path: Path, family: str) -> None:
    """Every bit comes back, and a Megatron source gives the same bytes as a HuggingFace one."""
    known = by_name(family)
    write_random(tmp_path / "model", known, config_of(known))
    convert(Request(tmp_path / "model", "neuron", tmp_path / "neuron"))
    convert(Request(tmp_path / "neuron", "hf", tmp_path / "back"))
    assert tree_digest(tmp_path / "back") == tree_digest(tmp_path / "model")
    convert(Request(tmp_path / "model", "megatron", tmp_path / "megatron", parallel=Parallel(tp=2, etp=2), divisor=8))
    convert(Request(tmp_path / "megatron", "neuron", tmp_path / "again"))
    weights = ("model.safetensors", "model.safetensors.index.json")
    assert all((tmp_path / "again" / w).read_bytes() == (tmp_path / "neuron" / w).read_bytes() for w in weights)


@pytest.mark.parametrize("direction", ["to", "from"])
def test_any_world_gives_the_same_bytes(tmp_path: Path, direction: str) -> None:
    """Wide enough that rows and stacks are cut, in memory of any size."""
    wide = {"hidden_size": 256, "intermediate_size": 192, "num_local_experts": 8}
    released(tmp_path / "model", **wide)
    asked = Request(tmp_path / "model", "neuron", tmp_path / "one", shard_size=1_000_000)
    if direction == "from":
        convert(asked)
        asked = Request(tmp_path / "one", "hf", tmp_path / "hf")
    convert(asked)
    expected = tree_digest(asked.output)
    draw = random.Random(direction)
    for world in (1, 3, 4):
        out, launched = tmp_path / f"by {world}", time.time()
        for rank in draw.sample(range(world), world):
            memory, threads = draw.choice((64 << 10, 300_000, 256 << 20)), draw.choice((1, 2))
            job = prepare(replace(asked, out=out))
            run(job, Settings(rank=rank, world=world, threads=threads, max_memory=memory, launched=launched))
        assert tree_digest(out) == expected


def test_every_scale_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed and in the receipt; counted here from the files."""
    source = loaded(released(tmp_path / "model"))
    scales = [name for name in source if name.endswith("_scale_inv")]
    experts, rows = (sum(part in name for name in scales) for part in (".experts.", "self_attn"))
    assert main(["convert", str(tmp_path / "model"), "neuron", "-o", str(tmp_path / "out")]) == 0
    line = f"scales: {experts} kept + {rows - 2} requantised + 2 dropped = {len(scales)} read"
    assert line in capsys.readouterr().out
    receipt = json.loads((tmp_path / "out" / "dconv.json").read_text())
    assert receipt["scales"] == {
        "read": len(scales), "kept": experts, "requantised": rows - 2, "dropped": 2, "rescale": "2",
        "scale": "multiplier",
    }  # fmt: skip


def test_the_reciprocal_is_what_was_asked_for(tmp_path: Path) -> None:
    released(tmp_path / "model")
    convert(Request(tmp_path / "model", "neuron", tmp_path / "plain"))
    convert(Request(tmp_path / "model", "neuron", tmp_path / "turned", neuron_scale="reciprocal"))
    plain, turned = loaded(tmp_path / "plain"), loaded(tmp_path / "turned")
    for name, tensor in plain.items():
        if name.endswith(".scale"):
            assert torch.allclose(
                tensor.double() * turned[name], torch.ones(1, dtype=torch.float64), rtol=0, atol=2**-22
            )
        else:
            assert torch.equal(bits(tensor), bits(turned[name]))


def test_a_source_whose_scales_divide(tmp_path: Path) -> None:
    """GPTQModel's FP8: turned over on the way, so that Neuron's multiply."""
    said = {"weight_scale_semantics": "inverse"}
    source = loaded(released(tmp_path / "model", quantization=said))
    convert(Request(tmp_path / "model", "neuron", tmp_path / "out"))
    found = loaded(tmp_path / "out")
    scale = source["model.layers.0.block_sparse_moe.experts.3.w2.weight_scale_inv"]
    made = found["layers.0.block_sparse_moe.expert_mlps.mlp_op.down_proj.scale"][3]
    assert torch.allclose(made.T.double(), 2 / scale.double(), rtol=2**-23, atol=0)


def test_what_the_vendors_script_wrote_is_read(tmp_path: Path) -> None:
    """It leaves attention's names to the loader, which makes the ranks' tensors."""
    released(tmp_path / "model")
    convert(Request(tmp_path / "model", "neuron", tmp_path / "out"))
    theirs = {
        name.replace("qkv_proj.", "").replace("o_proj.o_proj", "o_proj"): tensor
        for name, tensor in loaded(tmp_path / "out").items()
    }
    for layer in range(2):
        theirs[f"layers.{layer}.self_attn.rank_util.rank"] = torch.arange(4, dtype=torch.int32)
    (tmp_path / "theirs").mkdir()
    save_file(theirs, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_bytes((tmp_path / "out" / "config.json").read_bytes())
    for name in ("out", "theirs"):
        convert(Request(tmp_path / name, "hf", tmp_path / f"{name} back"))
    ours, back = loaded(tmp_path / "out back"), loaded(tmp_path / "theirs back")
    assert ours.keys() == back.keys()
    assert all(torch.equal(bits(ours[name]), bits(back[name])) for name in ours)


def _one_expert_plain(name: str) -> bool:
    return linear(name) and "experts.1.w3" not in name


def _powers_of_two(specs: dict[str, TensorSpec]) -> None:
    for name in specs:
        if ".experts." in name and name.endswith("_scale_inv"):
            specs[name] = replace(specs[name], dtype="f8_e8m0")


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], type[DconvError], str]] = {
    "one expert not in FP8": ("minimax_m2", {"quantised": _one_expert_plain}, {}, Refused, "are not in FP8"),
    "a width of half a block": ("minimax_m2", {"intermediate_size": 40}, {}, Refused, "no whole number of blocks"),
    "scales in E8M0": ("mixtral", {"edit": _powers_of_two}, {}, Refused, "none that Neuron could keep"),
    "a family without a table": ("qwen3", {}, {}, Refused, "names of qwen3 are not known"),
    "another rescaling": ("llama", {}, {"neuron_rescale": "3"}, UsageError, "no such way"),
    "another FORMAT": ("llama", {}, {"neuron_scale": "reciprocal", "format": "hf"}, UsageError, "no such option"),
    "a variant": ("llama", {}, {"quant": "fp8_block"}, UsageError, "no such variant"),
    "experts without scales": ("mixtral", {"quantised": lambda _: False}, {"quant": "fp8"}, Refused, "not in FP8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path: Path, case: str) -> None:
    family, written, asked, kind, message = REFUSED[case]
    released(tmp_path / "model", family, **written)
    with pytest.raises(kind, match=message):
        prepare(Request(**{"model": tmp_path / "model", "format": "neuron", "out": tmp_path / "out", **asked}))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("layers.0.self_attn.qkv_proj.k_proj.scale"), "have no scale"),
        (lambda held: held.pop("layers.1.block_sparse_moe.expert_mlps.mlp_op.down_proj.weight"), "belong to no FP8"),
        (lambda held: held.update({"norm.weight": torch.zeros(3)}), "another shape"),
        (lambda held: held.pop("norm.weight"), "not whole"),
        (lambda held: held.update({"model.norm.weight": held["norm.weight"] + 1}), "are one of HuggingFace's"),
    ],
    ids=["scale", "weight", "shape", "norm", "twice"],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    released(tmp_path / "model")
    convert(Request(tmp_path / "model", "neuron", tmp_path / "out"))
    held = loaded(tmp_path / "out")
    change(held)
    (tmp_path / "torn").mkdir()
    save_file(held, tmp_path / "torn" / "model.safetensors")
    (tmp_path / "torn" / "config.json").write_bytes((tmp_path / "out" / "config.json").read_bytes())
    with pytest.raises(Damaged, match=message):
        prepare(Request(tmp_path / "torn", "hf", tmp_path / "back"))
