"""Weights that look lost are named, in every kind of container; those of a plain model are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dconv
from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.cli import main
from dconv.errors import UsageError
from dconv.pipeline import describe_model
from dconv.report import implausible
from tests.damage.containers import model
from tests.models import config_of, write_random

PROJ, GATE = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.gate_proj.weight"
NORM, EMBED = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
#: Sizes of which a matrix of an MLP is some pages long, and a row a quarter of one.
SIZES: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 192}
NAN, INFINITY = 0x7FC0, 0xFF80

Change = Callable[[np.ndarray], None]


def fill(value: int, at: Any = ...) -> Change:
    def change(weights: np.ndarray) -> None:
        weights[at] = value

    return change


#: Tensor, what happens to its bf16 bits, and what is said of it.
LOST: Mapping[str, tuple[str, Change, str]] = {
    "zero": (GATE, fill(0), "all zero"),
    "negative zero": (GATE, fill(0x8000), "all zero"),
    "norm": (NORM, fill(0), "all zero"),
    "constant": (GATE, fill(0x3F00), "constant, all 0.5"),
    "constant norm": (NORM, fill(0x3F00), "constant, all 0.5"),
    "nan": (GATE, fill(NAN), "all NaN"),
    "one nan": (GATE, fill(NAN, (3, 5)), "1 NaN of 98,304 values"),
    "infinite": (PROJ, fill(INFINITY, (0, slice(2))), "2 infinite of"),
    "rows": (PROJ, fill(0, slice(2, 4)), "rows 2 to 3 of 512 are zero"),
    "a shard of columns": (PROJ, fill(0, (slice(None), slice(32, 64))), "columns 32 to 63 of 64 are zero"),
    "rows of an embedding": (EMBED, fill(0, slice(2, 4)), "rows 2 to 3 of 61 are zero"),
}
#: What a training does leave behind.
PLAUSIBLE: Mapping[str, tuple[str, Change]] = {
    "a norm of ones": (NORM, fill(0x3F80)),
    "padding of a vocabulary": (EMBED, fill(0, slice(50, None))),
    "a row": (GATE, fill(0, 7)),
    "zeros here and there": (GATE, fill(0, (slice(None, None, 3), slice(None, None, 2)))),
}


def altered(folder: Path, name: str, change: Change) -> Path:
    """A model with another tensor in it."""
    model(folder, 0, **SIZES)
    path = folder / "model.safetensors"
    stored = safetensors.read_header(path)[name]
    data = bytearray(path.read_bytes())
    count = int(np.prod(stored.spec.shape))
    weights = np.frombuffer(data, "<u2", count, stored.extents[0].offset).reshape(stored.spec.shape)
    change(weights)
    path.write_bytes(data)
    return folder


def as_container(plain: Path, container: str, out: Path) -> Path:
    """Written by dconv, so that its digests are right and only its values are not."""
    options = {"tp": 2, "pp": 2} if container == "megatron" else {}
    return plain if container == "hf" else (dconv.convert(plain, container, out, **options), out)[1]


@pytest.mark.parametrize("container", ["hf", "megatron", "gguf"])
def test_a_plain_model_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], container: str) -> None:
    path = as_container(model(tmp_path / "model", 0, **SIZES), container, tmp_path / "out")
    assert main(["check", str(path), "--no-run", "--strict"]) == 0
    assert "implausible  none of 21 tensors\n" in capsys.readouterr().out


@pytest.mark.parametrize("container", ["hf", "megatron", "gguf"])
@pytest.mark.parametrize("lost", LOST)
def test_what_is_lost_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], container: str, lost: str) -> None:
    name, change, why = LOST[lost]
    path = as_container(altered(tmp_path / "model", name, change), container, tmp_path / "out")
    found = dconv.check(path, run=False).implausible
    assert found is not None
    (one,) = found.found
    assert one.name == name
    assert one.why.startswith(why)
    assert main(["check", str(path), "--no-run"]) == 0
    assert f"implausible  1 of 21 tensors\n             {one.why}: {name}\n" in capsys.readouterr().out
    assert main(["check", str(path), "--no-run", "--strict"]) == 4
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("fine", PLAUSIBLE)
def test_what_is_plausible_is_not(tmp_path: Path, fine: str) -> None:
    path = altered(tmp_path / "model", *PLAUSIBLE[fine])
    found = dconv.inspect(path, lint=True).implausible
    assert found is not None
    assert found.found == ()


@pytest.mark.parametrize("container", ["hf", "megatron", "gguf"])
@pytest.mark.parametrize("shift", [0, 17])
def test_a_page_of_a_file_is_named(tmp_path: Path, container: str, shift: int) -> None:
    """Where the file system has it, whatever the rows are; not just anywhere, since zeros may lie together."""
    path = as_container(
        model(tmp_path / "model", 0, hidden_size=512, intermediate_size=4000), container, tmp_path / "o"
    )
    described = describe_model(path)
    piece = described.logical.pieces["model.layers.1.mlp.down_proj.weight"][0]
    file = described.source.root / piece.file
    data = bytearray(file.read_bytes())
    begin = -(-(piece.offset + 5000) // 4096) * 4096 + shift
    data[begin : begin + 4096 - shift] = bytes(4096 - shift)
    file.write_bytes(data)
    found = implausible.of_model(describe_model(path))
    if shift:
        assert found.found == ()
    else:
        (one,) = found.found
        assert one.name == "model.layers.1.mlp.down_proj.weight"
        assert one.why == f"a page of zeros at byte {begin:,} of {piece.file}"


def test_a_page_goes_on_from_tile_to_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model(tmp_path / "model", 0, **SIZES)
    stored = safetensors.read_header(path / "model.safetensors")[GATE]
    data = bytearray((path / "model.safetensors").read_bytes())
    begin = -(-stored.extents[0].offset // 4096) * 4096 + 8 * 4096
    data[begin : begin + 4096] = bytes(4096)
    (path / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(implausible, "_OFTEN", 1.0)  # rows aside
    for tile in (1 << 11, 3000, 1 << 20):
        monkeypatch.setattr(implausible, "_TILE_BYTES", tile)
        (one,) = implausible.of_model(describe_model(path)).found
        assert (one.name, one.why) == (GATE, f"a page of zeros at byte {begin:,} of model.safetensors")


def test_codes_are_looked_at_as_values(tmp_path: Path) -> None:
    """Scales that are lost, and zeros that become codes of zero."""
    name, change, why = LOST["rows"]
    for format, quant in (("fp8", None), ("mx", "nvfp4"), ("gguf", "q8_0"), ("mlx", "4bit")):
        plain = tmp_path / f"{format}-model"
        out = tmp_path / format
        dconv.convert(altered(plain, name, change), format, out, quant=quant)
        found = dconv.check(out, run=False).implausible
        assert found is not None
        assert [(one.name, one.why) for one in found.found] == [(name, why)], format
    path = tmp_path / "fp8" / "model.safetensors"
    data = bytearray(path.read_bytes())
    scale = safetensors.read_header(path)["model.layers.0.mlp.up_proj.weight_scale_inv"].extents[0].offset
    data[scale : scale + 4] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    found = implausible.of_model(describe_model(tmp_path / "fp8"))
    assert {"model.layers.0.mlp.up_proj.weight", name} == {one.name for one in found.found}


def test_norms_around_zero_may_be_zero(tmp_path: Path) -> None:
    for family, lost in (("gemma", False), ("llama", True)):
        config = config_of(by_name(family))
        path = write_random(tmp_path / family, by_name(family), config)
        file = path / "model.safetensors"
        data, header = bytearray(file.read_bytes()), safetensors.read_header(file)
        for name, stored in header.items():
            begin = stored.extents[0].offset
            bits = np.frombuffer(data, "<u2", stored.spec.nbytes // 2, begin)
            bits[:] = 0 if "norm" in name else (bits & 0x807F) | 0x3C00
        file.write_bytes(data)
        found = implausible.of_model(describe_model(path))
        assert {one.name for one in found.found} == {name for name in header if lost and "norm" in name}
        assert all(one.why == "all zero" for one in found.found)


def test_a_bias_of_zeros_is_plausible(tmp_path: Path) -> None:
    family = by_name("qwen2")
    path = write_random(tmp_path / "model", family, config_of(family))
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    for name, stored in safetensors.read_header(file).items():
        bits = np.frombuffer(data, "<u2", stored.spec.nbytes // 2, stored.extents[0].offset)
        bits[:] = 0 if name.endswith("bias") else (bits & 0x807F) | 0x3C00
    file.write_bytes(data)
    assert implausible.of_model(describe_model(path)).found == ()


@pytest.mark.parametrize("container", ["hf", "megatron", "gguf"])
def test_each_byte_is_read_once(tmp_path: Path, container: str) -> None:
    path = as_container(model(tmp_path / "model", 0, **SIZES), container, tmp_path / "out")
    described = describe_model(path)
    read: list[tuple[str, int, int]] = []
    implausible.of_model(described, lambda *what: read.append(what))
    assert sum(count for *_, count in read) == sum(spec.nbytes for spec in described.logical.specs.values())
    ends: dict[str, int] = {}
    for file, offset, count in sorted(read):
        assert offset >= ends.get(file, 0)
        ends[file] = offset + count


def test_said_in_json_and_by_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(altered(tmp_path / "model", *LOST["zero"][:2]))
    assert main(["check", path, "--no-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["implausible"] == {
        "tensors": 21,
        "found": [{"name": GATE, "why": "all zero"}],
    }
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["implausible"] is None
    assert main(["inspect", path, "--lint"]) == 0
    assert f"implausible  1 of 21 tensors\n             all zero: {GATE}\n" in capsys.readouterr().out


def test_it_is_left_out_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are still compared; and what is not looked for cannot be damage."""
    path = altered(tmp_path / "model", *LOST["zero"][:2])
    out = tmp_path / "out"
    dconv.convert(path, "hf", out)
    assert main(["check", str(out), "--no-run", "--no-lint"]) == 0
    said = capsys.readouterr().out
    assert "implausible" not in said and "are as dconv wrote them" in said
    assert main(["check", str(out), "--no-lint", "--strict"]) == 2
    with pytest.raises(UsageError):
        dconv.check(out, strict=True, lint=False)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert main(["check", str(out), "--no-run", "--no-lint"]) == 4
