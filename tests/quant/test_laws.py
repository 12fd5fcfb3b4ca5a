"""What holds for every quantised format and every family: the same bytes from anywhere, and values within the bound."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from dconv.arch.registry import by_name, families
from dconv.errors import Refused
from dconv.pipeline import Request, convert, prepare, run
from dconv.quantise import VARIANTS
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.models import tree_digest
from tests.quant.models import values_of, write_normal

#: Variants that make codes of any weights, each for the readers that it is written for; others only pack those that a
#: source has (`test_repack`).
NAMES = [
    (format, f"{name} {reader}".strip())
    for format, variants in VARIANTS.items()
    for name, variant in variants.items()
    for reader in ("", *variant.readers[1:])
    if not variant.repacks
]
#: Families whose linear layers no format stores in codes, with what the refusal says.
WITHOUT = {
    "gpt2": "Conv1D", "bert": "no linear layers", "megatron-bert": "no linear layers", "gpt_oss": "one tensor for all",
}  # fmt: skip
#: Those that have a form of their own for experts that are one tensor for all.
STACKED = {("gpt_oss", *name) for name in NAMES if " " not in name[1] and VARIANTS[name[0]][name[1]].stacked}
REFUSED = [(*name, family) for family in WITHOUT for name in NAMES if (family, *name) not in STACKED]
TAKEN = [(*name, family) for family in families() for name in NAMES if (*name, family) not in REFUSED]


def request(source: Path, out: Path, format: str, quant: str) -> Request:
    """Blocks of 16 where the size is free, so that small matrices have several, cut ones among them."""
    name, _, reader = quant.partition(" ")
    block = (16, 24) if "block_size" in VARIANTS[format][name].options else None
    return Request(source, format, out, quant=name, block_size=block, quant_config=reader or None)


@pytest.mark.parametrize(("format", "quant", "family"), REFUSED)
def test_what_no_loader_takes_is_refused(tmp_path: Path, format: str, quant: str, family: str) -> None:
    source = write_normal(tmp_path / "source", by_name(family))
    with pytest.raises(Refused, match=WITHOUT[family]):
        prepare(request(source, tmp_path / "out", format, quant))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def sampled() -> list[Any]:
    """Every family with block FP8; of the other forms each with a fifth of them, all with ``--long``."""
    found = []
    for format, quant, family in TAKEN:
        number = NAMES.index((format, quant)) + list(families()).index(family)
        chosen = quant == "fp8_block" or family in WITHOUT or number % 5 == 0
        found.append(pytest.param(format, quant, family, marks=() if chosen else pytest.mark.long))
    return found


@pytest.mark.parametrize(("format", "quant", "family"), sampled())
def test_every_family_goes_in_and_out(tmp_path: Path, format: str, quant: str, family: str) -> None:
    """Coded from HuggingFace and from Megatron alike; decoded within the bound; everything else as it was."""
    source = write_normal(tmp_path / "source", by_name(family))
    convert(request(source, tmp_path / "coded", format, quant))
    layout = Parallel() if by_name(family).config.architecture.startswith("T5") else Parallel(tp=2, pp=1, etp=2)
    convert(Request(source, "megatron", tmp_path / "megatron", parallel=layout, divisor=8))
    convert(request(tmp_path / "megatron", tmp_path / "from_megatron", format, quant))
    assert tree_digest(tmp_path / "from_megatron") == tree_digest(tmp_path / "coded")
    job = prepare(Request(tmp_path / "coded", "hf", tmp_path / "dense"))
    coded = set(job.source.coded)
    assert coded
    run(job, Settings())
    before, after = values_of(source), values_of(tmp_path / "dense")
    assert before.keys() <= after.keys()  # DeepSeek-V3 writes some twice
    worst = VARIANTS[format][quant.split()[0]].worst
    for name, values in before.items():
        largest = np.abs(values).max() if name in coded else 0.0
        # and the rounding of what was decoded to bf16
        assert np.abs(after[name] - values).max() <= largest * (worst + 2**-8), name
    for part in (tmp_path / "dense", source):
        assert "quantization_config" not in json.loads((part / "config.json").read_text())
    again = prepare(request(tmp_path / "coded", tmp_path / "again", format, quant))
    run(again, Settings())
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "coded"), "codes that are there are kept"


@pytest.mark.parametrize(("format", "quant"), NAMES)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_any_world_gives_the_same_bytes(tmp_path: Path, format: str, quant: str, direction: str) -> None:
    """Ranks one by one in any order, with threads and memory of every size; leaves that end inside of blocks."""
    wide = {"hidden_size": 320, "intermediate_size": 1056, "num_hidden_layers": 2, "head_dim": 80}
    source = write_normal(tmp_path / "source", by_name("qwen2"), **wide)
    asked = request(source, tmp_path / "one", format, quant)
    if direction == "decode":
        convert(request(source, tmp_path / "coded", format, quant))
        asked = Request(tmp_path / "coded", "megatron", tmp_path / "one", parallel=Parallel(tp=2, etp=2))
    convert(asked)
    expected = tree_digest(tmp_path / "one")
    draw = random.Random(f"{format} {quant} {direction}")
    for world in (1, 3, 4):
        out = tmp_path / f"by {world}"
        launched = time.time()
        for rank in draw.sample(range(world), world):
            memory, threads = draw.choice((64 << 10, 300_000, 256 << 20)), draw.choice((1, 2))
            job = prepare(Request(**{**vars(asked), "out": out}))
            run(job, Settings(rank=rank, world=world, threads=threads, max_memory=memory, launched=launched))
        assert tree_digest(out) == expected


@pytest.mark.parametrize(("format", "quant"), NAMES)
def test_every_file_is_what_safetensors_takes(tmp_path: Path, format: str, quant: str) -> None:
    source = write_normal(tmp_path / "source", by_name("llama"))
    convert(Request(**{**vars(request(source, tmp_path / "out", format, quant)), "shard_size": 50_000}))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    there = set()
    for path in files:
        with safe_open(path, "pt") as opened:
            there |= {name for name in opened.keys() if opened.get_tensor(name) is not None}  # noqa: SIM118
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert there == index["weight_map"].keys()
