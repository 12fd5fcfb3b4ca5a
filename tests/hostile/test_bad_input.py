"""Bad input gets its exit code and an error of one form before the first byte, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dconv.arch.registry import by_name
from dconv.checkpoint.megatron import LATEST
from dconv.errors import Damaged, DconvError, StorageFault
from dconv.launch.__main__ import main
from dconv.launch.progress import Board
from dconv.pipeline import Job, Request, convert, prepare, run
from dconv.sharding.commit import Settings
from dconv.sharding.coords import Parallel
from dconv.sharding.receipt import partial_folder
from tests.models import config_of, tensors, tree_digest, write_random

USAGE, REFUSED, DAMAGED, STORAGE = 2, 3, 4, 5
LABELS = {USAGE: "usage", REFUSED: "refused", DAMAGED: "damaged", STORAGE: "storage"}
CONTAINERS = ("torch_dist", "legacy")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` takes the process's signals over, which pytest needs back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Llama in two files with an index, alone in its directory but for what the test makes."""
    family = by_name("llama")
    return write_random(tmp_path / "work" / "model", family, config_of(family), shard_size=30_000)


def megatron_of(model: Path, container: str, tp: int = 2, pp: int = 2) -> Path:
    """A Megatron copy of a model beside it."""
    out = model.parent / container
    parallel = Parallel(tp=tp, pp=pp, etp=tp)
    convert(Request(model, "megatron", out, parallel=parallel, megatron_format=container, divisor=8))
    return out


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder with size and time."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


class Attempt:
    """Runs the launch module in this process and checks the promise on bad input."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, code: int, *words: str, model: Path, options: str = "megatron", out: Path | None = None) -> str:
        """Convert ``model``; expects exit ``code``, an error in its form with ``words`` in it, and no trace."""
        out = out or model.parent / "out"
        watched = model.parent
        before = listing(watched) if watched.is_dir() else {}
        self._capsys.readouterr()
        got = main([str(model), *options.split(), "-o", str(out)])
        said = self._capsys.readouterr()
        assert got == code, said.err
        check_form(said.err, code)
        for word in words:
            assert word in said.err
        assert (listing(watched) if watched.is_dir() else {}) == before, "something was left behind"
        assert said.out == ""
        return said.err


def check_form(text: str, code: int) -> None:
    """DESIGN's form: what is wrong, then some of where, expected, found, do, and no line for each tensor."""
    first, *rest = text.rstrip("\n").split("\n")
    assert re.fullmatch(rf"{LABELS[code]} \({code}\)  \S.*", first), text
    fields = [match[1] for line in rest if (match := re.match(r"  (where|expected|found|do) +\S", line))]
    assert fields == sorted(set(fields), key=["where", "expected", "found", "do"].index), text
    assert fields, f"an error that helps nobody: {text}"
    assert all(re.match(r"  (where|expected|found|do) |             ", line) for line in rest), text
    assert len(rest) < 16, text
    assert "Traceback" not in text


@pytest.fixture
def attempt(capsys: pytest.CaptureFixture[str]) -> Attempt:
    return Attempt(capsys)


# ---------------------------------------------------------------------------------------------------- HuggingFace


def test_control_the_untouched_model_converts(model: Path) -> None:
    """Without damage the same calls succeed, so that every refusal below is about its damage."""
    assert main([str(model), "megatron", "-o", str(model.parent / "out"), "--tp", "2", "--quiet"]) == 0


def test_missing_shard(model: Path, attempt: Attempt) -> None:
    gone = sorted(model.glob("*.safetensors"))[1]
    gone.unlink()
    attempt(DAMAGED, gone.name, "1 of 3 shards", model=model)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -4000])
def test_truncated_safetensors(model: Path, attempt: Attempt, keep: int) -> None:
    """Cut off in the length, in the header, in the data."""
    shard = sorted(model.glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    attempt(DAMAGED, shard.name, model=model)


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 64), ("vocab_size", 60), ("num_key_value_heads", 4)])
def test_wrong_shape(model: Path, attempt: Attempt, key: str, value: int) -> None:
    """The config says another shape than the tensors have."""
    edit_json(model / "config.json", lambda config: config | {key: value})
    attempt(DAMAGED, "shape", "expected", "found", model=model)


