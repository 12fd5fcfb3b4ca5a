"""A GGUF made of a GGUF: other types, split, merged, with all that it says; against the package gguf."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from dconv.codec.gguf import BLOCKS
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.rank import Settings
from tests.formats.gguf_files import Change, Tensor, in_blocks, recorded, rewrite
from tests.formats.test_gguf_export import llama, only, read, said
from tests.models import tree_digest

#: Bytes of a block that are an fp16 number, of types that the package gguf does not encode.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
          "IQ3_S": (0,), "IQ1_S": (0,)}  # fmt: skip
#: What published files say beside what llama.cpp reads.
MORE: dict[str, Any] = {
    "general.author": "someone", "general.tags": ["a", "b"], "general.quantized_by": "another",
    "quantize.imatrix.file": "m.dat", "quantize.imatrix.entries_count": 7, "mine.flag": True, "mine.numbers": [1.5],
    "mine.ids": [3, -4],
}  # fmt: skip


def any_blocks(kind: str) -> Change:
    """Any codes with scales that are numbers."""
    size, stored = BLOCKS[kind]

    def change(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
        if values.ndim < 2 or values.shape[-1] % size or "norm" in name:
            yield name, values, None
            return
        draw = np.random.default_rng(len(name))
        raw = draw.integers(0, 256, (*values.shape[:-1], values.shape[-1] // size, stored), np.uint8)
        for at in SCALES[kind]:
            scale = draw.uniform(1e-3, 1e-2, raw.shape[:-1]).astype(np.float16)
            raw[..., at : at + 2] = scale[..., None].view(np.uint8)
        yield name, raw.reshape(*values.shape[:-1], -1), GGMLQuantizationType[kind]

    return change


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    convert(Request(llama(folder / "before"), "gguf", folder / "f32", quant="f32"))
    return only(folder / "f32")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_1", "Q5_0", "Q8_0", "MXFP4", "TQ1_0", *SCALES])
@pytest.mark.parametrize("quant", ["q8_0", "q5_1", "f32"])
def test_requantised_of_any_type(tmp_path: Path, plain: Path, kind: str, quant: str) -> None:
    """From the values that the package gguf decodes, rounded once."""
    if kind in SCALES:
        change = any_blocks(kind)
    else:
        size = BLOCKS[kind][0]

        def change(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
            whole = values.ndim > 1 and values.shape[-1] % size == 0
            number = GGMLQuantizationType[kind]
            yield (name, quantize(values, number), number) if whole else (name, values, None)

    before = rewrite(plain, tmp_path / "before.gguf", change)
    convert(Request(before, "gguf", tmp_path / "out", quant=quant))
    found, several = read(only(tmp_path / "out")), 0
    for tensor in GGUFReader(before).tensors:
        if len(tensor.shape) == 1:
            continue
        wanted = "Q8_0" if quant == "q5_1" and tensor.name == "output.weight" else quant.upper()
        raw = tensor.data
        if tensor.tensor_type.name != wanted:
            values = dequantize(tensor.data, tensor.tensor_type)
            raw = quantize(np.ascontiguousarray(values, np.float32), GGMLQuantizationType[wanted])
        assert found[tensor.name] == (wanted, [int(n) for n in tensor.shape], raw.tobytes()), tensor.name
        several += tensor.tensor_type.name == kind
    assert several > 5
    assert len(found) == len(GGUFReader(before).tensors)


@pytest.mark.parametrize("quant", [None, "q4_1"])
def test_split_and_merged(tmp_path: Path, quant: str | None) -> None:
    """In one step with other types, by several ranks, and from any file of the set."""
    before = rewrite(recorded(tmp_path, "qwen3_moe"), tmp_path / "before-Q8_0.gguf", in_blocks("Q8_0"), values=MORE)
    convert(Request(before, "gguf", tmp_path / "whole", quant=quant))
    whole = only(tmp_path / "whole")
    job = prepare(Request(before, "gguf", tmp_path / "parts", quant=quant, shard_size=5_000))
    for rank in range(3):
        run(job, Settings(rank=rank, world=3))
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(parts) > 3
    assert parts[0].name == f"before-{quant.upper() if quant else 'Q8_0'}-00001-of-{len(parts):05d}.gguf"
    held = [read(part) for part in parts]
    assert {name: of for part in held for name, of in part.items()} == read(whole)
    assert [name for part in held for name in part] == list(read(whole))
    first = {key: value for key, value in said(parts[0]).items() if not key.startswith("split.")}
    assert first == said(whole)
    assert all(key.startswith("split.") for part in parts[1:] for key in said(part))

    convert(Request(parts[2], "gguf", tmp_path / "merged"))
    assert only(tmp_path / "merged").read_bytes() == whole.read_bytes()
    convert(Request(parts[1], "gguf", tmp_path / "again", shard_size=5_000))
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "parts")
    convert(Request(parts[0], "gguf", tmp_path / "other", quant="q5_0", shard_size=50_000))
    convert(Request(whole, "gguf", tmp_path / "one", quant="q5_0"))
    joined = {name: of for part in sorted((tmp_path / "other").glob("*.gguf")) for name, of in read(part).items()}
    assert joined == read(only(tmp_path / "one"))


@pytest.mark.parametrize("quant", [None, "q8_0", "q4_0"])
def test_all_that_it_says_is_kept(tmp_path: Path, quant: str | None) -> None:
    """Of keys that are not its architecture's too, with their types; what it is stored as is said anew."""
    before = rewrite(recorded(tmp_path, "llama"), tmp_path / "before.gguf", in_blocks("Q4_1"), values=MORE)
    convert(Request(before, "gguf", tmp_path / "out", quant=quant))
    ours, theirs = said(only(tmp_path / "out")), said(before)
    anew = {"general.file_type", "general.quantization_version"}
    assert set(ours) - anew == set(theirs) - anew
    assert {key: value for key, value in ours.items() if key not in anew} == {
        key: value for key, value in theirs.items() if key not in anew
    }
    assert MORE.keys() < ours.keys()
    if quant:
        assert ours["general.file_type"][1] == {"q8_0": 7, "q4_0": 2}[quant]
