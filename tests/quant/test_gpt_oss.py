"""gpt-oss in MXFP4 as released: values, logits and names against transformers' own dequantisation."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dconv.arch.registry import by_name
from dconv.codec.kernels import apply
from dconv.errors import Damaged, Refused
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.execute import Worker
from dconv.sharding.outputs import Outputs
from dconv.sharding.rank import Settings
from tests.models import tree_digest
from tests.quant.models import values_of, write_normal

#: What the configs of gpt-oss-20b and gpt-oss-120b say.
RELEASED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
EXPERTS = ("gate_up_proj", "down_proj")


def write_released(folder: Path, *, canonical: bool = False, **sizes: Any) -> dict[str, torch.Tensor]:
    """A small gpt-oss with random codes and scales, as released.

    Args:
        canonical: no block's largest code is below 4, as encoders leave them.

    Returns:
        Its tensors.
    """
    config = GptOssConfig(
        **{
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
            "vocab_size": 256, "pad_token_id": 0, "eos_token_id": 1, **sizes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in GptOssForCausalLM(config).to(torch.bfloat16).state_dict().items():
        if not name.endswith(EXPERTS):
            tensors[name] = torch.randn(value.shape, generator=draw).mul(0.1).to(torch.bfloat16)
            continue
        experts, inputs, outputs = value.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=draw, dtype=torch.uint8)
        if canonical:
            blocks[..., 0] |= 0x06  # 4 or 6, of either sign
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(115, 124, blocks.shape[:-1], generator=draw, dtype=torch.uint8)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = {**config.to_dict(), "architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": RELEASED}))
    return tensors


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoded_bit_for_bit_as_transformers_does(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = write_released(tmp_path / "source")
    convert(Request(tmp_path / "source", "hf", tmp_path / "dense", dtype="f32" if dtype == torch.float32 else None))
    found = read(tmp_path / "dense")
    for layer in (0, 1):
        for proj in EXPERTS:
            name = f"model.layers.{layer}.mlp.experts.{proj}"
            own = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=dtype)
            assert same(found.pop(name), own)
    assert found.keys() == {name for name in stored if not name.endswith(("_blocks", "_scales"))}
    assert all(same(value, stored[name].to(dtype)) for name, value in found.items())
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_every_code_with_every_scale(tmp_path: Path, target: torch.dtype) -> None:
    """All 16 x 255 products, powers too small for bf16's normal numbers and overflow among them."""
    write_released(tmp_path / "source", intermediate_size=256, num_hidden_layers=1)
    stored = read(tmp_path / "source")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = stored[f"{name}_blocks"]  # [4, 512, 2, 16]
    blocks[...] = (codes | codes.flip(0) << 4).expand_as(blocks)
    stored[f"{name}_scales"][...] = (torch.arange(512) % 255).to(torch.uint8)[:, None]
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    convert(Request(tmp_path / "source", "hf", tmp_path / "dense", dtype="f32" if target == torch.float32 else None))
    own = convert_moe_packed_tensors(blocks, stored[f"{name}_scales"], dtype=target)
    assert same(read(tmp_path / "dense")[name], own)


