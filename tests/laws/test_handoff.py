"""Handoff of every family: what lies in the memory of Megatron's ranks becomes, bit by bit, the HuggingFace model that
it was cut from, whatever the layout, the strides and the leaves."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dconv
from dconv import describe, live
from dconv.arch.registry import by_name, families
from dconv.errors import DconvError, Refused, StorageFault, UsageError
from dconv.live import write
from dconv.pipeline import Request, convert, prepare
from dconv.sharding import plan as plan_module
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.rank import Settings
from tests.laws.test_roundtrip import fits
from tests.models import config_of, tensors, tree_digest, write_random

LAYOUTS = [
    Parallel(),
    Parallel(tp=2, pp=2, etp=2),
    Parallel(tp=2, pp=2, vpp=2, ep=2, etp=1),
    Parallel(tp=1, ep=4, etp=1),
    Parallel(tp=4, pp=1, ep=2, etp=2),
]


class Threads(live.Ranks):
    """Ranks of one world as threads: they exchange through a list and two barriers, as processes through a network."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.world = rank, world
        self._barrier, self._board = barrier, board

    def _exchange(self, mine: Any) -> list[Any]:
        self._board[self.rank] = mine
        self._barrier.wait(60)
        everyone = list(self._board)
        self._barrier.wait(60)
        return everyone


def each(world: int, call: Callable[[Threads], Any]) -> list[Any]:
    """``call`` by every rank of a world; results, or what they raised."""
    barrier, board = threading.Barrier(world), [None] * world

    def one(rank: int) -> Any:
        try:
            return call(Threads(rank, world, barrier, board))
        except DconvError as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def chunks_of(saved: Path, coord: Coord, parallel: Parallel) -> tuple[list[dict[str, Any]], Any]:
    """A rank's state dicts as torch loads them from its legacy file, and the args in it.

    What Megatron's model lacks (layers of a tower behind the last that it runs) is handed over with the first chunk.
    """
    numbers = [f"{coord.tp:02d}"]
    numbers += [f"{coord.pp:03d}"] if parallel.pp > 1 else []
    numbers += [f"{coord.ep:03d}"] if parallel.ep > 1 else []
    file = saved / "release" / f"mp_rank_{'_'.join(numbers)}" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    chunks = [state["model"]] if "model" in state else [state[f"model{i}"] for i in range(parallel.vpp)]
    return [chunks[0] | state.get("beside_the_model", {}), *chunks[1:]], state["args"]


