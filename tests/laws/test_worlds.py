"""Law 3: world size, order, threads and memory never change one output byte; a rank stays inside its own shard."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dconv.arch.registry import by_name
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding import plan as plan_module
from dconv.sharding.commit import Settings
from dconv.sharding.coords import Parallel
from dconv.sharding.reader import MIN_RUN
from dconv.sharding.receipt import partial_folder
from tests.models import config_of, tree_digest, write_random

WORLDS = (1, 2, 3, 4, 5, 8)
THREADS = (1, 3)
MEMORY = (64 << 10, 1 << 20, 32 << 20, 256 << 20)
CONTAINERS = ("torch_dist", "legacy")


@dataclass(frozen=True)
class Conversion:
    """A source, and the request to make of it (without its output)."""

    source: Path
    format: str
    container: str = "torch_dist"
    parallel: Parallel = Parallel()
    shard_size: int = 10**12

    def job(self, out: Path) -> Job:
        return prepare(
            Request(
                self.source,
                self.format,
                out,
                parallel=self.parallel,
                megatron_format=self.container,
                divisor=8,
                shard_size=self.shard_size,
            )
        )


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Conversion, dict[str, str]]]:
    """Every direction with what one rank makes of it."""
    root = tmp_path_factory.mktemp("worlds")
    family = by_name("qwen2")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 499}
    source = write_random(root / "hf", family, config_of(family, **sizes), shard_size=150_000)
    to_dist = Conversion(source, "megatron", "torch_dist", Parallel(tp=2, pp=2, etp=2))
    to_legacy = Conversion(source, "megatron", "legacy", Parallel(tp=4, pp=2, vpp=2, etp=4))
    run(to_dist.job(root / "dist"), Settings())
    run(to_legacy.job(root / "legacy"), Settings())
    all_of_them = {
        "hf to torch_dist": to_dist,
        "hf to legacy": to_legacy,
        "torch_dist to hf": Conversion(root / "dist", "hf", shard_size=100_000),
        "legacy to hf": Conversion(root / "legacy", "hf"),
        "torch_dist to legacy": Conversion(root / "dist", "megatron", "legacy", Parallel(tp=1, pp=4)),
        "legacy to torch_dist": Conversion(root / "legacy", "megatron", "torch_dist", Parallel(tp=4, etp=4)),
    }
    found = {}
    for name, conversion in all_of_them.items():
        out = root / "one" / name
        out.parent.mkdir(exist_ok=True)
        run(conversion.job(out), Settings())
        found[name] = (conversion, tree_digest(out))
        assert len(found[name][1]) >= 3
    return found


NAMES = (
    "hf to torch_dist", "hf to legacy", "torch_dist to hf", "legacy to hf", "torch_dist to legacy",
    "legacy to torch_dist",
)  # fmt: skip


def by_ranks(conversion: Conversion, out: Path, order: list[int], threads: int, memory: int) -> None:
    """Every rank as a plain call, in ``order``, each planning for itself; exactly one commits, at the end."""
    launched = time.time()
    committed = []
    for rank in order:
        assert not committed or not conversion.job(out).plan.share(rank, len(order)), "committed before all was done"
        outcome = run(
            conversion.job(out),
            Settings(rank=rank, world=len(order), threads=threads, max_memory=memory, launched=launched),
        )
        committed += [rank] * outcome.committed
    assert len(committed) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_any_world_gives_the_same_bytes(
    conversions: dict[str, tuple[Conversion, dict[str, str]]], tmp_path: Path, name: str, world: int
) -> None:
    """Ranks one by one in any order, with threads and memory drawn anew each time."""
    conversion, expected = conversions[name]
    draw = random.Random(f"{name} {world}")
    order = draw.sample(range(world), world)
    by_ranks(conversion, tmp_path / "out", order, draw.choice(THREADS), draw.choice(MEMORY))
    assert tree_digest(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_whole_matrix(
    conversions: dict[str, tuple[Conversion, dict[str, str]]],
    tmp_path: Path,
    name: str,
    world: int,
    threads: int,
    memory: int,
) -> None:
    """All combinations of the above."""
    conversion, expected = conversions[name]
    by_ranks(conversion, tmp_path / "out", list(reversed(range(world))), threads, memory)
    assert tree_digest(tmp_path / "out") == expected


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", NAMES)
def test_threads_and_memory_give_the_same_bytes(
    conversions: dict[str, tuple[Conversion, dict[str, str]]], tmp_path: Path, name: str, threads: int, memory: int
) -> None:
    conversion, expected = conversions[name]
    by_ranks(conversion, tmp_path / "out", [0], threads, memory)
    assert tree_digest(tmp_path / "out") == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leaf", [1000, 4098, 10_000])
def test_tensors_of_many_leaves(
    conversions: dict[str, tuple[Conversion, dict[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    leaf: int,
) -> None:
    """A tensor that is cut into tasks of several ranks, as only large models have them otherwise."""
    conversion, expected = conversions[name]
    monkeypatch.setattr(plan_module, "LEAF_BYTES", leaf)
    job = conversion.job(tmp_path / "out")
    assert len(job.plan.tasks) > len(job.plan.target.tensors) + len(job.plan.target.files)
    by_ranks(conversion, tmp_path / "out", [2, 0, 1], 3, 64 << 10)
    assert tree_digest(tmp_path / "out") == expected


# --------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=st.integers(1, 300))
def test_share_is_an_exact_partition(
    conversions: dict[str, tuple[Conversion, dict[str, str]]], name: str, world: int
) -> None:
    """Every task belongs to exactly one rank; unless the world is the target's own, shares are even in bytes."""
    plan = conversions[name][0].job(Path("unused")).plan
    shares = [plan.share(rank, world) for rank in range(world)]
    assert sorted(task.index for share in shares for task in share) == list(range(len(plan.tasks)))
    if world != plan.target.world:
        largest = max(task.nbytes for task in plan.tasks)
        even = sum(task.nbytes for task in plan.tasks) / world
        assert all(sum(task.nbytes for task in share) <= even + largest + len(plan.tasks) for share in shares)


