"""FORMAT gguf against what llama.cpp's own converter wrote of the same models, and against the package gguf."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from dconv.arch.gguf_mixes import MIXES
from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs
from dconv.cli import main as cli
from dconv.errors import Refused, UsageError, VerifyFailed
from dconv.gguf import TYPES
from dconv.logits import compare
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from dconv.verify import reread
from tests.formats.gguf_files import Tensor, in_blocks, recorded, rewrite
from tests.formats.gguf_models import MODELS, write_model
from tests.formats.gguf_tokenizers import byte_pairs
from tests.models import config_of, facts_of, tensors, tree_digest, write_random

#: Of a recording what differs for a reason: its name is its directory's; transformers' class of DeepSeek v1 has no key
#: for how a router scores, which the key that is written here says.
OTHERWISE = {"general.name", "deepseek.expert_gating_func"}


def source(folder: Path, name: str) -> Path:
    return byte_pairs(write_model(folder, name), small=True)


def only(folder: Path) -> Path:
    (found,) = folder.glob("*.gguf")
    return found


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor in order, as the package gguf reads it."""
    return {
        tensor.name: (tensor.tensor_type.name, [int(n) for n in tensor.shape], tensor.data.tobytes())
        for tensor in GGUFReader(path).tensors
    }


def said(path: Path) -> dict[str, Any]:
    """Keys with their types and values."""
    fields = GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("of", ["hf", "gguf"])
def test_as_llama_cpp_writes_it(tmp_path: Path, of: str, name: str) -> None:
    theirs = recorded(tmp_path, name)
    before = theirs if of == "gguf" else source(tmp_path / "before", name)
    convert(Request(before, "gguf", tmp_path / "out"))
    assert only(tmp_path / "out").name == f"{before.stem}-BF16.gguf"
    expected, found = read(theirs), read(only(tmp_path / "out"))
    table = expected.pop("rope_freqs.weight", None)
    if table is not None:  # computed in fp32 there, in fp64 here
        kind, shape, data = found.pop("rope_freqs.weight")
        assert (kind, shape) == table[:2]
        np.testing.assert_array_max_ulp(np.frombuffer(data, "<f4"), np.frombuffer(table[2], "<f4"))
    assert list(found) == list(expected)
    assert found == expected
    ours, their = said(only(tmp_path / "out")), said(theirs)
    leave = OTHERWISE if of == "hf" else OTHERWISE - {"general.name"}
    keep = {key for key in ours.keys() | their.keys() if key not in leave}
    if of == "hf":
        keep -= {key for key in keep if key.startswith("tokenizer.")}
    assert {key: ours.get(key) for key in keep} == {key: their.get(key) for key in keep}


def llama(folder: Path, **keys: Any) -> Path:
    """A Llama whose rows are whole blocks of 256, with what rounding has to get right among its weights."""
    family = by_name("llama")
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 1, "head_dim": 64, "vocab_size": 61}
    config = config_of(family, **{**sizes, **keys})
    folder.mkdir()
    draw = np.random.default_rng(1)
    specs = list(expected_specs(family, facts_of(family, config)).values())
    _, first, _ = safetensors.lay_out(specs)
    body = []
    for spec in specs:
        values = draw.standard_normal(spec.shape).astype(np.float32)
        if len(spec.shape) > 1:
            values[0], values[1] = 0, -0.0
            values[2] = draw.integers(-3, 4, spec.shape[1]) / 2  # ties
            values[3] *= 2.0**-100  # scales that fp16 has not
            values[4, ::3] = 0
        body.append(values.astype(ml_dtypes.bfloat16).tobytes())
    (folder / "model.safetensors").write_bytes(first + b"".join(body))
    (folder / "config.json").write_text(json.dumps(config))
    return byte_pairs(folder, small=True)


