"""``plan --trace``: what it says of a tensor is what the files hold, and it says all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader

from dconv import api
from dconv.arch.registry import families
from dconv.errors import UsageError
from dconv.sharding.coords import Parallel
from dconv.trace import trace
from tests.cli.conftest import Dconv
from tests.formats import test_classic as classic
from tests.formats import test_meta as meta
from tests.models import config_of, tensors, write_random
from tests.quant.models import write_normal

#: Targets, each with what it takes.
LAYOUTS: dict[str, dict[str, Any]] = {
    "torch_dist": {"tp": 2, "pp": 2},
    "legacy": {"tp": 2, "pp": 2, "vpp": 2, "megatron_format": "legacy"},
}


def model(folder: Path, family: str, **sizes: Any) -> Path:
    known = families()[family]
    return write_random(folder / family, known, config_of(known, **sizes), shard_size=20_000)


def counts(shape: list[int], places: list[dict[str, Any]]) -> np.ndarray:
    """How often each element of a logical tensor is in a box."""
    seen = np.zeros(shape, int)
    for place in places:
        for box in place["boxes"]:
            seen[tuple(slice(a, a + n) for a, n in zip(box["start"], box["shape"], strict=True))] += 1
    return seen


def traced(job: Any) -> list[dict[str, Any]]:
    """The tensors that are converted, as JSON has them."""
    return json.loads(json.dumps([one.to_dict() for one in job.trace if not one.left_out]))


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, layout) for family in ("llama", "qwen3_moe", "gpt_oss", "deepseek_v2") for layout in LAYOUTS),
        ("llama", "model_pt"),
    ],
)
def test_every_element_is_traced_once_a_copy(tmp_path: Path, family: str, layout: str) -> None:
    hf = model(tmp_path, family)
    options = LAYOUTS.get(layout, {"megatron_format": layout})
    there = api.plan(hf, "megatron", tmp_path / "m", trace="*", **options)
    api.convert(hf, "megatron", tmp_path / "m", **options)
    back = api.plan(tmp_path / "m", "hf", trace="*")
    ranks = 2 if layout == "legacy" else 1  # each has what tensor parallelism does not cut
    for job in (there, back):
        assert [one["name"] for one in traced(job)] == list(job.plan.source.specs)
        for one in traced(job):
            assert (counts(one["shape"], one["source"]) == 1).all(), one["name"]
            copies = np.unique(counts(one["shape"], one["target"]))
            assert len(copies) == 1 and copies[0] in (1, ranks), one["name"]
            if job is back:
                assert copies[0] == 1


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_named_huggingface_files_hold_the_tensor(tmp_path: Path, family: str) -> None:
    hf = model(tmp_path, family)
    api.convert(hf, "megatron", tmp_path / "m", tp=2, pp=2)
    jobs = [
        (api.plan(hf, "megatron", tp=2, pp=2, trace="*"), hf, "source"),
        (api.plan(tmp_path / "m", "hf", tmp_path / "back", shard_size="20kB", trace="*"), tmp_path / "back", "target"),
    ]
    api.convert(tmp_path / "m", "hf", tmp_path / "back", shard_size="20kB")
    for job, folder, side in jobs:
        for one in traced(job):
            (place,) = one[side]
            with safe_open(folder / place["file"], "np") as file:  # pyright: ignore[reportGeneralTypeIssues]
                assert place["name"] == one["name"]
                found = file.get_slice(place["name"])
                assert (found.get_shape(), found.get_dtype()) == (place["shape"], "BF16")
                assert place["shape"] == (one["published"] or one["shape"])


def logical(folder: Path, one: dict[str, Any]) -> np.ndarray:
    """A tensor's bits as the published model has them, in the shape that a trace gives."""
    return np.frombuffer(tensors(folder)[one["name"]][2], np.uint16).reshape(one["shape"])


