"""The small print of an output: what loaders, the way back and a person who reads the receipt rely on, item by item."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is the judge of Megatron's files")

import dconv  # noqa: E402
from dconv.arch.registry import by_name  # noqa: E402
from dconv.checkpoint import dcp, safetensors, torch_dist  # noqa: E402
from dconv.checkpoint.source import expected_specs  # noqa: E402
from dconv.errors import Damaged, Refused  # noqa: E402
from dconv.pipeline import Request, convert, prepare, run  # noqa: E402
from dconv.sharding.coords import Parallel  # noqa: E402
from dconv.sharding.dtypes import ITEMSIZE, TO_SAFETENSORS, TO_TORCH  # noqa: E402
from dconv.sharding.rank import Settings  # noqa: E402
from dconv.sharding.tensor import TensorSpec  # noqa: E402
from tests.models import config_of, tensors, write_random  # noqa: E402

LLAMA = by_name("llama")
CONTAINERS = ("legacy", "torch_dist")
TP2_PP2 = Parallel(tp=2, pp=2, etp=2)
FILE = "model_optim_rng.pt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random(tmp_path / "model", LLAMA, config_of(LLAMA), shard_size=20_000)


def megatron(model: Path, container: str, parallel: Parallel = TP2_PP2, **options: Any) -> Path:
    out = model.parent / container
    convert(Request(model, "megatron", out, parallel=parallel, megatron_format=container, divisor=8, **options))
    return out


def back(made: Path) -> Path:
    out = made.parent / f"{made.name}-back"
    convert(Request(made, "hf", out))
    return out


def loaded(path: Path) -> Any:
    """What torch makes of a file without trusting it."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def trees(made: Path) -> list[dict[str, Any]]:
    """Every tree in which Megatron looks for args, iteration and version."""
    found = [loaded(path) for path in sorted(made.glob(f"release/*/{FILE}"))]
    if found:
        return found
    place = dcp.read_metadata(made / "release").objects["common_state/shard_0_1"]
    data = (made / "release" / place[0]).read_bytes()[place[1] : place[1] + place[2]]
    copy = made.parent / "common_state.pt"
    copy.write_bytes(data)
    common = loaded(made / "release" / "common.pt")
    assert loaded(copy) == [common]
    return [common]


def receipt(out: Path) -> dict[str, Any]:
    return json.loads((out / "dconv.json").read_text())


# ------------------------------------------------------------------------------------------------------------ Megatron


@pytest.mark.parametrize("container", CONTAINERS)
def test_version_and_iteration(model: Path, container: str) -> None:
    made = megatron(model, container)
    assert (made / "latest_checkpointed_iteration.txt").read_text() == "release"
    found = trees(made)
    assert len(found) == (4 if container == "legacy" else 1)
    for tree in found:
        assert tree["checkpoint_version"] == 3.0
        assert tree["iteration"] == 0
        assert (tree["args"].iteration, tree["args"].consumed_train_samples) == (0, 0)
        assert (tree["args"].no_save_optim, tree["args"].no_save_rng) == (True, True)


LEGACY_STATES = ["self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"]
DIST_STATES = [*LEGACY_STATES, "self_attention.core_attention", "self_attention.q_layernorm",
               "self_attention.k_layernorm", "input_layernorm", "pre_mlp_layernorm"]  # fmt: skip


