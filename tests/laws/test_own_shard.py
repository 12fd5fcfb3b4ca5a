"""A rank of its target's own world stays inside its own shard: what it reads is exactly that, in files of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv.arch.registry import by_name
from dconv.pipeline import Request, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from dconv.sharding.reader import MIN_RUN
from dconv.sharding.receipt import partial_folder
from tests.models import config_of, write_random

#: Query groups and tensor parallel sizes: whole groups a rank, and a cut through the middle of a group.
SHARDINGS = ((2, 2, 4), (2, 1, 2), (4, 2, 2), (1, 4, 2))


@dataclass(frozen=True)
class Sizes:
    """A Llama whose rows are so long that a cut through columns still leaves runs of `MIN_RUN` bytes."""

    tp: int
    pp: int
    groups: int
    vocab: int = 307
    hidden: int = 64
    head_dim: int = 64
    layers: int = 4
    divisor: int = 8

    @property
    def heads(self) -> int:
        least = math.ceil(self.tp * MIN_RUN / 2 / self.head_dim)
        step = math.lcm(self.groups, self.tp)
        return max(8, -(-least // step) * step)

    @property
    def ffn(self) -> int:
        return self.tp * (MIN_RUN // 2 + 8)

    @property
    def padded_vocab(self) -> int:
        multiple = self.divisor * self.tp
        return -(-self.vocab // multiple) * multiple

    def config(self, tied: bool) -> dict[str, object]:
        return config_of(
            by_name("llama"),
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=tied,
        )


class Needed:
    """Which bytes of a HuggingFace source one Megatron rank needs, from Megatron's own layout and not from a plan."""

    def __init__(self, source: Path) -> None:
        self._places: dict[str, tuple[str, int, list[int]]] = {}
        self.masks: dict[str, NDArray[np.bool_]] = {}
        for path in sorted(source.glob("*.safetensors")):
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            self.masks[path.name] = np.zeros(len(data), bool)
            for name, entry in json.loads(data[8 : 8 + length]).items():
                if name != "__metadata__":
                    self._places[name] = (path.name, 8 + length + entry["data_offsets"][0], entry["shape"])

    def _view(self, name: str) -> NDArray[np.bool_]:
        file, offset, shape = self._places[name]
        n = math.prod(shape)
        return self.masks[file][offset : offset + 2 * n].reshape(*shape, 2)

    def whole(self, name: str) -> None:
        self._view(name)[:] = True

    def rows(self, name: str, index: range | list[int]) -> None:
        self._view(name)[list(index)] = True

    def columns(self, name: str, index: range) -> None:
        self._view(name)[:, index.start : index.stop] = True


def needed(source: Path, sizes: Sizes, rank: int, container: str, tied: bool) -> dict[str, NDArray[np.bool_]]:
    """Bytes that rank ``rank`` = (stage, tensor rank) of tp x pp needs.

    What is not cut is with every tensor rank in legacy files, with the first in torch_dist.
    """
    pp, tp = divmod(rank, sizes.tp)
    bytes_ = Needed(source)
    has_copies = container == "legacy" or tp == 0

    def cut(n: int) -> range:
        return range(tp * n // sizes.tp, (tp + 1) * n // sizes.tp)

    vocab = range(cut(sizes.padded_vocab).start, min(cut(sizes.padded_vocab).stop, sizes.vocab))
    first, last = pp == 0, pp == sizes.pp - 1
    if first or (last and tied and container == "legacy"):
        bytes_.rows("model.embed_tokens.weight", vocab)
    if last:
        if not tied:
            bytes_.rows("lm_head.weight", vocab)
        if has_copies:
            bytes_.whole("model.norm.weight")
    per_group = sizes.heads // sizes.groups * sizes.head_dim
    fused = []  # Megatron's linear_qkv, row by row
    for group in range(sizes.groups):
        fused += [("q", group * per_group + i) for i in range(per_group)]
        fused += [("k", group * sizes.head_dim + i) for i in range(sizes.head_dim)]
        fused += [("v", group * sizes.head_dim + i) for i in range(sizes.head_dim)]
    mine = [fused[i] for i in cut(len(fused))]
    stage = sizes.layers // sizes.pp
    for layer in range(pp * stage, (pp + 1) * stage):
        prefix = f"model.layers.{layer}."
        if has_copies:
            bytes_.whole(prefix + "input_layernorm.weight")
            bytes_.whole(prefix + "post_attention_layernorm.weight")
        for kind in "qkv":
            bytes_.rows(f"{prefix}self_attn.{kind}_proj.weight", [i for k, i in mine if k == kind])
        bytes_.columns(prefix + "self_attn.o_proj.weight", cut(sizes.heads * sizes.head_dim))
        bytes_.rows(prefix + "mlp.gate_proj.weight", cut(sizes.ffn))
        bytes_.rows(prefix + "mlp.up_proj.weight", cut(sizes.ffn))
        bytes_.columns(prefix + "mlp.down_proj.weight", cut(sizes.ffn))
    return bytes_.masks


@pytest.mark.parametrize("container", ["torch_dist", "legacy"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp", "groups"), SHARDINGS)
def test_a_rank_reads_and_writes_only_its_own_shard(
    tmp_path: Path, container: str, tied: bool, tp: int, pp: int, groups: int
) -> None:
    """In a world of tp x pp: the bytes read are exactly those of the rank's shard, the files written only its own."""
    sizes = Sizes(tp, pp, groups)
    source = write_random(tmp_path / "hf", by_name("llama"), sizes.config(tied), shard_size=1_500_000)
    parallel = Parallel(tp=tp, pp=pp, etp=tp)
    request = {"parallel": parallel, "megatron_format": container, "divisor": sizes.divisor}
    world = tp * pp
    for rank in range(world):
        job = prepare(Request(source, "megatron", tmp_path / f"rank{rank}", **request))
        read = {path.name: np.zeros(path.stat().st_size, bool) for path in source.glob("*.safetensors")}

        def log(file: str, offset: int, nbytes: int, read: dict[str, NDArray[np.bool_]] = read) -> None:
            assert offset + nbytes <= len(read[file])
            read[file][offset : offset + nbytes] = True

        run(job, Settings(rank=rank, world=world, log=log, max_memory=1 << 20))
        expected = needed(source, sizes, rank, container, tied)
        for file, mask in read.items():
            assert not (mask & ~expected[file]).any(), f"rank {rank} read bytes of {file} that are not its shard's"
            assert not (~mask & expected[file]).any(), f"rank {rank} did not read all that its shard needs of {file}"
        folder = partial_folder(tmp_path / f"rank{rank}", job.plan) if world > 1 else tmp_path / "rank0"
        written = {path.name for path in (folder / "release").iterdir()} - {".metadata", "metadata.json", "common.pt"}
        assert written == set(own_files(container, rank, tp, pp))


def own_files(container: str, rank: int, tp: int, pp: int) -> Iterator[str]:
    """What a rank's files are called; extra states and common state are with rank 0."""
    if container == "legacy":
        yield f"mp_rank_{rank % tp:02d}" + (f"_{rank // tp:03d}" if pp > 1 else "")
        return
    yield f"__{rank}_0.distcp"
    if rank == 0:
        yield f"__{tp * pp}_0.distcp"
