"""compressed-tensors as a source and as an output, against the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.rank import Settings
from tests.quant import compressed

LINEAR = ["Linear"]
FLOAT8 = {"num_bits": 8, "type": "float"}
INT = {"type": "int"}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
#: Formats and strategies by a name, as groups of a config.
SOURCES: dict[str, dict[str, Any]] = {
    "fp8 tensor": {"weights": {**FLOAT8, "strategy": "tensor"}},
    "fp8 channel": {"weights": {**FLOAT8, "strategy": "channel"}},
    "fp8 block": {"weights": {**FLOAT8, "strategy": "block", "block_structure": [128, 128]}},
    "fp8 odd block": {"weights": {**FLOAT8, "strategy": "block", "block_structure": [48, 80]}},
    "fp8 group": {"weights": {**FLOAT8, "strategy": "group", "group_size": 16}},
    "fp8 naive": {"weights": {**FLOAT8, "strategy": "channel"}, "input_activations": None},
    "int8 channel": {"weights": {**INT, "num_bits": 8, "strategy": "channel"}},
    "int8 tensor": {"weights": {**INT, "num_bits": 8, "strategy": "tensor", "symmetric": False}},
    "int8 group": {"weights": {**INT, "num_bits": 8, "strategy": "group", "group_size": 16, "symmetric": False}},
    "int4 in bytes": {"weights": {**INT, "num_bits": 4, "strategy": "group", "group_size": 32}},
    **{
        f"int{bits} packed, {size}, {'' if symmetric else 'a'}symmetric": {
            "weights": {**INT, "num_bits": bits, "symmetric": symmetric, **by},
            "input_activations": None,
        }
        for bits, symmetric in (
            (2, True),
            (3, False),
            (4, True),
            (4, False),
            (5, True),
            (6, False),
            (7, True),
            (8, False),
        )
        for size, by in (
            ("channel", {"strategy": "channel"}),
            ("group", {"strategy": "group", "group_size": 16 if bits % 2 else 32}),
        )
    },
    "int4 packed, tensor": {"weights": {**INT, "num_bits": 4, "strategy": "tensor"}, "input_activations": None},
}
FOR = {"quant_config": "compressed-tensors"}
TOKEN = {**FLOAT8, "strategy": "token", "dynamic": True}


def by_group(size: int) -> dict[str, Any]:
    return {**FLOAT8, "strategy": "group", "group_size": size, "dynamic": True}


MICRO: dict[str, dict[str, Any]] = {
    "mxfp4": {"weights": {**MX, "num_bits": 4}},
    "mxfp6": {"weights": {**MX, "num_bits": 6}},
    "mxfp8": {"weights": {**MX, "num_bits": 8}},
    "nvfp4": {
        "weights": {
            "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        }
    },
}  # fmt: skip
#: FORMAT, options and the group by which compressed-tensors writes the same.
OUTPUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp8 channel": ("fp8", {"quant": "fp8_channel"}, {**SOURCES["fp8 channel"], "input_activations": TOKEN}),
    "fp8 tensor": ("fp8", {"quant": "fp8_tensor", **FOR}, {**SOURCES["fp8 tensor"], "input_activations": TOKEN}),
    "fp8 block": (
        "fp8",
        {"quant": "fp8_block", **FOR},
        {
            **SOURCES["fp8 block"],
            "input_activations": by_group(128),
        },
    ),
    "fp8 odd block": (
        "fp8",
        {"quant": "fp8_block", "block_size": (48, 80), **FOR},
        {
            **SOURCES["fp8 odd block"],
            "input_activations": by_group(80),
        },
    ),
    "mxfp4": ("mx", FOR, MICRO["mxfp4"]),
    "mxfp6": ("mx", {"quant": "mxfp6_e2m3", **FOR}, MICRO["mxfp6"]),
    "mxfp8": (
        "mx",
        {"quant": "mxfp8"},
        {**MICRO["mxfp8"], "input_activations": {**MICRO["mxfp8"]["weights"], "dynamic": True}},
    ),
    "nvfp4": ("mx", {"quant": "nvfp4"}, MICRO["nvfp4"]),
}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit by bit, but for what kind of NaN it is."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        found, bits = ours[name], {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.itemsize]
        assert (found.dtype, found.shape) == (value.dtype, value.shape), name
        same = found.view(bits) == value.view(bits)
        if value.is_floating_point():
            same |= found.float().isnan() & value.float().isnan()
        assert bool(same.all()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", SOURCES)
def test_what_it_writes_is_decoded_as_it_does(tmp_path: Path, source: str, dtype: str) -> None:
    groups = {"group_0": {"targets": LINEAR, "input_activations": TOKEN, **SOURCES[source]}}
    compressed.write(tmp_path / "source", groups, DTYPES[dtype])
    job = prepare(Request(tmp_path / "source", "hf", tmp_path / "out"))
    assert len(job.source.coded) == 14
    run(job, Settings())
    equal(load_file(tmp_path / "out" / "model.safetensors"), compressed.decompressed(tmp_path / "source"))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("source", MICRO)
def test_short_floats_are_decoded_once_rounded(tmp_path: Path, source: str, dtype: str) -> None:
    """It decompresses these to bf16 whatever the model was in, NVFP4 by way of two roundings to fp32."""
    groups = {"group_0": {"targets": LINEAR, **MICRO[source]}}
    compressed.write(tmp_path / "source", groups, DTYPES[dtype])
    convert(Request(tmp_path / "source", "hf", tmp_path / "out", dtype="bf16"))
    theirs = {name: value.bfloat16() for name, value in compressed.decompressed(tmp_path / "source").items()}
    equal(load_file(tmp_path / "out" / "model.safetensors"), theirs)


def both(folder: Path, output: str, dtype: str, family: str = "llama", **sizes: Any) -> None:
    """``source`` coded by compressed-tensors as ``theirs`` and by dconv as ``ours``."""
    format, options, group = OUTPUTS[output]
    groups = {"group_0": {"targets": LINEAR, **group}}
    compressed.write(folder / "theirs", groups, DTYPES[dtype], family, plain=folder / "source", **sizes)
    convert(Request(folder / "source", format, folder / "ours", **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_what_is_written_is_what_it_writes(tmp_path: Path, output: str, dtype: str) -> None:
    """Every code, scale and dtype; and the config means the same modules, as its own classes read it."""
    both(tmp_path, output, dtype)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    if output.startswith("mx") and dtype == "f16":  # fp16 has no scales below 2^-24, and it writes 1 in their stead
        for name in [name for name in expected if name.endswith("_scale")]:
            lost = expected[name] != found[name]
            assert (expected[name][lost] == 127).all() and (found[name][lost] < 127 - 24).all()
            del expected[name], found[name]
            codes = name.removesuffix("_scale")
            codes = codes if codes in expected else f"{codes}_packed"
            for part in (expected, found):
                part[codes] = part[codes].view(torch.uint8).unflatten(-1, (lost.shape[-1], -1))[~lost]
    equal(found, expected)
    ours, theirs = (compressed.config(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.config_groups == theirs.config_groups
    assert (ours.format, ours.quantization_status) == (theirs.format, theirs.quantization_status)
