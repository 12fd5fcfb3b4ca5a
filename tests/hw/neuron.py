"""A Llama for FORMAT neuron, and the command that hands it over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dconv.arch import registry
from dconv.cli import main
from tests.models import config_of, write_random


def compiled(model: Path, out: Path, python: Path | None, *options: str, chip: str = "trn2") -> int:
    told = ["--toolchain-python", str(python)] if python else []
    return main(["convert", str(model), "neuron", "--platform", chip, "-o", str(out), "--quiet", *told, *options])


def left(folder: Path) -> set[str]:
    """What a run left, the toolchain aside."""
    return {path.name for path in folder.iterdir()} - {"python", "toolchain"}


def of(family: str, folder: Path, **sizes: Any) -> Path:
    """A model of finite weights, from 2^-7 up to 2."""
    known = registry.by_name(family)
    write_random(folder, known, config_of(known, **sizes))
    return finite(folder)


def finite(folder: Path) -> Path:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    drawn = np.frombuffer(bytes(data[begin:]), "<u2")
    data[begin:] = (drawn & 0x83FF | 0x3C00).tobytes()
    path.write_bytes(data)
    return folder