@pytest.mark.parametrize("rank_world", [(-1, 2), (2, 2), (0, 0)])
def test_share_of_no_rank(
    conversions: dict[str, tuple[Conversion, dict[str, str]]], rank_world: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="outside world"):
        conversions["hf to legacy"][0].job(Path("unused")).plan.share(*rank_world)


# ---------------------------------------------------------------------------------------------- a rank's own shard

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


@pytest.mark.parametrize("container", CONTAINERS)
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


# ---------------------------------------------------------------------------------------------------------- holes


def allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def sparse_model(folder: Path) -> Path:
    """About 70 MB of which a few tensors have data, among them single rows and a part of a row."""
    family = by_name("llama")
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 4001}
    config = config_of(family, num_attention_heads=8, num_key_value_heads=4, **sizes)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        dense = write_random(Path(scratch) / "dense", family, config)
        data = (dense / "model.safetensors").read_bytes()
        (dense / "model.safetensors").unlink()
        source = Path(shutil.copytree(dense, folder / "sparse"))
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    with open(source / "model.safetensors", "wb") as file:
        file.write(data[:length])
        for name, low, n in (
            ("model.layers.0.self_attn.q_proj.weight", 0, None),
            ("model.layers.1.input_layernorm.weight", 0, None),
            ("model.layers.2.mlp.down_proj.weight", 700_001, 5000),
            ("model.layers.3.mlp.up_proj.weight", 1_000_000, 3),
            ("lm_head.weight", 2048 * 4000, 2048),
        ):
            begin, end = header[name]["data_offsets"]
            at = length + begin + low
            file.seek(at)
            file.write(data[at : at + n] if n else data[at : length + end])
        file.truncate(len(data))
    return source


@pytest.mark.parametrize("container", CONTAINERS)
def test_holes_stay_holes(tmp_path: Path, container: str) -> None:
    """There and back: the bytes of a dense copy's output, in hardly more blocks than the source has."""
    source = sparse_model(tmp_path)
    size = (source / "model.safetensors").stat().st_size
    taken = allocated(source)
    if taken > size // 4:
        pytest.skip("no sparse files here")
    dense = tmp_path / "dense"
    shutil.copytree(source, dense)
    (dense / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert allocated(dense) >= size
    layout = Parallel(tp=2, pp=2, etp=2)
    done = {}
    for name, model in (("sparse", source), ("dense", dense)):
        there, back = tmp_path / f"{name}-megatron", tmp_path / f"{name}-hf"
        for rank in (1, 0):
            request = Request(model, "megatron", there, parallel=layout, megatron_format=container)
            run(prepare(request), Settings(rank=rank, world=2))
        run(prepare(Request(there, "hf", back)), Settings())
        done[name] = there, back
    for sparse, full in zip(done["sparse"], done["dense"], strict=True):
        assert tree_digest(sparse) == tree_digest(full)
        # headers and extra states besides, and a block at both ends of every run of data
        assert allocated(sparse) < taken + (1 << 19)
        assert allocated(full) > size
    assert tree_digest(done["sparse"][1])["model.safetensors"] == tree_digest(source)["model.safetensors"]