@pytest.mark.parametrize("quant", [quant for quant, (kind, _) in TYPES.items() if kind not in MIXES])
@pytest.mark.parametrize("tied", [False, True])
def test_types(tmp_path: Path, quant: str, tied: bool) -> None:
    """Which tensor is of which type, and the same bytes as gguf's own quantisers make."""
    before = llama(tmp_path / "before", tie_word_embeddings=tied)
    convert(Request(before, "gguf", tmp_path / "f32", quant="f32"))
    job = prepare(Request(before, "gguf", tmp_path / "out", quant=quant))
    run(job, Settings(max_memory=1 << 16))  # so that boxes of rows are cut inside them
    kind, file_type = TYPES[quant]
    expected: dict[str, tuple[str, list[int], bytes]] = {}
    for tensor in GGUFReader(only(tmp_path / "f32")).tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        wanted = "F32" if "norm" in tensor.name else kind
        head = tensor.name == ("token_embd.weight" if tied else "output.weight")
        if wanted.startswith("TQ") and tensor.name in ("token_embd.weight", "output.weight"):
            wanted = "F16"
        elif (wanted.startswith(("Q4", "Q5")) and head) or wanted == "MXFP4":
            wanted = "Q8_0"
        elif wanted.startswith("TQ") and "ffn_down" in tensor.name:
            wanted = "F16"  # rows of 288
        raw = quantize(values, GGMLQuantizationType[wanted])
        expected[tensor.name] = (wanted, [int(n) for n in tensor.shape], raw.tobytes())
    found = read(only(tmp_path / "out"))
    assert {name: of[0] for name, of in found.items()} == {name: of[0] for name, of in expected.items()}
    assert found == expected
    assert said(only(tmp_path / "out"))["general.file_type"][1] == file_type
    notes = "\n".join(job.notes)
    assert ("Q6_K" in notes) == (kind.startswith(("Q4", "Q5")))
    assert ("not whole blocks" in notes) == kind.startswith("TQ")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_in_mxfp4(tmp_path: Path, name: str) -> None:
    """Of stacked experts alone; the rest as llama-quantize has it, or f16 where rows are no whole blocks."""
    before = source(tmp_path / "before", name)
    convert(Request(before, "gguf", tmp_path / "out", quant="mxfp4"))
    for tensor in GGUFReader(only(tmp_path / "out")).tensors:
        plain = (
            tensor.name.endswith(".bias") or "norm" in tensor.name or "_inp" in tensor.name or "sinks" in tensor.name
        )
        blocks = "MXFP4" if "_exps." in tensor.name else "Q8_0"
        assert tensor.tensor_type.name == ("F32" if plain else "F16" if tensor.shape[0] % 32 else blocks), tensor.name


@pytest.mark.parametrize("quant", ["bf16", "q4_1"])
def test_ranks_write_the_same(tmp_path: Path, quant: str) -> None:
    before = source(tmp_path / "before", "qwen3_moe")
    for world in (1, 3):
        job = prepare(Request(before, "gguf", tmp_path / str(world), quant=quant))
        for rank in range(world):
            run(job, Settings(rank=rank, world=world))
    assert tree_digest(tmp_path / "1") == tree_digest(tmp_path / "3")
    assert reread(tmp_path / "3").whole


def test_of_megatron(tmp_path: Path) -> None:
    """Fused, cut by rank: the same file."""
    before = source(tmp_path / "before", "llama")
    convert(Request(before, "megatron", tmp_path / "cut", parallel=Parallel(tp=2, pp=2)))
    for name, folder in (("a", before), ("b", tmp_path / "cut")):
        convert(Request(folder, "gguf", tmp_path / name, quant="q8_0"))
    a, b = only(tmp_path / "a"), only(tmp_path / "b")
    assert read(a) == read(b)
    assert {**said(a), "general.name": 0} == {**said(b), "general.name": 0}