def first(values: torch.Tensor, place: dict[str, Any], box: dict[str, Any]) -> int:
    """What a stored tensor has where a box of it is said to begin, in bits."""
    assert list(values.shape) == place["shape"]
    return int(values.view(torch.uint16)[tuple(box["at"])])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_named_legacy_tensors_hold_the_boxes(tmp_path: Path, family: str) -> None:
    """On both sides: the first element of each box is where the trace says, in the tensor that it names."""
    hf, out = model(tmp_path, family), tmp_path / "m"
    options = LAYOUTS["legacy"]
    there = api.plan(hf, "megatron", out, trace="*", **options)
    api.convert(hf, "megatron", out, **options)
    back = api.plan(out, "hf", trace="*")
    files: dict[str, dict[str, torch.Tensor]] = {}
    for path in out.rglob("*.pt"):
        tree = torch.load(path, weights_only=False)
        chunks = {key: chunk for key, chunk in tree.items() if key.startswith("model")}
        named = {f"{key}.{name}": it for key, chunk in chunks.items() for name, it in chunk.items() if it is not None}
        files[path.relative_to(out / "release").as_posix()] = named
    for job, side in ((there, "target"), (back, "source")):
        for one in traced(job):
            values = logical(hf, one)
            for place in one[side]:
                stored = files[place["file"].removeprefix("release/")][place["name"]]
                for box in place["boxes"]:
                    assert first(stored, place, box) == values[tuple(box["start"])], (one["name"], place, box)