def scattered(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors with other strides: transposed, every second element, behind others in one storage."""
    found = dict(state)
    for number, (name, value) in enumerate(state.items()):
        if not isinstance(value, torch.Tensor) or not value.dim():
            continue
        if number % 4 == 0:
            found[name] = value.transpose(0, -1).contiguous().transpose(0, -1)
        elif number % 4 == 1:
            wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)
            found[name] = wide[..., 1::2]
            found[name].copy_(value)
        elif number % 4 == 2:
            found[name] = torch.nn.Parameter(torch.cat([torch.zeros_like(value), value])[len(value) :])
    return found


def cases() -> list[Any]:
    """Every family in every layout that it divides by."""
    return [
        pytest.param(name, parallel, id=f"{name}, {parallel.described}")
        for name, family in sorted(families().items())
        for parallel in LAYOUTS
        if fits(family, facts := family.config.facts(config_of(family)), parallel)
        and parallel.pp <= (facts.get("most_stages") or parallel.pp)
        and (facts.get("experts") or (parallel.ep == 1 and parallel.tp == parallel.etp))
    ]


@pytest.mark.parametrize(("name", "parallel"), cases())
def test_memory_becomes_the_model_that_it_was_cut_from(
    name: str, parallel: Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = by_name(name)
    source = write_random(tmp_path / "hf", family, config_of(family))
    convert(Request(source, "megatron", tmp_path / "saved", parallel=parallel, megatron_format="legacy", divisor=8))
    monkeypatch.setattr(plan_module, "LEAF_BYTES", 1 << 10)
    request = Request(Path("memory"), "hf", tmp_path / "out", hf_config=source)

    def hand(ranks: Threads) -> Any:
        coord = list(parallel.coords())[ranks.rank]
        chunks, args = chunks_of(tmp_path / "saved", coord, parallel)
        models = [scattered(chunk) for chunk in chunks]
        return live.handoff(models, request, Settings(), ranks, args=args, coord=coord, parallel=parallel)

    for done in each(parallel.world, hand):
        assert not isinstance(done, DconvError), done
    assert tensors(tmp_path / "out") == tensors(source)
    again = convert(Request(source, "hf", tmp_path / "converted"))
    assert again.committed
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "converted")


def state_of(source: Path, tmp_path: Path) -> dict[str, Any]:
    convert(Request(source, "megatron", tmp_path / "saved", megatron_format="legacy", divisor=1))
    return chunks_of(tmp_path / "saved", Coord(0, 0, 0, 0, 0), Parallel())[0][0]


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    return write_random(tmp_path / "hf", by_name("llama"), config_of(by_name("llama")))


def test_a_process_alone_needs_no_group(source: Path, tmp_path: Path) -> None:
    state = state_of(source, tmp_path)
    done = dconv.handoff(state, "hf", tmp_path / "out", hf_config=source)
    assert done.committed
    assert tensors(tmp_path / "out") == tensors(source)
    with pytest.raises(UsageError, match="exists"):
        dconv.handoff(state, "hf", tmp_path / "out", hf_config=source)
    state["output_layer.weight"] += 1
    dconv.handoff(state, "hf", tmp_path / "out", hf_config=source, overwrite=True)
    assert tensors(tmp_path / "out") != tensors(source)


def test_ranks_that_read_different_configs_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = Parallel(tp=2, etp=2)
    convert(Request(source, "megatron", tmp_path / "saved", parallel=parallel, megatron_format="legacy"))
    count = itertools.count()
    read = describe.read_json
    monkeypatch.setattr(describe, "read_json", lambda *a, **k: read(*a, **k) | {"rope_theta": float(1 + next(count))})
    request = Request(Path("memory"), "hf", tmp_path / "out", hf_config=source)

    def hand(ranks: Threads) -> Any:
        coord = list(parallel.coords())[ranks.rank]
        chunks, _ = chunks_of(tmp_path / "saved", coord, parallel)
        return live.handoff(chunks, request, Settings(), ranks, coord=coord, parallel=parallel)

    for refused in each(2, hand):
        assert isinstance(refused, Refused)
        assert "do not have one config" in refused.what
    assert not list(tmp_path.glob("out*"))


def no_bytes() -> list[Any]:
    return [
        pytest.param(lambda t: t.to("meta"), "on meta", id="meta"),
        pytest.param(lambda t: t.to_sparse(), "sparse", id="sparse"),
        pytest.param(lambda t: t.to(torch.complex128), "complex128", id="a dtype that no format has"),
        pytest.param(lambda t: t.tolist(), "[[", id="a list"),
    ]


@pytest.mark.parametrize(("change", "named"), no_bytes())
def test_what_is_no_plain_tensor_is_refused(
    source: Path, tmp_path: Path, change: Callable[[torch.Tensor], object], named: str
) -> None:
    state = state_of(source, tmp_path)
    state["output_layer.weight"] = change(state["output_layer.weight"].float())
    with pytest.raises(Refused) as refused:
        dconv.handoff(state, "hf", tmp_path / "out", hf_config=source)
    assert "output_layer.weight" in str(refused.value)
    assert named in str(refused.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("option", [{"fake_weight": True}, {"stage_dir": "scratch"}, {"resume": True}], ids=str)
def test_what_is_about_a_checkpoint_says_nothing_here(source: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no use for these options") as refused:
        dconv.handoff({}, "hf", tmp_path / "out", hf_config=source, **option)
    assert refused.value.where == next(iter(option))


def test_a_rank_that_is_not_there_is_missed(source: Path, tmp_path: Path) -> None:
    state = state_of(source, tmp_path)
    parallel = Parallel(tp=2, etp=2)
    with pytest.raises(UsageError, match="which shard"):
        dconv.handoff(state, "hf", tmp_path / "out", hf_config=source, parallel=parallel)
    with pytest.raises(DconvError) as missing:
        dconv.handoff(state, "hf", tmp_path / "out", hf_config=source, parallel=parallel, coord=Coord(0, 0, 0, 0, 0))
    assert "tp1-pp0" in str(missing.value)
    assert not list(tmp_path.glob("out*"))


def test_of_copies_that_may_differ_all_bytes_are_of_the_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "LEAF_BYTES", 1 << 10)  # a tensor has many writers
    state = state_of(source, tmp_path)
    other = {name: value + 1 if isinstance(value, torch.Tensor) else value for name, value in state.items()}
    request = Request(Path("memory"), "hf", tmp_path / "out", hf_config=source, replicas="first")

    def hand(ranks: Threads) -> Any:
        mine = state if ranks.rank == 0 else other
        return live.handoff(mine, request, Settings(), ranks, coord=Coord(0, 0, 0, 0, 0), parallel=Parallel())

    for done in each(3, hand):
        assert not isinstance(done, DconvError), done
    assert tensors(tmp_path / "out") == tensors(source)


def sharded(state: Mapping[str, Any], parts: int = 1, part: int = 0) -> dict[str, Any]:
    """A rank's sharded state dict, as if it were one of several that cut every matrix's columns."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    found: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            cut = value.dim() > 1 and parts > 1
            mine = value.chunk(parts, 1)[part] if cut else value
            offsets = [(1, part, parts)] if cut else []
            found[f"local {name}"] = ShardedTensor.from_rank_offsets(name, mine, *offsets)
    return found


def test_a_sharded_state_dict_says_where_all_belongs(source: Path, tmp_path: Path) -> None:
    state = state_of(source, tmp_path)
    request = Request(Path("memory"), "hf", tmp_path / "out", hf_config=source)
    for done in each(4, lambda ranks: live.handoff(sharded(state, 2, ranks.rank % 2), request, Settings(), ranks)):
        assert not isinstance(done, DconvError), done
    assert tensors(tmp_path / "out") == tensors(source)


def odd_boxes() -> list[Any]:
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensorFactory

    def with_range(tensor: Any) -> Any:
        tensor.flattened_range = slice(3, 9)
        return tensor

    def without_data(tensor: Any) -> Any:
        return tensor.without_data()

    def outside(tensor: Any) -> Any:
        tensor.global_offset = (8, 0)
        return tensor

    def factory(tensor: Any) -> Any:
        made = ShardedTensorFactory(tensor.key, tensor.data, lambda *_: [tensor], lambda part: part)
        made.flattened_range = slice(0, 2)
        return made

    return [
        pytest.param(with_range, "elements 3 to 9", id="flattened"),
        pytest.param(factory, "elements 0 to 2", id="flattened factory"),
        pytest.param(without_data, "without data", id="no data"),
        pytest.param(outside, "at (8, 0)", id="outside"),
        pytest.param(lambda tensor: tensor.data, "no place", id="a tensor without a place"),
        pytest.param(lambda t: ShardedObject(t.key, t.data, (1,), (0,)), "no place", id="an object"),
        pytest.param(LocalNonpersistentObject, "lm_head.weight", id="missing"),
    ]


@pytest.mark.parametrize(("change", "named"), odd_boxes())
def test_what_has_no_place_in_a_sharded_state_dict_is_refused(
    source: Path, tmp_path: Path, change: Callable[[Any], object], named: str
) -> None:
    state = sharded(state_of(source, tmp_path))
    state["local output_layer.weight"] = change(state["local output_layer.weight"])
    with pytest.raises(DconvError) as refused:
        dconv.handoff([state], "hf", tmp_path / "out", hf_config=source)
    assert "output_layer.weight" in str(refused.value) or named == "lm_head.weight"
    assert named in str(refused.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda state: sharded({name: v.double() if hasattr(v, "double") else v for name, v in state.items()}),
            "dtype",
        ),
        (lambda state: sharded({name: v + 1 if hasattr(v, "dim") else v for name, v in state.items()}), "disagree"),
        (lambda state: state, "others local ones"),
    ],
)
def test_sharded_state_dicts_that_do_not_fit_together_are_refused(
    source: Path, tmp_path: Path, change: Callable[[Any], Any], named: str
) -> None:
    state = state_of(source, tmp_path)
    request = Request(Path("memory"), "hf", tmp_path / "out", hf_config=source)
    place = {"coord": Coord(0, 0, 0, 0, 0), "parallel": Parallel()}

    def hand(ranks: Threads) -> Any:
        mine = sharded(state) if ranks.rank == 0 else change(state)
        return live.handoff(mine, request, Settings(), ranks, **place)

    for refused in each(2, hand):
        assert isinstance(refused, DconvError)
        assert named in str(refused)
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_cannot_be_flushed_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_random(tmp_path / "model", by_name("llama"), config_of(by_name("llama")))
    job = prepare(Request(model, "hf", tmp_path / "out"))

    def fails(folder: Path) -> None:
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setattr(write, "sync_folder", fails)
    with pytest.raises(StorageFault, match="cannot create the output"):
        write.start(job, Settings())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