def test_split(tmp_path: Path) -> None:
    """Every file is a GGUF; the first has all that is said, and dconv reads the set as one."""
    before = source(tmp_path / "before", "olmoe")
    convert(Request(before, "gguf", tmp_path / "whole"))
    convert(Request(before, "gguf", tmp_path / "parts", shard_size=20_000))
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    count = len(parts)
    assert count > 2
    assert [part.name for part in parts] == [f"before-BF16-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    whole = read(only(tmp_path / "whole"))
    assert {name: of for part in parts for name, of in read(part).items()} == whole
    for number, part in enumerate(parts):
        keys = {key: value for key, (_, value) in said(part).items()}
        assert keys.pop("split.no") == number
        assert keys.pop("split.count") == count
        assert keys.pop("split.tensors.count") == len(whole)
        assert sum(len(of[2]) for of in read(part).values()) <= 20_000
        assert keys == (
            {key: value for key, (_, value) in said(only(tmp_path / "whole")).items()} if not number else {}
        )
    convert(Request(parts[0], "gguf", tmp_path / "again"))
    assert read(only(tmp_path / "again")) == whole
    convert(Request(tmp_path / "parts", "hf", tmp_path / "back", dtype="bf16"))
    assert tensors(tmp_path / "back") == tensors(before)


def _any_bytes(name: str, values: np.ndarray[Any, Any]) -> Iterable[Tensor]:
    """IQ4_NL, which the package gguf does not encode: any bytes will do."""
    if values.ndim < 2 or values.shape[-1] % 32 or "norm" in name:
        yield name, values, None
    else:
        raw = np.random.default_rng(0).integers(0, 256, (*values.shape[:-1], values.shape[-1] // 32 * 18), np.uint8)
        yield name, raw, GGMLQuantizationType.IQ4_NL


@pytest.mark.parametrize("kind", ["Q4_0", "MXFP4", "IQ4_NL"])
def test_blocks_that_are_there_stay(tmp_path: Path, kind: str) -> None:
    """To merge or split a GGUF rounds nothing, whatever it is made of."""
    change = _any_bytes if kind == "IQ4_NL" else in_blocks(kind)
    before = rewrite(recorded(tmp_path, "qwen3_moe"), tmp_path / "before.gguf", change, values={"general.file_type": 2})
    convert(Request(before, "gguf", tmp_path / "out"))
    assert only(tmp_path / "out").name == "before.gguf"
    assert read(only(tmp_path / "out")) == read(before)
    assert said(only(tmp_path / "out")) == said(before)


def test_requantised(tmp_path: Path) -> None:
    """From the values of the blocks that are there; those of the type that is asked for stay."""
    before = rewrite(recorded(tmp_path, "llama"), tmp_path / "in-Q8_0.gguf", in_blocks("Q8_0"))
    convert(Request(before, "gguf", tmp_path / "q8", quant="q8_0"))
    convert(Request(before, "gguf", tmp_path / "q4", quant="q4_0"))
    assert only(tmp_path / "q4").name == "in-Q4_0.gguf"
    kept, made = read(only(tmp_path / "q8")), read(only(tmp_path / "q4"))
    for tensor in GGUFReader(before).tensors:
        if tensor.tensor_type.name == "Q8_0":
            assert kept[tensor.name][2] == tensor.data.tobytes()
            kind = "Q8_0" if tensor.name == "output.weight" else "Q4_0"
            raw = quantize(dequantize(tensor.data, tensor.tensor_type), GGMLQuantizationType[kind])
            assert made[tensor.name] == (kind, [int(n) for n in tensor.shape], raw.tobytes())


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_transformers_computes_the_same(tmp_path: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before = source(tmp_path / "before", name)
    convert(Request(before, "gguf", tmp_path / "out", quant="f32"))
    file = only(tmp_path / "out").name
    theirs: Any = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
    ours: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file, dtype=torch.float32)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


def test_verified(tmp_path: Path) -> None:
    """By its logits where its weights are plain; of blocks nothing is claimed."""
    before = source(tmp_path / "before", "qwen2")
    for quant, bound in (("bf16", 1e-4), ("f16", 1e-2)):
        job = prepare(Request(before, "gguf", tmp_path / quant, quant=quant))
        run(job, Settings())
        found = compare(job, tmp_path / quant)
        assert found["difference"] <= found["bound"] <= bound
    job = prepare(Request(before, "gguf", tmp_path / "q8_0", quant="q8_0"))
    run(job, Settings())
    with pytest.raises(VerifyFailed, match="no bound"):
        compare(job, tmp_path / "q8_0")
    assert (
        cli(["convert", str(before), "gguf", "-o", str(tmp_path / "x"), "--quant", "q8_0", "--verify", "logits"]) == 2
    )
    assert not (tmp_path / "x").exists()


def test_scalars_are_said_once(tmp_path: Path) -> None:
    """MiniCPM's are metadata; folded into the weights it is a Llama without any."""
    before = source(tmp_path / "before", "minicpm")
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    convert(Request(before, "gguf", tmp_path / "own"))
    convert(Request(before, "gguf", tmp_path / "folded", mup2llama=True))
    own, folded = said(only(tmp_path / "own")), said(only(tmp_path / "folded"))
    assert own["minicpm.embedding_scale"][1] == 12.0
    assert folded["general.architecture"][1] == "llama"
    assert not [key for key in folded if key.endswith("_scale")]


def test_predictors_are_left_out(tmp_path: Path) -> None:
    family = by_name("deepseek_v3")
    keys = {**MODELS["deepseek_v3"], "num_nextn_predict_layers": 1, "num_hidden_layers": 2}
    before = write_random(tmp_path / "before", family, config_of(family, **keys))
    byte_pairs(before, small=True)
    job = prepare(Request(before, "gguf", tmp_path / "out"))
    assert any("no token predictors" in note for note in job.notes)
    names = {tensor.spec.name for tensor in job.plan.target.tensors}
    assert "blk.1.attn_k_b.weight" in names
    assert not [name for name in names if name.startswith("blk.2.")]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant": "iq2_xs"}, "importance matrix"),
        ({"quant": "q9"}, "q8_0"),
        ({"quant": "q8_0", "dtype": "bf16"}, "--dtype bf16"),
        ({"out": Path("x.gguf")}, "directory"),
        ({"gguf_pretokenizer": "qwen-2"}, "did you mean qwen2"),
        ({"scale_format": "ue8m0"}, "--scale-format"),
    ],
)
def test_refused(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    before = source(tmp_path / "before", "llama")
    request = Request(before, "gguf", **{"out": tmp_path / "out", **said})
    with pytest.raises((Refused, UsageError)) as caught:
        prepare(request)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("mistral", {"sliding_window": 32}, "window"),
        ("qwen3_moe", {"norm_topk_prob": False}, "pre_softmax"),
        ("gemma", {"rope_theta": 5.0}, "rotary_base"),
        ("qwen2", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_llama_cpp_cannot_be_told_is_refused(tmp_path: Path, name: str, keys: dict[str, Any], words: str) -> None:
    before = source(tmp_path / "before", name)
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps({**config, **keys}))
    with pytest.raises(Refused) as caught:
        prepare(Request(before, "gguf", tmp_path / "out"))
    assert words in str(caught.value)


def test_families_without_an_architecture(tmp_path: Path) -> None:
    family = by_name("gpt2")
    before = write_random(tmp_path / "before", family, config_of(family))
    with pytest.raises(Refused, match="no architecture in GGUF"):
        prepare(Request(before, "gguf", tmp_path / "out"))