def leaves(tree: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested state dict, under names with a dot between their parts."""
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            found[prefix + key] = value
    return found


@pytest.mark.parametrize("container", ["pt", "bmtrain", "meta", "classic"])
def test_names_of_torch_files_are_their_own(tmp_path: Path, container: str) -> None:
    """Where each of them is understood under another name than it has."""
    if container == "meta":
        source = meta.release(tmp_path / "meta", meta.LLAMA3, meta.model(meta.LLAMA3), 2)
    elif container == "classic":
        _, source = classic.classic(tmp_path, "gpt2", Parallel(tp=2, pp=2, etp=2), 0, classic.EARLY)
    else:
        source = tmp_path / "source"
        api.convert(
            model(tmp_path, "llama", vocab_size=64), container, source, **({"tp": 2} if container == "pt" else {})
        )
    job = api.plan(source, "hf", trace="*")
    seen: set[tuple[str, str]] = set()
    for one in traced(job):
        assert (counts(one["shape"], one["source"]) == 1).all()
        for place in one["source"]:
            tree = torch.load(job.plan.source.root / place["file"], weights_only=False)
            stored = leaves(tree.get("model", tree))[place["name"]]
            assert list(stored.shape) == place["shape"]
            seen.add((place["file"], place["name"]))
    assert len({file for file, _ in seen}) == {"pt": 2, "bmtrain": 1, "meta": 2, "classic": 4}[container]


def test_named_torch_dist_keys_are_in_the_metadata(tmp_path: Path) -> None:
    hf, out = model(tmp_path, "qwen3_moe"), tmp_path / "m"
    api.convert(hf, "megatron", out, tp=2, pp=2)
    there = api.plan(hf, "megatron", out, tp=2, pp=2, trace="*")
    back = api.plan(out, "hf", trace="*")
    metadata = FileSystemReader(out / "release").read_metadata()
    chunks: dict[tuple[str, str], list[tuple[list[int], list[int]]]] = {}
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        for chunk in getattr(entry, "chunks", ()):
            if chunk.offsets == index.offset:
                at = (list(chunk.offsets), list(chunk.sizes))
                chunks.setdefault((info.relative_path, index.fqn), []).append(at)
    for one in traced(there):
        for place in one["target"]:
            assert place["shape"] in [sizes for _, sizes in chunks[Path(place["file"]).name, place["name"]]]
    for one in traced(back):
        for place in one["source"]:
            assert place["shape"] == list(metadata.state_dict_metadata[place["name"]].size)
            for box in place["boxes"]:
                assert any(
                    all(a <= i < a + n for i, a, n in zip(box["at"], offsets, sizes, strict=True))
                    for offsets, sizes in chunks[place["file"], place["name"]]
                )


def test_ranks_in_one_entry(dconv: Dconv, tmp_path: Path) -> None:
    hf = model(tmp_path, "llama")
    shown = dconv("plan", hf, "megatron", "--tp", 2, "--pp", 2, "--trace", "*.layers.3.mlp.gate_proj.weight").out
    said = shown[shown.index("\ntrace ") + 1 :].splitlines()
    assert [line.split() for line in said] == [
        ["trace", "model.layers.3.mlp.gate_proj.weight", "[48,", "32]", "bf16"],
        ["from", "model-00004-of-00004.safetensors"],
        ["model.layers.3.mlp.gate_proj.weight"],
        ["[48,", "32]", "bf16:", "all", "of", "it"],
        ["relayout", "axis", "0", "cut", "into", "2"],
        ["values", "the", "same", "bytes"],
        ["to", "release/__{2..3}_0.distcp", "tp{0..1}", "pp1"],
        ["decoder.layers.mlp.linear_fc1.weight"],
        ["2", "x", "[1,", "24,", "32]", "bf16:", "[0:24,", ":]", "…", "[24:48,", ":]"],
    ]
    many = dconv("plan", hf, "megatron", "--tp", 2, "--pp", 2, "--trace", "*").out.split("\ntrace", 1)[1]
    assert max(map(len, many.splitlines())) <= 80
    assert "31 more tensors match" in many


def test_pairs_are_apart(tmp_path: Path) -> None:
    """gpt_oss has gate and up in alternate columns of a transposed matrix."""
    hf = model(tmp_path, "gpt_oss")
    (one,) = api.plan(hf, "megatron", tp=2, trace="model.layers.0.mlp.experts.gate_up_proj").trace
    assert (one.shape, one.published) == ((4, 32, 48, 2), (4, 32, 96))
    assert "transposed" in one.relayout
    halves = {(box.start[0], box.start[3]) for place in one.target for box in place.boxes}
    assert halves == {(expert, half) for expert in range(4) for half in (0, 1)}


def test_every_side_and_its_names(dconv: Dconv, tmp_path: Path) -> None:
    """A pattern may be of HuggingFace's name, of the target's, or of the source's; the JSON has them all."""
    hf, out = model(tmp_path, "llama"), tmp_path / "m"
    api.convert(hf, "megatron", out, tp=2)
    parts = [f"model.layers.2.self_attn.{part}_proj.weight" for part in "qkv"]
    fused = "decoder.layers.2.self_attention.linear_qkv.weight"
    for words in ((hf, "megatron", "--megatron-format", "legacy"), (hf, "megatron")):
        found = dconv("plan", *words, "--trace", fused, "--json").json["trace"]
        assert [one["name"] for one in found] == parts
        assert any("in one tensor with" in words for words in found[0]["relayout"])
    found = dconv("plan", out, "hf", "--trace", "decoder.layers.self_attention.linear_qkv.weight", "--json").json
    assert len(found["trace"]) == 12
    assert [place["file"] for place in found["trace"][0]["source"]] == ["__0_0.distcp", "__1_0.distcp"]
    both = dconv("plan", hf, "hf", "--trace", parts[0], "--trace", "*norm*", "--json").json["trace"]
    assert len(both) == 1 + 2 * 4 + 1
    assert "trace" not in dconv("plan", hf, "hf", "--json").json


def test_house_spelling(dconv: Dconv, tmp_path: Path) -> None:
    hf = model(tmp_path, "llama")
    (tmp_path / "rename.json").write_text('{"backbone.*": "model.*"}')
    for path in hf.glob("*.safetensors*"):
        if path.suffix == ".json":
            path.write_text(path.read_text().replace("model.", "backbone.").replace("backbone.safetensors", "model"))
    weight_map: dict[str, str] = {}
    for path in hf.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header = {name.replace("model.", "backbone.", 1): entry for name, entry in header.items()}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        weight_map |= {name: path.name for name in header if name != "__metadata__"}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    words = ("plan", hf, "megatron", "--rename", tmp_path / "rename.json", "--trace", "backbone.norm.weight")
    (one,) = dconv(*words, "--json").json["trace"]
    assert (one["name"], [place["name"] for place in one["source"]]) == ("model.norm.weight", ["backbone.norm.weight"])
    assert "named    backbone.norm.weight  ->  model.norm.weight" in dconv(*words).out


def test_what_happens_to_values(tmp_path: Path) -> None:
    hf = model(tmp_path, "minicpm")
    (plain,) = api.plan(hf, "hf", trace="*.0.self_attn.o_proj.weight").trace
    assert plain.target[0].ops == ("the same bytes",) and plain.target[0].exact
    (wide,) = api.plan(hf, "hf", dtype="f32", trace="*.0.self_attn.o_proj.weight").trace
    assert wide.target[0].ops == ("bf16 widened to f32, exact",) and wide.target[0].exact
    (folded,) = api.plan(hf, "hf", mup2llama=True, trace="*.0.self_attn.o_proj.weight").trace
    factor = 1.4 / np.sqrt(config_of(families()["minicpm"])["num_hidden_layers"])
    assert folded.target[0].ops[0].startswith(f"bf16 x {factor:.6g} in f64, rounded once to bf16")
    assert not folded.target[0].exact


def test_codes_and_scales(dconv: Dconv, tmp_path: Path) -> None:
    """Of a weight in codes both stored tensors are named, on whichever side it is computed."""
    dense = write_normal(tmp_path / "dense", families()["llama"])
    api.convert(dense, "fp8", tmp_path / "fp8")
    weight = "model.layers.0.mlp.down_proj.weight"
    scale = f"{weight}_scale_inv"
    job = api.plan(tmp_path / "fp8", "megatron", tp=2, trace=scale)
    (one,) = job.trace
    assert one.name == weight
    ((codes, scales),) = (place.inputs for place in one.source)
    with safe_open(tmp_path / "fp8" / codes.file, "pt") as file:  # pyright: ignore[reportGeneralTypeIssues]
        for place, name, dtype in ((codes, weight, "F8_E4M3"), (scales, scale, "F32")):
            assert place.name == name
            found = file.get_slice(name)
            assert (tuple(found.get_shape()), found.get_dtype()) == (place.shape, dtype)
    assert [op.partition(",")[0] for op in one.target[0].ops] == ["f8_e4m3 code x the scale of its 128 x 128 block"]
    for planned in (job, api.plan(dense, "fp8", trace="*"), api.plan(tmp_path / "fp8", "fp8", trace="*")):
        for said in traced(planned):
            assert (counts(said["shape"], said["source"]) == 1).all()
            assert (counts(said["shape"], said["target"]) == 1).all()
            assert all(place["file"] or place["inputs"] for place in said["source"])
    both = api.plan(dense, "fp8", trace=f"{weight}*").trace
    assert {one.name: [place.name for place in one.source[0].stored] for one in both} == {
        weight: [weight],
        scale: [weight],
    }
    shown = dconv("plan", tmp_path / "fp8", "megatron", "--trace", weight).out
    assert shown.index("made of") < shown.index(scale) < shown.index("values   f8_e4m3 code x the scale")


def test_replicas_and_left_out(tmp_path: Path, dconv: Dconv) -> None:
    hf, out = model(tmp_path, "llama"), tmp_path / "m"
    api.convert(hf, "megatron", out, **LAYOUTS["legacy"])
    (norm,) = api.plan(out, "hf", trace="model.norm.weight").trace
    files = {place.file for place in (*norm.source, *norm.replicas)}
    assert files == {f"mp_rank_{tp:02d}_001/model_optim_rng.pt" for tp in (0, 1)}
    (hf / "modeling.py").write_text("")
    (code,) = api.plan(hf, "hf", trace="modeling.py").trace
    assert code.left_out and not code.target
    assert "left out code is never run" in dconv("plan", hf, "hf", "--trace", "modeling.py").out


def test_two_models_in_one(tmp_path: Path) -> None:
    student, teacher = model(tmp_path, "llama"), model(tmp_path, "qwen3_moe")
    job = api.plan(student, "megatron", teacher=teacher, trace="*.model.norm.weight")
    places = [place for one in job.trace for place in one.source]
    assert [place.file.split("/")[0] for place in places] == ["llama", "qwen3_moe"]
    assert {place.name for place in places} == {"model.norm.weight"}


def test_made_up_weights_are_in_no_file(tmp_path: Path) -> None:
    hf = model(tmp_path, "llama")
    (one,) = api.plan(hf, "megatron", fake_weight=True, trace="model.norm.weight").trace
    assert [place.file for place in one.source] == [""]


def test_a_trace_of_nothing(dconv: Dconv, tmp_path: Path) -> None:
    hf = model(tmp_path, "llama")
    ran = dconv("plan", hf, "megatron", "--trace", "gate_proj")
    assert ran.code == 2
    assert "--trace '*gate_proj*'  matches model.layers.{0..3}.mlp.gate_proj.weight" in ran.err
    ran = dconv("plan", hf, "megatron", "--trace", "model.norm.weight", "--trace", "*.mlp.gate_prj.weight")
    assert ran.code == 2
    assert "did you mean model.layers.{0..3}.mlp.gate_proj.weight" in ran.err
    job = api.plan(hf, "megatron")
    assert trace(job.plan, job.request.parallel, ()) == () == job.trace
    with pytest.raises(UsageError):
        trace(job.plan, job.request.parallel, "nothing like it")