@pytest.mark.parametrize("vpp", [1, 2])
def test_extra_states_of_legacy(model: Path, vpp: int) -> None:
    made = megatron(model, "legacy", Parallel(tp=2, pp=2, vpp=vpp, etp=2))
    for path in made.glob(f"release/*/{FILE}"):
        tree = loaded(path)
        chunks = ["model"] if vpp == 1 else ["model0", "model1"]
        assert {key for key in tree if key.startswith("model")} == set(chunks)
        for chunk in chunks:
            wanted = {f"decoder.layers.{i}.{name}._extra_state" for i in range(2 // vpp) for name in LEGACY_STATES}
            if path.parent.name.endswith("_001") and chunk == chunks[-1]:
                wanted.add("output_layer._extra_state")
            states = {name: value for name, value in tree[chunk].items() if "_extra_state" in name}
            assert states.keys() == wanted
            assert set(states.values()) == {None}


def test_extra_states_of_torch_dist(model: Path) -> None:
    made = megatron(model, "torch_dist")
    wanted = {f"decoder.layers.{name}._extra_state/shard_{i}_4" for i in range(4) for name in DIST_STATES}
    wanted |= {f"{name}._extra_state/shard_0_1" for name in ("decoder.final_layernorm", "output_layer")}
    found = dcp.read_metadata(made / "release")
    assert found.objects.keys() == wanted | {"common_state/shard_0_1"}
    assert not any("_extra_state" in key for key in found.tensors)
    # a small shard is one file, and the objects have one of their own
    assert sorted(path.name for path in (made / "release").glob("*.distcp")) == [f"__{i}_0.distcp" for i in range(5)]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("parallel", "ends", "counted"),
    [
        (Parallel(pp=2, first=1, last=3), (1, 3), (False, False)),
        (Parallel(pp=3, first=2), (2, None), (False, False)),
        (Parallel(pp=3, last=2), (None, 2), (False, False)),
        (Parallel(pp=3, count_embedding=True, count_loss=True), (None, None), (True, True)),
        (Parallel(tp=2, pp=2, etp=2), (None, None), (False, False)),
    ],
    ids=["first and last", "first", "last", "counted", "even"],
)
def test_args_say_how_the_pipeline_was_divided(
    model: Path, container: str, parallel: Parallel, ends: tuple[int | None, ...], counted: tuple[bool, ...]
) -> None:
    made = megatron(model, container, parallel)
    for tree in trees(made):
        args = tree["args"]
        assert (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers) == ends
        assert (args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split) == counted
        assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (parallel.tp, parallel.pp)
        assert args.pipeline_model_parallel_layout is None
    assert tensors(back(made)) == tensors(model)


def test_files_of_a_large_shard(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's tensors go to several files of about one size once there are enough of them."""
    monkeypatch.setattr(torch_dist, "_SPLIT_FROM", 10_000)
    monkeypatch.setattr(torch_dist, "_FILE_BYTES", 6_000)
    made = model.parent / "torch_dist"
    job = prepare(Request(model, "megatron", made, parallel=TP2_PP2, divisor=8))
    for rank in range(4):
        run(job, Settings(rank=rank, world=4))
    for rank in range(4):
        files = sorted((made / "release").glob(f"__{rank}_*.distcp"))
        assert [path.name for path in files] == [f"__{rank}_{i}.distcp" for i in range(len(files))]
        assert len(files) > 2
    held: dict[str, int] = {}
    for tensor in job.plan.target.tensors:
        held[tensor.file] = held.get(tensor.file, 0) + tensor.spec.nbytes
    assert max(held.values()) <= 2 * 6_000
    assert tensors(back(made)) == tensors(model)


def test_metadata_of_another_dtype_is_damaged(model: Path) -> None:
    made = megatron(model, "torch_dist")
    path = made / "release" / ".metadata"
    found = dcp.read_metadata(path)
    lies = {name: replace(tensor, dtype="f16") for name, tensor in found.tensors.items()}
    path.write_bytes(dcp.dump_metadata(lies, found.objects))
    with pytest.raises(Damaged, match=r"not what \.metadata says") as caught:
        back(made)
    assert (caught.value.expected[:3], caught.value.found[:4]) == ("f16", "bf16")
    path.write_bytes(dcp.dump_metadata(found.tensors, found.objects))
    assert tensors(back(made)) == tensors(model)


# --------------------------------------------------------------------------------------------------------- safetensors


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begin, and the header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return 8 + length, json.loads(data[8 : 8 + length])


def test_safetensors_headers_and_index(model: Path) -> None:
    out = model.parent / "out"
    convert(Request(model, "hf", out, shard_size=20_000))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    placed: dict[str, str] = {}
    for name in files:
        start, said = header(out / name)
        assert start % 64 == 0
        assert said.pop("__metadata__") == {"format": "pt"}
        placed |= dict.fromkeys(said, name)
        assert sum(b - a for a, b in (entry["data_offsets"] for entry in said.values())) <= 20_000
    assert index["weight_map"] == placed
    assert index["metadata"] == {"total_size": sum(len(data) for _, _, data in tensors(model).values())}


def test_one_file_has_no_index(model: Path) -> None:
    out = model.parent / "out"
    convert(Request(model, "hf", out))
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_dtype_names_are_safetensors_own(tmp_path: Path, dtype: str) -> None:
    """Both ways: its name for what torch calls so, and a file of ours read by it."""
    library = pytest.importorskip("safetensors.torch")
    bits = torch.arange(3 * ITEMSIZE[dtype], dtype=torch.uint8) % (2 if dtype == "bool" else 255)
    value = bits.view(getattr(torch, TO_TORCH[dtype]))
    library.save_file({"x": value}, tmp_path / "theirs")
    said = header(tmp_path / "theirs")[1]["x"]["dtype"]
    assert TO_SAFETENSORS[dtype] == said
    assert safetensors.read_header(tmp_path / "theirs")["x"].spec.dtype == dtype
    _, first, _ = safetensors.lay_out([TensorSpec("x", (3,), dtype)])
    (tmp_path / "ours").write_bytes(first + bits.numpy().tobytes())
    found = library.load_file(tmp_path / "ours")["x"]
    assert found.dtype == value.dtype
    assert torch.equal(found.view(torch.uint8), bits)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_dtypes_that_the_library_knows_and_dconv_does_not(tmp_path: Path, dtype: str) -> None:
    """The file is whole, so that it is refused, and not called damaged; a name of nobody's is damage."""
    library = pytest.importorskip("safetensors")
    length = 8 * {"F4": 4, "F6": 6, "F8": 8}[dtype[:2]] // 8

    def written(name: str, count: int = 8) -> Path:
        said = json.dumps({"x": {"dtype": name, "shape": [count], "data_offsets": [0, length]}}).encode()
        (tmp_path / name).write_bytes(len(said).to_bytes(8, "little") + said + bytes(length))
        return tmp_path / name

    assert library.deserialize(written(dtype).read_bytes())[0][1]["dtype"] == dtype
    with pytest.raises(Refused, match="does not read") as caught:
        safetensors.read_header(written(dtype))
    assert dtype in str(caught.value)
    with pytest.raises(Damaged):
        safetensors.read_header(written(f"{dtype}X"))
    with pytest.raises(Damaged):
        safetensors.read_header(written(dtype, 7))  # what it holds and what it says differ


# ---------------------------------------------------------------------------------------------- what travels, what not


@pytest.mark.parametrize("container", CONTAINERS)
def test_side_files_travel_and_code_does_not(model: Path, container: str) -> None:
    side = {"merges.txt": b"#version\na b\n", "vocab.json": b'{"a": 0}', "chat_template.jinja": b"{{ x }}\r\n",
            "special_tokens_map.json": b"{}", "tokenizer.model": bytes(range(256)), "generation_config.json": b"{ }",
            "added_tokens.json": b"[]", "LICENSE": b"\xff"}  # fmt: skip
    code = ["modeling_x.py", "tokenizer_x.py", "chat_template.py", "vocab.py"]
    other = ["training_args.json", "notes.txt"]
    for name, data in side.items():
        (model / name).write_bytes(data)
    for name in code + other:
        (model / name).write_text("raise SystemExit")
    made = megatron(model, container)
    assert receipt(made)["left_out"] == dict.fromkeys(sorted(code), "code is never run nor copied")
    there = {path.name: path.read_bytes() for path in back(made).iterdir()}
    travelled = {**side, "config.json": (model / "config.json").read_bytes(), "tokenizer.json": b'{"version": "1.0"}'}
    assert {name: data for name, data in there.items() if name in travelled} == travelled
    assert there.keys() == {*travelled, "model.safetensors", "dconv.json"}
    assert not list(made.rglob("*.py"))


@pytest.mark.parametrize("format", ["hf", "megatron"])
def test_rotary_frequencies_are_left_out_by_name(model: Path, format: str) -> None:
    """Llama 2 as Meta and transformers of 2023 stored it."""
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    specs = list(expected_specs(LLAMA, LLAMA.config.facts(config_of(LLAMA))).values())
    expected = tensors(model)
    size, first, _ = safetensors.lay_out([*specs, *(TensorSpec(name, (4,), "f32") for name in names)])
    body = b"".join(expected[spec.name][2] for spec in specs) + np.ones(16, "<f4").tobytes()
    assert len(first + body) == size
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "model.safetensors").write_bytes(first + body)
    out = model.parent / "out"
    convert(Request(model, format, out))
    assert receipt(out)["left_out"] == dict.fromkeys(names, "recomputed from the config")
    assert tensors(out if format == "hf" else back(out)) == expected


def with_legacy_state(made: Path) -> None:
    for path in made.glob(f"release/*/{FILE}"):
        tree = torch.load(path, weights_only=False)  # our own file
        tree |= {"optimizer": {"exp_avg": torch.ones(3)}, "rng_state": [{"torch": torch.get_rng_state()}]}
        tree |= {"opt_param_scheduler": {"lr": 0.1}, "rerun_state_machine": {"mode": "x"}}
        torch.save(tree, path)


def with_dist_state(made: Path) -> None:
    found = dcp.read_metadata(made / "release")
    chunk = dcp.DcpChunk((0,), (3,), "__9_9.distcp", 0, 10)  # never looked at
    more = {
        f"{key}.exp_avg": dcp.DcpTensor("f32", (3,), (chunk,)) for key in ("optimizer.state", "chained_0.optimizer")
    }
    objects = {**found.objects, "rng_state/shard_0_1": next(iter(found.objects.values()))}
    (made / "release" / ".metadata").write_bytes(dcp.dump_metadata({**found.tensors, **more}, objects))


@pytest.mark.parametrize(
    ("container", "add", "names"),
    [
        ("legacy", with_legacy_state, {"optimizer", "rng_state", "opt_param_scheduler", "rerun_state_machine"}),
        ("torch_dist", with_dist_state, {"optimizer", "rng_state"}),
    ],
)
def test_training_state_is_left_out_by_name(
    model: Path, container: str, add: Callable[[Path], None], names: set[str]
) -> None:
    made = megatron(model, container)
    add(made)
    out = back(made)
    said = receipt(out)["left_out"]
    assert names <= said.keys()
    assert all("not weights" in said[name] for name in names)
    assert tensors(out) == tensors(model)


def test_the_receipt_says_what_was_made_of_what(model: Path) -> None:
    made = megatron(model, "legacy")
    for out, source, format, files in (
        (made, model, ("huggingface", "megatron"), sorted(model.glob("*.safetensors"))),
        (back(made), made, ("megatron legacy", "hf"), sorted((made / "release").glob(f"*/{FILE}"))),
    ):
        said = receipt(out)
        root = files[0].parent if source is model else made / "release"
        assert said["dconv"] == dconv.__version__
        assert said["source"] == {"path": str(source), "format": format[0]}
        assert said["target"] == {"format": format[1], "family": "llama"}
        assert said["source_files"] == {path.relative_to(root).as_posix(): path.stat().st_size for path in files}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_another_dtype_is_said_everywhere(model: Path, key: str) -> None:
    config = config_of(LLAMA)
    config[key] = config.pop("torch_dtype")
    (model / "config.json").write_text(json.dumps(config))
    convert(Request(model, "hf", model.parent / "hf", dtype="f32"))
    assert json.loads((model.parent / "hf" / "config.json").read_text()) == {**config, key: "float32"}
    assert {dtype for dtype, _, _ in tensors(model.parent / "hf").values()} == {"F32"}
    for container in CONTAINERS:
        made = megatron(model, container, dtype="f32")
        assert json.loads((made / "huggingface" / "config.json").read_text()) == {**config, key: "float32"}
        for tree in trees(made):
            args = tree["args"]
            assert (args.params_dtype, args.bf16, args.fp16) == (torch.float32, False, False)