def test_config_with_more_layers_than_there_are(model: Path, attempt: Attempt) -> None:
    edit_json(model / "config.json", lambda config: config | {"num_hidden_layers": 6})
    attempt(DAMAGED, "model.layers.{4..5}", model=model)


@pytest.mark.parametrize("value", [0, -4, "4", None, 4.5, [4], 10**30, True])
def test_nonsense_in_the_config(model: Path, attempt: Attempt, value: object) -> None:
    """A number of layers that is no number of layers: an error in its form, whichever it is."""
    edit_json(model / "config.json", lambda config: config | {"num_hidden_layers": value})
    before = listing(model.parent)
    code = main([str(model), "megatron", "-o", str(model.parent / "out")])
    assert code in (REFUSED, DAMAGED)
    check_form(attempt._capsys.readouterr().err, code)
    assert listing(model.parent) == before


def test_unknown_tensors_are_grouped_and_drop_leaves_them_out(
    model: Path, attempt: Attempt, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with one line for all layers; ``--drop`` works and the receipt says so."""
    add_tensors(model, [f"model.layers.{i}.mlp.surprise.weight" for i in range(4)])
    text = attempt(REFUSED, "model.layers.{0..3}.mlp.surprise.weight", "4 of 43", "--drop", model=model)
    assert text.count("surprise") <= 3  # where, do: not one a tensor
    out = model.parent / "out"
    words = [str(model), "megatron", "-o", str(out), "--drop", "model.layers.*.mlp.surprise.weight", "--json"]
    assert main(words) == 0
    left_out = json.loads((out / "dconv.json").read_text())["left_out"]
    assert {f"model.layers.{i}.mlp.surprise.weight" for i in range(4)} <= left_out.keys()
    assert all("--drop" in left_out[f"model.layers.{i}.mlp.surprise.weight"] for i in range(4))
    assert "model.layers.0.mlp.surprise.weight" in json.loads(capsys.readouterr().out)["left_out"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("megatron --tp 3", "tensor parallel 3"),
        ("megatron --tp 64", "tensor parallel 64"),
        ("megatron --pp 3", "layers"),
        ("megatron --pp 2 --vpp 3", "layers"),
        ("megatron --vpp 2", "pipeline"),
        ("megatron --tp 0", "--tp"),
        ("megatron --pp 2 --first-stage-layers 5", "stage"),
        ("megatron --pp-layout 1|1", "layers"),
        ("megatron --tp 4 --ep 3", "expert"),
        ("gguuf", "gguuf"),
        ("megatron --model-type lama", "llama"),
        ("megatron --drop model.norm.weight --tp 3", "3"),
    ],
)
@pytest.mark.parametrize("container", CONTAINERS)
def test_layout_that_does_not_divide(model: Path, attempt: Attempt, container: str, options: str, word: str) -> None:
    attempt(REFUSED, word, model=model, options=f"{options} --megatron-format {container}")


def test_pipeline_layout_that_contradicts_pp(model: Path, attempt: Attempt) -> None:
    attempt(USAGE, "--pp 3", model=model, options="megatron --pp 3 --pp-layout 2|2")


@pytest.mark.parametrize(
    "name",
    ["../model-00001-of-00002.safetensors", "/etc/passwd", "a\0b", "..\\x", "C:x", "", ".", "..", "a/b", 7, None],
)
def test_weight_map_that_points_outside(model: Path, attempt: Attempt, name: object) -> None:
    """Every file name of an index must be a plain name, whether or not such a file exists."""
    shutil.copy(sorted(model.glob("*.safetensors"))[0], model.parent / "model-00001-of-00002.safetensors")

    def point(index: dict[str, Any]) -> dict[str, Any]:
        return index | {"weight_map": {**index["weight_map"], "model.norm.weight": name}}

    edit_json(model / "model.safetensors.index.json", point)
    attempt(DAMAGED, "model.safetensors.index.json", model=model)


def test_index_that_disagrees_with_the_files(model: Path, attempt: Attempt) -> None:
    def swap(index: dict[str, Any]) -> dict[str, Any]:
        files = sorted(set(index["weight_map"].values()))
        return index | {"weight_map": {**index["weight_map"], "model.embed_tokens.weight": files[-1]}}

    edit_json(model / "model.safetensors.index.json", swap)
    attempt(DAMAGED, "model.embed_tokens.weight", model=model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "\xff", "[" * 100_000])
def test_rubbish_for_an_index(model: Path, attempt: Attempt, text: str) -> None:
    (model / "model.safetensors.index.json").write_text(text, "latin-1")
    attempt(DAMAGED, "model.safetensors.index.json", model=model)


Header = dict[str, Any]


def _entry(header: Header) -> Header:
    return header["model.norm.weight"]


def _set(key: str, value: object) -> Callable[[Header], object]:
    return lambda header: _entry(header).__setitem__(key, value)


def _overlap(header: Header) -> None:
    names = [name for name in header if name != "__metadata__"]
    first, second = header[names[0]]["data_offsets"], header[names[1]]["data_offsets"]
    size = second[1] - second[0]
    header[names[1]]["data_offsets"] = [first[0], first[0] + size]


ATTACKS: dict[str, Callable[[Header], object]] = {
    "overlap": _overlap,
    "offsets that run backwards": lambda h: _entry(h)["data_offsets"].reverse(),
    "offsets past the end": _set("data_offsets", [2**40, 2**40 + 64]),
    "negative offsets": _set("data_offsets", [-64, 0]),
    "offsets that overflow": _set("data_offsets", [2**64 - 32, 2**64 + 32]),
    "a shape that overflows": _set("shape", [2**33, 2**33, 2]),
    "a shape that multiplies to the right size": _set("shape", [-1, -32]),
    "a dtype that nobody knows": _set("dtype", "F7"),
    "a wider dtype": _set("dtype", "F32"),
    "a dtype that is no text": _set("dtype", ["BF16"]),
    "a shape that is no list": _set("shape", 32),
    "a shape of floats": _set("shape", [32.0]),
    "a shape of booleans": _set("shape", [True] * 3),
    "too many axes": _set("shape", [1] * 100 + [32]),
    "an extra key": _set("more", 1),
    "a missing key": lambda h: _entry(h).pop("shape"),
    "an entry that is no object": lambda h: h.__setitem__("model.norm.weight", [1]),
    "a hole between tensors": lambda h: h.pop("model.norm.weight"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_safetensors_header_attacks(model: Path, attempt: Attempt, attack: str) -> None:
    weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    shard = model / weight_map["model.norm.weight"]
    header, body = read_safetensors(shard)
    ATTACKS[attack](header)
    write_safetensors(shard, json.dumps(header).encode(), body)
    attempt(DAMAGED, shard.name, model=model)


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**32, 2**63, 2**64 - 1])
def test_safetensors_header_length(model: Path, attempt: Attempt, length: int) -> None:
    """A length that is a lie is neither allocated nor read."""
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    attempt(DAMAGED, shard.name, "header", model=model)


def test_safetensors_duplicate_key(model: Path, attempt: Attempt) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    header, body = read_safetensors(shard)
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    twice = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"
    write_safetensors(shard, twice.encode(), body)
    attempt(DAMAGED, shard.name, "twice", model=model)


def test_quantised_config(model: Path, attempt: Attempt) -> None:
    edit_json(model / "config.json", lambda config: config | {"quantization_config": {"quant_method": "gptq"}})
    attempt(REFUSED, "quantis", model=model)


@pytest.mark.parametrize(
    ("architecture", "nearest"), [("LlamaForCausalLM2", "llama"), ("Qwen3MoeForCausalLM", "qwen3"), ("", "")]
)
def test_unknown_architecture(model: Path, attempt: Attempt, architecture: str, nearest: str) -> None:
    edit_json(
        model / "config.json",
        lambda config: config | {"architectures": [architecture], "model_type": "mystery"},
    )
    attempt(REFUSED, architecture or "mystery", f"--model-type {nearest}", model=model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "nul\0"])
def test_rubbish_for_a_config(model: Path, attempt: Attempt, text: str) -> None:
    (model / "config.json").write_text(text)
    attempt(DAMAGED, "config.json", model=model)


def test_no_config(model: Path, attempt: Attempt) -> None:
    (model / "config.json").unlink()
    attempt(REFUSED, "--hf-config", model=model)


# -------------------------------------------------------------------------------------------------------- pickles


class Foreign:
    """Unpickling it would make a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._canary),))


