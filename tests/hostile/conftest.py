"""The promise on bad input: its exit code, an error of one form before the first byte, and nothing left behind."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dconv.arch.registry import by_name
from dconv.launch.__main__ import main
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.models import config_of, write_random

USAGE, REFUSED, DAMAGED, STORAGE = 2, 3, 4, 5
LABELS = {USAGE: "usage", REFUSED: "refused", DAMAGED: "damaged", STORAGE: "storage"}
CONTAINERS = ("torch_dist", "legacy")
#: The JSON of a safetensors file.
Header = dict[str, Any]


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


def edit_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def read_safetensors(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