def test_transformers_computes_the_same_from_codes_and_from_dense_weights(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    write_released(tmp_path / "source")
    convert(Request(tmp_path / "source", "hf", tmp_path / "dense"))
    tokens = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(2))
    logits = []
    for folder in ("source", "dense"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert logits[0].abs().max() > 0.1
    assert torch.equal(logits[0], logits[1])


def test_what_is_written_loads_in_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    source = write_normal(tmp_path / "source", by_name("gpt_oss"))
    convert(Request(source, "mx", tmp_path / "coded", quant="mxfp4"))
    assert json.loads((tmp_path / "coded" / "config.json").read_text())["quantization_config"] == RELEASED
    convert(Request(tmp_path / "coded", "hf", tmp_path / "dense"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.bfloat16)
    dense = read(tmp_path / "dense")
    loaded = model.state_dict()
    assert all(same(loaded[name], value) for name, value in dense.items())


@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
@pytest.mark.parametrize("layout", [Parallel(), Parallel(tp=2, etp=2), Parallel(ep=2), Parallel(tp=2, ep=2, pp=2)])
def test_through_megatron_and_back(tmp_path: Path, layout: Parallel, rule: Any) -> None:
    """Dense weights in Megatron's layout, from which the released codes are made again."""
    write_released(tmp_path / "source", canonical=True)
    convert(Request(tmp_path / "source", "hf", tmp_path / "dense"))
    convert(Request(tmp_path / "source", "megatron", tmp_path / "megatron", parallel=layout))
    convert(Request(tmp_path / "dense", "megatron", tmp_path / "megatron of dense", parallel=layout))
    for file in (tmp_path / "megatron of dense").rglob("*.distcp"):
        same_place = tmp_path / "megatron" / file.relative_to(tmp_path / "megatron of dense")
        assert same_place.read_bytes() == file.read_bytes()
    convert(Request(tmp_path / "megatron", "hf", tmp_path / "back"))
    dense, back = read(tmp_path / "dense"), read(tmp_path / "back")
    assert dense.keys() == back.keys()
    assert all(same(value, dense[name]) for name, value in back.items())
    convert(Request(tmp_path / "megatron", "mx", tmp_path / "coded", scale_rule=rule))
    before, after = read(tmp_path / "source"), read(tmp_path / "coded")
    assert before.keys() == after.keys()
    assert all(same(value, before[name]) for name, value in after.items())


def test_codes_of_small_blocks_keep_their_values(tmp_path: Path) -> None:
    """A block whose largest code is below 4 gets a smaller scale and larger codes: the same weights."""
    stored = write_released(tmp_path / "source")
    name = "model.layers.0.mlp.experts.down_proj"
    stored[f"{name}_blocks"] &= 0xBB  # nothing above 1.5
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    convert(Request(tmp_path / "source", "hf", tmp_path / "dense"))
    convert(Request(tmp_path / "dense", "mx", tmp_path / "coded"))
    assert not same(read(tmp_path / "coded")[f"{name}_blocks"], stored[f"{name}_blocks"])
    convert(Request(tmp_path / "coded", "hf", tmp_path / "again"))
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "dense")


def test_codes_that_are_there_are_kept(tmp_path: Path) -> None:
    stored = write_released(tmp_path / "source")  # with blocks that encoding would scale anew
    stored["model.layers.0.mlp.experts.down_proj_scales"][0, :4] = 255
    save_file(stored, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    convert(Request(tmp_path / "source", "mx", tmp_path / "kept"))
    found = read(tmp_path / "kept")
    assert found.keys() == stored.keys()
    assert all(same(value, stored[name]) for name, value in found.items())


def test_encoded_as_the_specification_says(tmp_path: Path) -> None:
    """Every element is the nearest of its block's sixteen, the scale that of the floor rule; from fp64, one by one."""
    source = write_normal(tmp_path / "source", by_name("gpt_oss"))
    convert(Request(source, "mx", tmp_path / "coded", scale_rule="floor"))
    convert(Request(tmp_path / "coded", "hf", tmp_path / "dense", dtype="f32"))
    weights, found, coded = values_of(source), values_of(tmp_path / "dense"), read(tmp_path / "coded")
    steps = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    steps = np.concatenate([-steps[:0:-1], steps])
    for name in [name for name in weights if name.endswith(EXPERTS)]:
        rows = np.swapaxes(weights[name], 1, 2)
        blocks = rows.reshape(*rows.shape[:2], -1, 32)
        largest = np.abs(blocks).max(-1)
        exponent = np.floor(np.log2(np.where(largest > 0, largest, 2.0**-125))) - 2
        assert np.array_equal(coded[f"{name}_scales"].numpy(), exponent + 127)
        possible = steps * 2.0 ** exponent[..., None, None]
        error = np.abs(blocks[..., None] - possible).min(-1)
        got = np.swapaxes(found[name], 1, 2).reshape(blocks.shape)
        assert np.array_equal(np.abs(blocks - got), error)


@pytest.mark.parametrize("way", ["decode to hf", "decode to megatron", "encode", "encode from megatron"])
def test_any_world_gives_the_same_bytes(tmp_path: Path, way: str) -> None:
    source = tmp_path / "source"
    sizes = {
        "hidden_size": 320,
        "intermediate_size": 352,
        "num_hidden_layers": 1,
        "num_local_experts": 3,
        "head_dim": 80,
    }
    write_released(source, **sizes)
    if way.startswith("encode"):
        kind = "megatron" if "from" in way else "hf"
        layout = Parallel(tp=2, etp=2) if "from" in way else Parallel()
        convert(Request(source, kind, tmp_path / "dense", parallel=layout))
        asked = Request(tmp_path / "dense", "mx", tmp_path / "one")
    else:
        asked = Request(source, way.rsplit(" ", 1)[-1], tmp_path / "one", parallel=Parallel(tp=2, etp=2))
    if asked.format == "hf":
        asked = Request(source, "hf", tmp_path / "one")
    convert(asked)
    expected, draw = tree_digest(tmp_path / "one"), random.Random(way)
    for world in (1, 3):
        out, launched = tmp_path / f"by {world}", time.time()
        for rank in draw.sample(range(world), world):
            memory, threads = draw.choice((64 << 10, 300_000, 256 << 20)), draw.choice((1, 2))
            job = prepare(Request(**{**vars(asked), "out": out}))
            run(job, Settings(rank=rank, world=world, threads=threads, max_memory=memory, launched=launched))
        assert tree_digest(out) == expected


@pytest.mark.parametrize("way", ["hf", "mx"])
def test_little_is_read_twice(tmp_path: Path, way: str) -> None:
    """Rows lie across the columns of the other side's files: the bytes read stay within a few times the source's."""
    write_released(
        tmp_path / "source", hidden_size=4096, intermediate_size=512, num_hidden_layers=1, num_local_experts=2
    )
    asked = Request(tmp_path / "source", "hf", tmp_path / "dense")
    if way == "mx":
        convert(asked)
        asked = Request(tmp_path / "dense", "mx", tmp_path / "coded")
    job, sizes = prepare(asked), []
    folder = tmp_path / "by hand"
    folder.mkdir()
    outputs = Outputs(folder, job.plan)

    def log(_file: str, _offset: int, nbytes: int) -> None:
        sizes.append(nbytes)

    worker = Worker(job.plan, outputs, apply, 24 << 20, "xxh3", log)
    for task in job.plan.tasks:
        worker.do(task)
    outputs.close()
    worker.reader.close()
    whole = sum(stamp.size for stamp in job.logical.files.values())
    assert whole / 2 < sum(sizes) < (3 if way == "mx" else 5) * whole


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("gate_up_proj_scales", None, Damaged, "no scales"),
        ("down_proj_blocks", None, Damaged, "belong to no MXFP4 weight"),
        ("gate_up_proj_scales", torch.zeros(4, 192, 3, dtype=torch.uint8), Damaged, "do not belong together"),
        ("down_proj_blocks", torch.zeros(4, 64, 3, 8, dtype=torch.uint8), Damaged, "do not belong together"),
        ("down_proj_blocks", torch.zeros(4, 64, 3, 16), Damaged, "do not belong together"),
    ],
)
def test_codes_that_mean_nothing_are_refused(
    tmp_path: Path, name: str, value: torch.Tensor | None, error: type[Exception], says: str
) -> None:
    tensors = write_released(tmp_path / "source")
    key = f"model.layers.1.mlp.experts.{name}"
    del tensors[key]
    if value is not None:
        tensors[key] = value
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=says):
        prepare(Request(tmp_path / "source", "hf", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_that_are_not_of_whole_blocks_are_refused(tmp_path: Path) -> None:
    source = write_normal(tmp_path / "source", by_name("gpt_oss"), intermediate_size=80)
    with pytest.raises(Refused, match="whole MX blocks"):
        prepare(Request(source, "mx", tmp_path / "out"))
