"""safetensors files that are cut off, or whose headers lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.conftest import DAMAGED, Attempt, Header, read_safetensors, write_safetensors


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -4000])
def test_truncated_safetensors(model: Path, attempt: Attempt, keep: int) -> None:
    """Cut off in the length, in the header, in the data."""
    shard = sorted(model.glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    attempt(DAMAGED, shard.name, model=model)


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
