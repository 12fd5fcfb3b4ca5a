"""Which tensor is of which type in llama-quantize's mixes, against what it made of models of the same shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from dconv.arch.gguf_mixes import MIXES, types
from dconv.cli import main as cli
from dconv.codec import ggml, gguf_encode
from dconv.codec.gguf import BLOCKS
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.rank import Settings
from tests.codec.test_ggml import needs_library, none_kept
from tests.formats.test_gguf_export import TYPES as OF_QUANT
from tests.formats.test_gguf_export import llama, only, read, said, source
from tests.models import tree_digest

__all__ = ["none_kept"]

#: Made by ``llama_model_quantize`` of llama.cpp of 2024-07 (as gpt4all 2.8.2 has it) of fp32 models: for each mix the
#: type of most tensors, and the tensors of another one. What rows of Q2_K and Q3_K that are not whole blocks are stored
#: as has changed since and was left out.
RECORDED: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "recorded" / "gguf_mixes.json").read_text()
)
#: Architecture, layers, heads, heads of keys, experts, length of the rows of ffn_down, whether it has an output layer.
MODELS = {
    "grouped": ("llama", 18, 4, 1, 0, 288, True),
    "tied": ("llama", 10, 2, 2, 0, 512, False),
    "eight": ("llama", 9, 4, 4, 8, 256, True),
    "large": ("qwen2", 80, 4, 2, 0, 32, True),
}


@pytest.mark.parametrize(("name", "mix"), [(name, mix) for name, mixes in RECORDED.items() for mix in mixes])
def test_as_llama_quantize_chooses(name: str, mix: str) -> None:
    arch, layers, heads, keys, experts, wide, output = MODELS[name]
    hidden = 32 if name == "large" else 256
    rows = {"attn_q": hidden, "attn_k": hidden, "attn_v": hidden, "attn_output": hidden}
    last = "_exps" if experts else ""
    rows |= {f"ffn_gate{last}": hidden, f"ffn_up{last}": hidden, f"ffn_down{last}": wide}
    shapes = {f"blk.{layer}.{part}.weight": (64, row) for layer in range(layers) for part, row in rows.items()}
    shapes |= dict.fromkeys(("token_embd.weight", *(["output.weight"] if output else [])), (61, hidden))
    values = {"block_count": layers, "attention.head_count": heads, "attention.head_count_kv": keys}
    values |= {"expert_count": experts} if experts else {}
    found = types(
        mix, shapes, {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in values.items()}}
    )
    other = {f"{tensor}.weight": kind for kind, names in RECORDED[name][mix].items() if kind for tensor in names}
    expected = {tensor: other.get(tensor, RECORDED[name][mix][""]) for tensor in shapes}
    if name == "grouped" and mix in ("Q2_K", "Q3_K_S"):
        expected |= {tensor: "Q4_0" for tensor in shapes if "ffn_down" in tensor}  # llama.cpp of 2026-10
    assert found == expected


def test_every_mix_has_its_number() -> None:
    from gguf import LlamaFileType

    assert {mix: LlamaFileType[f"MOSTLY_{mix}"].value for mix in MIXES} == {m: n for m, (_, n) in MIXES.items()}


@needs_library
@pytest.mark.parametrize("quant", ["q2_k", "q3_k_m", "q4_k_m", "q5_k", "q6_k", "iq4_xs"])
def test_written(tmp_path: Path, quant: str) -> None:
    """What ggml makes of whole tensors, though rows are cut inside; name and metadata say which mix it is."""
    mix = {"q5_k": "Q5_K_M"}.get(quant, quant.upper())
    before = llama(tmp_path / "before", num_hidden_layers=3)
    convert(Request(before, "gguf", tmp_path / "f32", quant="f32"))
    job = prepare(Request(before, "gguf", tmp_path / "out", quant=quant))
    run(job, Settings(max_memory=1 << 16))
    assert only(tmp_path / "out").name == f"before-{mix}.gguf"
    values = {key: value for key, (_, value) in said(only(tmp_path / "f32")).items()}
    shapes = {
        tensor.name: tuple(int(n) for n in reversed(tensor.shape))
        for tensor in GGUFReader(only(tmp_path / "f32")).tensors
        if len(tensor.shape) > 1
    }
    kinds = types(mix, shapes, values)
    assert {"blk.0.ffn_down.weight"} < kinds.keys()
    expected: dict[str, tuple[str, list[int], bytes]] = {}
    for tensor in GGUFReader(only(tmp_path / "f32")).tensors:
        kind = kinds.get(tensor.name, "F32")
        weights = dequantize(tensor.data, tensor.tensor_type)
        encode = ggml.encode if kind in ggml.KINDS else gguf_encode.encode
        raw = weights if kind == "F32" else encode(weights, kind)
        expected[tensor.name] = (kind, [int(n) for n in tensor.shape], raw.tobytes())
    assert read(only(tmp_path / "out")) == expected
    assert said(only(tmp_path / "out"))["general.file_type"][1] == MIXES[mix][1] == OF_QUANT[mix.lower()][1]
    notes = "\n".join(job.notes)
    assert ggml.library().said in notes
    assert ("of smaller blocks" in notes) == (BLOCKS[MIXES[mix][0]][0] == 256)  # rows of 288


@needs_library
def test_ranks_write_the_same(tmp_path: Path) -> None:
    before = source(tmp_path / "before", "qwen3_moe")
    for world in (1, 3):
        job = prepare(Request(before, "gguf", tmp_path / str(world), quant="iq4_nl"))
        for rank in range(world):
            run(job, Settings(rank=rank, world=world))
    assert tree_digest(tmp_path / "1") == tree_digest(tmp_path / "3")
    assert any(kind == "IQ4_NL" for kind, _, _ in read(only(tmp_path / "3")).values())


@needs_library
def test_of_its_own_blocks(tmp_path: Path) -> None:
    """A mix to the same mix copies; to another one, it is made of the values of its blocks."""
    before = llama(tmp_path / "before", num_hidden_layers=1)
    convert(Request(before, "gguf", tmp_path / "a", quant="q4_k_s"))
    first = only(tmp_path / "a")
    convert(Request(first, "gguf", tmp_path / "b", quant="q4_k_s"))
    assert read(only(tmp_path / "b")) == read(first)
    convert(Request(first, "gguf", tmp_path / "c", quant="q6_k"))
    found = read(only(tmp_path / "c"))
    for tensor in GGUFReader(first).tensors:
        if tensor.tensor_type == GGMLQuantizationType.Q4_K:
            weights = dequantize(tensor.data, tensor.tensor_type)
            assert found[tensor.name][2] == ggml.encode(np.ascontiguousarray(weights), "Q6_K").tobytes()


def test_without_a_library(
    tmp_path: Path, none_kept: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    monkeypatch.setattr(ggml, "find_library", lambda name: None)
    monkeypatch.delenv(ggml.VARIABLE, raising=False)
    before = llama(tmp_path / "before")
    assert cli(["convert", str(before), "gguf", "-o", str(tmp_path / "out"), "--quant", "q4_k_m"]) == 7
    assert "dconv[kquants]" in "".join(capsys.readouterr())
    assert not (tmp_path / "out").exists()
