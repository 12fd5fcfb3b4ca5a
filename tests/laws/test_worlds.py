"""Law 3: world size, order, threads and memory never change one output byte, and every byte is one rank's."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dconv.arch.registry import by_name, families
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding import plan as plan_module
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.models import config_of, facts_of, tree_digest, write_random

WORLDS = (1, 2, 3, 4, 5, 8)
THREADS = (1, 3)
MEMORY = (64 << 10, 1 << 20, 32 << 20, 256 << 20)


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


@pytest.mark.parametrize("container", ["torch_dist", "legacy"])
@pytest.mark.parametrize("name", families())
def test_every_family_has_the_same_bytes_from_any_world(tmp_path: Path, name: str, container: str) -> None:
    """One rank, as many as the layout has, and a number that fits nothing; experts are spread over ranks."""
    family = families()[name]
    config = config_of(family, num_key_value_heads=4, vocab_size=64)
    source = write_random(tmp_path / "hf", family, config)
    facts = facts_of(family, config)
    stages = min(2, facts.get("most_stages", 2))
    parallel = Parallel(tp=2, pp=stages, ep=2 if facts.get("experts") else 1, etp=2)
    found = []
    for world in (1, parallel.world, 3):
        conversion = Conversion(source, "megatron", container, parallel)
        by_ranks(conversion, tmp_path / f"of {world}", list(reversed(range(world))), 2, 1 << 20)
        found.append(tree_digest(tmp_path / f"of {world}"))
    assert found[0] == found[1] == found[2]


# --------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