def torch_state(model: Path) -> dict[str, object]:
    return {
        name: torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
        for name, (_, shape, data) in tensors(model).items()
    }


def as_bin(model: Path, state: dict[str, object], *, legacy_zip: bool = True) -> None:
    """Make a model a ``pytorch_model.bin`` one."""
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(state, model / "pytorch_model.bin", _use_new_zipfile_serialization=legacy_zip)


def test_the_canary_sings(tmp_path: Path) -> None:
    """Control: unpickling `Foreign` freely does make the file."""
    pickle.loads(pickle.dumps(Foreign(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("key", ["extra", "model.norm.weight"])
def test_foreign_global_in_a_bin(model: Path, attempt: Attempt, tmp_path: Path, key: str) -> None:
    as_bin(model, torch_state(model) | {key: Foreign(tmp_path / "canary")})
    attempt(DAMAGED, "mkdir", "pytorch_model.bin", model=model)
    assert not (tmp_path / "canary").exists()


def test_bin_in_the_old_form(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's form before zip is read or refused in form, never run."""
    canary = model.parent.parent / "canary"
    as_bin(model, torch_state(model) | {"extra": Foreign(canary)}, legacy_zip=False)
    before = listing(model.parent)
    code = main([str(model), "megatron", "-o", str(model.parent / "out")])
    assert code in (REFUSED, DAMAGED)
    check_form(capsys.readouterr().err, code)
    assert listing(model.parent) == before
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 10, 3000, -1, -100])
def test_truncated_bin(model: Path, attempt: Attempt, keep: int) -> None:
    as_bin(model, torch_state(model))
    path = model / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, "pytorch_model.bin", model=model)


@pytest.mark.parametrize("where", ["args", "model", "tensor"])
def test_foreign_global_in_a_legacy_shard(model: Path, attempt: Attempt, tmp_path: Path, where: str) -> None:
    source = megatron_of(model, "legacy")
    path = source / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    tree = torch.load(path, weights_only=False)
    foreign = Foreign(tmp_path / "canary")
    if where == "tensor":
        tree["model"]["decoder.final_layernorm.weight"] = foreign
    else:
        tree[where] = foreign
    torch.save(tree, path)
    attempt(DAMAGED, "mkdir", "mp_rank_01_001", model=source, options="hf")
    assert not (tmp_path / "canary").exists()


def test_foreign_global_in_dcp_metadata(model: Path, attempt: Attempt, tmp_path: Path) -> None:
    source = megatron_of(model, "torch_dist")
    (source / "release" / ".metadata").write_bytes(pickle.dumps({"x": Foreign(tmp_path / "canary")}))
    attempt(DAMAGED, "mkdir", ".metadata", model=source, options="hf")
    assert not (tmp_path / "canary").exists()


# ------------------------------------------------------------------------------------------------------- Megatron


@pytest.mark.parametrize("whole_folder", [True, False])
def test_missing_mp_rank(model: Path, attempt: Attempt, whole_folder: bool) -> None:
    source = megatron_of(model, "legacy")
    gone = source / "release" / "mp_rank_01_000"
    if whole_folder:
        shutil.rmtree(gone)
    else:
        (gone / "model_optim_rng.pt").unlink()
    attempt(DAMAGED, "mp_rank_01_000", "missing", model=source, options="hf")


def test_missing_last_stage(model: Path, attempt: Attempt) -> None:
    """All shards of the last stage gone looks like a smaller layout; the layers do not add up."""
    source = megatron_of(model, "legacy", tp=1, pp=2)
    shutil.rmtree(source / "release" / "mp_rank_00_001")
    attempt(DAMAGED, "model.layers.{2..3}", model=source, options="hf")


@pytest.mark.parametrize("keep", [0, 100, -1, -2000])
def test_truncated_legacy_shard(model: Path, attempt: Attempt, keep: int) -> None:
    source = megatron_of(model, "legacy")
    path = source / "release" / "mp_rank_01_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, "mp_rank_01_000", model=source, options="hf")


def test_missing_distcp(model: Path, attempt: Attempt) -> None:
    source = megatron_of(model, "torch_dist")
    (source / "release" / "__1_0.distcp").unlink()
    attempt(DAMAGED, "__1_0.distcp", "missing", model=source, options="hf")


@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
def test_truncated_distcp(model: Path, attempt: Attempt, keep: int) -> None:
    source = megatron_of(model, "torch_dist")
    path = source / "release" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, "__1_0.distcp", model=source, options="hf")


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -1000])
def test_truncated_metadata(model: Path, attempt: Attempt, keep: int) -> None:
    source = megatron_of(model, "torch_dist")
    path = source / "release" / ".metadata"
    path.write_bytes(path.read_bytes()[:keep])
    attempt(DAMAGED, ".metadata", model=source, options="hf")


