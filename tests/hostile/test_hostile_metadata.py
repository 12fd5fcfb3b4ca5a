"""Small files that ask for much: no crash, no hang, no memory without bound, and an error of ours."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.checkpoint import inert, run_config
from dconv.errors import Damaged, group_names
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.region import Region, first_overlap
from tests.models import config_of, write_random

LLAMA = by_name("llama")
#: Address space and seconds of a child that reads a hostile file; an honest one takes a tenth.
LIMITS = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))"
PATIENCE = 60


def read_in_child(data: bytes, tmp_path: Path) -> str:
    """What a child of its own says of a pickle: the interpreter itself may be what breaks."""
    (tmp_path / "data.pkl").write_bytes(data)
    code = f"""{LIMITS}
from dconv.checkpoint import inert
from dconv.errors import Damaged
try:
    inert.load(open({str(tmp_path / "data.pkl")!r}, "rb").read(), where="test")
except Damaged as error:
    print("damaged", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


HEAD = b"\x80\x04"
PICKLES = {
    "nested tuples as a name": HEAD + b"N" + b"\x85" * 1_000_000 + b"\x8c\x01x\x93.",
    "doubled tuples as a name": HEAD + b"N" + b"\x94h\x00\x86" * 60 + b"\x8c\x01x\x93.",
    "a number of a megabyte": HEAD + b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\x01" * (1 << 20) + b".",
    "keys that collide": HEAD
    + b"}("
    + b"".join(b"\x8a\x14" + (i * ((1 << 61) - 1)).to_bytes(20, "little") + b"N" for i in range(1, 20_000))
    + b"u.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_would_break_the_interpreter(tmp_path: Path, name: str) -> None:
    assert read_in_child(PICKLES[name], tmp_path).startswith("damaged")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    source = write_random(tmp_path / "model", LLAMA, config_of(LLAMA))
    convert(Request(source, "megatron", tmp_path / "made"))
    return tmp_path / "made" / "release"


def test_a_chunk_list_that_repeats_itself(made: Path, tmp_path: Path) -> None:
    class Fake:
        def __init__(self, **fields: object) -> None:
            self.__dict__.update(fields)

    def named(name: str, module: str = "torch.distributed.checkpoint.metadata") -> type[Fake]:
        kind = type(name, (Fake,), {"__module__": module})
        kind.__qualname__ = name
        return kind

    modules = {"torch.distributed.checkpoint.metadata": ["Metadata", "MetadataIndex", "TensorStorageMetadata",
                                                         "ChunkStorageMetadata", "TensorProperties"],
               "torch.distributed.checkpoint.filesystem": ["_StorageInfo"]}  # fmt: skip
    kinds = {name: named(name, module) for module, names in modules.items() for name in names}
    real = {module: sys.modules.get(module) for module in modules}
    for module in modules:
        sys.modules[module] = type(sys)(module)
        sys.modules[module].__dict__.update(kinds)
    try:
        chunk = kinds["ChunkStorageMetadata"](offsets=(0,), sizes=(1,))
        properties = kinds["TensorProperties"](dtype=inert)  # replaced below: a module cannot be pickled
        properties.__dict__["dtype"] = None
        tensor = kinds["TensorStorageMetadata"](properties=properties, size=(1,), chunks=[chunk] * 10_000)
        entries = {f"k{i}": tensor for i in range(2000)}
        places = {}
        for name in entries:
            index = kinds["MetadataIndex"](fqn=name, offset=(0,), index=0)
            places[index] = kinds["_StorageInfo"](relative_path="f", offset=0, length=1)
        data = pickle.dumps(kinds["Metadata"](state_dict_metadata=entries, storage_data=places), 4)
    finally:
        for module, was in real.items():
            if was is None:
                del sys.modules[module]
            else:
                sys.modules[module] = was
    dtype = b"\x8c\x05dtype\x94N"
    assert data.count(dtype) == 1
    (made / ".metadata").write_bytes(data.replace(dtype, b"\x8c\x05dtype\x94\x8c\x05torch\x8c\x08bfloat16\x93"))
    with pytest.raises(Damaged, match="two chunks at one place"):
        prepare(Request(made, "hf", tmp_path / "out"))


BOMB = "a: &a [1]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))
YAML = {
    "aliases": BOMB + "model: *y\n",
    "aliases as a target": BOMB + "model: {_target_: x, activation_func: {_target_: *y}}\n",
    "merges": "a: &a {x: 1}\n" + "b: {<<: *a}\nmodel: {}\n",
    "brackets": "[" * 3000,
    "size": "model: {}\n" + "#" * (5 << 20),
}


@pytest.mark.parametrize("name", YAML)
def test_run_configs_that_expand(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(YAML[name])
    with pytest.raises(Damaged):
        run_config.read_args(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "latest_checkpointed_iteration.txt", "config.json"])
def test_a_pipe_that_nobody_writes_to(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if name != "config.json":
        (folder / "config.json").write_text("{}")
    os.mkfifo(folder / name)
    with pytest.raises(Damaged, match="regular file"):
        prepare(Request(folder, "hf", tmp_path / "out", model_type="llama"))


@pytest.mark.parametrize("names", [["a" + "7" * 5000, "a" + "8" * 5000], ["a\0", "a1"], ["a\0001", "b2"]])
def test_names_of_any_kind_are_grouped(names: list[str]) -> None:
    assert group_names(names)


def test_overlaps_of_many_columns_are_found_soon() -> None:
    columns = [Region((0, i), (8, 1)) for i in range(20_000)]
    assert first_overlap(columns) is None
    assert first_overlap([*columns, Region((7, 19_999), (1, 1))]) == (19_999, 20_000)
