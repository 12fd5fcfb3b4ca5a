"""The command line, called in this process, and small checkpoints of every format to call it on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dconv.arch.llama import LLAMA
from dconv.cli import main
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.models import config_of, write_random

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Dconv = Callable[..., Ran]


@pytest.fixture
def dconv(capsys: pytest.CaptureFixture[str]) -> Iterator[Dconv]:
    """``dconv("convert", path, …)`` as a call; the signal handlers that a rank sets are put back afterwards."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A sharded HuggingFace directory of random bits."""
    return write_random(tmp_path / "model", LLAMA, config_of(LLAMA), shard_size=20_000)


@pytest.fixture
def made(tmp_path: Path, hf: Path) -> Callable[[str], Path]:
    """The same model, made by dconv in the named format (``hf``, ``legacy``, ``torch_dist``)."""
    requests = {
        "hf": {"format": "hf", "shard_size": 20_000},
        "legacy": {"format": "megatron", "megatron_format": "legacy", "parallel": Parallel(tp=2, pp=2, vpp=2, etp=2)},
        "torch_dist": {"format": "megatron", "parallel": Parallel(tp=2, pp=2, etp=2)},
    }

    def make(name: str) -> Path:
        out = tmp_path / f"made-{name}"
        convert(Request(hf, out=out, **requests[name]))
        return out

    return make


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Damage one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def listing(folder: Path) -> list[str]:
    """Everything below a directory."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