def test_missing_metadata(model: Path, attempt: Attempt) -> None:
    source = megatron_of(model, "torch_dist")
    (source / "release" / ".metadata").unlink()
    attempt(DAMAGED, ".metadata", model=source, options="hf")


def test_unfinished_torch_dist(model: Path, attempt: Attempt) -> None:
    """Megatron writes metadata.json last: without it the save was cut off."""
    source = megatron_of(model, "torch_dist")
    (source / "release" / "metadata.json").unlink()
    attempt(DAMAGED, "metadata.json", model=source, options="hf")


@pytest.mark.parametrize("text", ["", "x", "../release", "99", "9" * 400, "-1", "1.5", "release\nx", "٣", "\0", "\xff"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_tracker_with_rubbish(model: Path, attempt: Attempt, container: str, text: str) -> None:
    source = megatron_of(model, container)
    (source / LATEST).write_bytes(text.encode("utf-8", "replace"))
    attempt(DAMAGED, LATEST, model=source, options="hf")


def test_config_of_another_model_inside(model: Path, attempt: Attempt) -> None:
    source = megatron_of(model, "legacy")
    edit_json(source / "huggingface" / "config.json", lambda config: config | {"intermediate_size": 96})
    before = listing(source.parent)
    code = main([str(source), "hf", "-o", str(source.parent / "out")])
    assert code in (REFUSED, DAMAGED)
    check_form(attempt._capsys.readouterr().err, code)
    assert listing(source.parent) == before


# -------------------------------------------------------------------------------------------------- OUT and MODEL


@pytest.mark.parametrize("kind", ["receipt", "folder", "empty folder", "file", "dangling link"])
def test_out_exists(model: Path, attempt: Attempt, kind: str) -> None:
    out = model.parent / "out"
    if kind == "receipt":
        convert(Request(model, "megatron", out))
    elif kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.tex").write_text("mine")
    attempt(USAGE, "exists", "--overwrite", model=model, out=out)
    if kind != "receipt":
        attempt(USAGE, "exists", model=model, out=out, options="megatron --resume")
    if kind in ("folder", "file"):  # nobody's thesis goes, whatever was typed
        attempt(USAGE, "outputs of dconv only", model=model, out=out, options="megatron --overwrite")


def test_finished_output_of_another_plan_is_not_taken_for_this_one(model: Path, attempt: Attempt) -> None:
    out = model.parent / "out"
    convert(Request(model, "megatron", out))
    attempt(USAGE, "exists", model=model, out=out, options="megatron --tp 2 --resume")


def test_finished_output_that_lost_a_file_is_not_taken_for_done(model: Path, attempt: Attempt) -> None:
    out = model.parent / "out"
    convert(Request(model, "megatron", out))
    (out / "release" / "__0_0.distcp").unlink()
    attempt(USAGE, "exists", model=model, out=out, options="megatron --resume")


@pytest.mark.parametrize("where", ["model", "model/.", ".", "model/.."])
def test_output_would_replace_its_source(model: Path, attempt: Attempt, where: str) -> None:
    """Not even ``--overwrite`` removes the source."""
    attempt(USAGE, model=model, out=model.parent / where, options="megatron --overwrite")


@pytest.mark.parametrize("out", ["/", "."])
def test_output_without_a_name(model: Path, attempt: Attempt, out: str) -> None:
    attempt(USAGE, model=model, out=Path(out), options="megatron --overwrite")


def test_no_such_model(tmp_path: Path, attempt: Attempt) -> None:
    attempt(USAGE, "no such checkpoint", model=tmp_path / "nothing")


def test_model_that_is_no_checkpoint(tmp_path: Path, attempt: Attempt) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("hello")
    attempt(REFUSED, "notes.txt", model=tmp_path / "work")
    attempt(REFUSED, "directory", model=tmp_path / "work" / "notes.txt")


def test_output_parent_missing(model: Path, attempt: Attempt) -> None:
    attempt(STORAGE, "mkdir -p", model=model, out=model.parent / "a" / "b" / "out")


def test_output_parent_is_a_file(model: Path, attempt: Attempt) -> None:
    attempt(STORAGE, model=model, out=model / "config.json" / "out")


# -------------------------------------------------------------------------------------------------------- storage


@contextlib.contextmanager
def mounted(size: int, *, read_only: bool = False) -> Iterator[Path]:
    """A file system of ``size`` bytes of its own; skips the test where none may be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"size={size},mode=755" + (",ro" if read_only else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("may not mount a file system here")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_full_disk_is_found_before_the_first_byte(model: Path, attempt: Attempt) -> None:
    with mounted(64 << 10) as small:
        attempt(STORAGE, "not enough room", "nothing was written", "bytes free", model=model, out=small / "out")
        assert list(small.iterdir()) == []


def test_full_disk_as_the_system_reports_it(model: Path, attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a mount."""
    real = os.statvfs(model)
    fields = list(real)
    fields[4] = 2  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(fields))
    attempt(STORAGE, "not enough room", model=model)


def test_read_only_parent(model: Path, attempt: Attempt) -> None:
    with mounted(16 << 20, read_only=True) as folder:
        attempt(STORAGE, "Read-only", model=model, out=folder / "out")


def test_disk_that_fills_up_on_the_way(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file grows: exit 5 with what to do, what is finished is kept, and the next run ends alike."""
    whole = model.parent / "whole"
    convert(Request(model, "megatron", whole))
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    with mounted(2 * size + (1 << 20)) as small:
        filler = small / "filler"
        note = Board.note

        def fill(board: Board, done: int, total: int) -> None:
            note(board, done, total)
            if total > done > total // 3 and not filler.exists():
                journal = board.folder.parent / "journal"
                deadline = time.monotonic() + 20
                while not any(path.stat().st_size for path in journal.iterdir()) and time.monotonic() < deadline:
                    time.sleep(0.01)  # something must be finished for something to be kept
                with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * 4096)

        with monkeypatch.context() as patch:
            patch.setattr(Board, "note", fill)
            assert main([str(model), "megatron", "-o", str(small / "out"), "--max-memory", "64KiB"]) == STORAGE
        text = capsys.readouterr().err
        check_form(text, STORAGE)
        assert "No space left" in text
        assert "--resume" in text
        assert not (small / "out").exists()
        filler.unlink()
        assert main([str(model), "megatron", "-o", str(small / "out"), "--resume"]) == 0
        assert "kept" in capsys.readouterr().out
        assert tree_digest(small / "out") == tree_digest(whole)
        assert [path.name for path in small.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------- the source changes


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def _shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def _replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    os.replace(copy, path)


def _poke(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"x")


@pytest.mark.parametrize("change", [_touch, _grow, _shrink, _replace, _poke, os.unlink])
@pytest.mark.parametrize("when", [0, -1])
def test_source_that_changes_during_the_run(model: Path, change: Callable[[Path], None], when: int) -> None:
    """Damaged, not committed; and since no plan can go on with it, its partial output goes, too."""
    out = model.parent / "out"
    job = prepare(Request(model, "megatron", out))
    victim = sorted(model.glob("*.safetensors"))[when]
    before = {path.name for path in model.parent.iterdir()}
    changed = False

    def progress(done: int, total: int) -> None:
        nonlocal changed
        if done > total // 2 and not changed:
            changed = True
            change(victim)

    with pytest.raises(Damaged) as caught:
        run(job, Settings(progress=progress, max_memory=64 << 10))
    check_form(str(caught.value), DAMAGED)
    assert victim.name in str(caught.value)
    assert {path.name for path in model.parent.iterdir()} == before


def test_source_that_becomes_unreadable_keeps_what_is_finished(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that fails for a while is no change of the source: exit 5, and the run can go on."""
    out = model.parent / "out"
    job = prepare(Request(model, "megatron", out))
    real = os.preadv
    reads = 0

    def flaky(fd: int, buffers: list[Any], offset: int, *rest: Any) -> int:
        nonlocal reads
        reads += 1
        if reads == 20:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", flaky)
        with pytest.raises(StorageFault) as caught:
            run(job, Settings())
    check_form(str(caught.value), STORAGE)
    assert partial_folder(out, job.plan).exists()
    assert run(job, Settings(resume=True)).committed


# ----------------------------------------------------------------------------------------------------------- fuzz


def _targets(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("dconv.json",)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small source of each container."""
    root = tmp_path_factory.mktemp("fuzz")
    family = by_name("qwen2")
    hf = write_random(root / "hf", family, config_of(family, num_hidden_layers=2), shard_size=30_000)
    return {"hf": hf, **{name: megatron_of(hf, name) for name in CONTAINERS}}


@pytest.mark.parametrize("kind", ["hf", *CONTAINERS])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage_is_an_error_of_ours_or_harmless(
    sources: dict[str, Path], kind: str, data: st.DataObject
) -> None:
    """Flipped bytes, cuts, additions in any file: the planning ends, with a plan or with one of our errors."""
    source = sources[kind]
    victims = _targets(source)
    victim = victims[data.draw(st.integers(0, len(victims) - 1), label="file")]
    good, times = victim.read_bytes(), victim.stat()
    # headers are at the front, zip directories at the end
    at = data.draw(st.one_of(st.integers(0, len(good)), st.integers(0, 300), st.integers(len(good) - 300, len(good))))
    at = max(0, min(at, len(good)))
    junk = data.draw(st.binary(max_size=9), label="junk")
    bad = data.draw(
        st.sampled_from([good[:at], good[:at] + junk + good[at:], good[:at] + junk + good[at + len(junk) :]])
    )
    try:
        victim.write_bytes(bad)
        try:
            job: Job | None = prepare(Request(source, "hf" if kind != "hf" else "megatron", source / "out"))
        except DconvError as error:
            check_form(str(error), error.exit_code)
        else:
            assert job is not None
        assert not (source / "out").exists()
    finally:
        victim.write_bytes(good)
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))


# -------------------------------------------------------------------------------------------------------- helpers


def edit_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def read_safetensors(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def add_tensors(model: Path, names: list[str]) -> None:
    """Append small tensors to a model's last file and to its index."""
    shard = sorted(model.glob("*.safetensors"))[-1]
    header, body = read_safetensors(shard)
    for name in names:
        header[name] = {"dtype": "BF16", "shape": [4], "data_offsets": [len(body), len(body) + 8]}
        body += bytes(8)
    write_safetensors(shard, json.dumps(header).encode(), body)
    index = model / "model.safetensors.index.json"
    edit_json(index, lambda old: old | {"weight_map": old["weight_map"] | dict.fromkeys(names, shard.name)})
