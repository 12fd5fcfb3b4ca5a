"""Experts divided over ranks: the same numbers, a part of the memory, and what is refused."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="calibration computes with torch")
pytest.importorskip("transformers", reason="calibration runs transformers' layers")

from dconv.errors import Preempted, Refused, UsageError
from dconv.pipeline import prepare, run
from dconv.quant.experts import Experts
from dconv.quant.network import Network
from dconv.quant.peers import Peers
from dconv.quant.ranks import Ranks
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.quant import awq_models, calibrated
from tests.quant.one_process import Threads, assert_same, calibrated_by
from tests.quant.one_process import calibrated as calibrated_alone


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 61, (20, 512)))
    return path


@pytest.mark.parametrize(
    ("family", "said", "world", "ep"),
    [
        ("mixtral", {"desc_act": True}, 2, 1),
        ("mixtral", {"desc_act": True}, 4, 2),
        ("qwen2_moe", {"routing_weighted": True, "nsamples": 6}, 2, 2),  # one block: a rank has none
        ("olmoe", {"true_sequential": False}, 4, 4),
        ("deepseek_v2", {}, 3, 3),  # four experts do not divide
    ],
    ids=str,
)
def test_gptq(family: str, said: dict[str, Any], world: int, ep: int, ids: Path, tmp_path: Path) -> None:
    model = calibrated.model_of(family, tmp_path / "model")
    job = prepare(calibrated.request_for(model, ids, tmp_path / "out", **{"nsamples": 20, **said})).calibrating
    assert job is not None
    one = calibrated_alone(job, tmp_path / "one")
    assert_same(one, calibrated_by(job, tmp_path / "many", world, threads=2, ep=ep), ep)


def test_little_memory(ids: Path, tmp_path: Path) -> None:
    """Sums in several passes, of which a rank with fewer experts needs fewer."""
    wide = {"intermediate_size": 384, "num_local_experts": 3, "num_hidden_layers": 1}
    model = calibrated.model_of("mixtral", tmp_path / "model", **wide)
    asked = calibrated.request_for(model, ids, tmp_path / "out", nsamples=20, true_sequential=False)
    job = prepare(asked).calibrating
    assert job is not None
    one = calibrated_alone(job, tmp_path / "one")
    assert_same(one, calibrated_by(job, tmp_path / "many", 2, ep=2, room=1 << 16), 2)


@pytest.mark.parametrize(("family", "world", "ep"), [("mixtral", 2, 2), ("qwen2_moe", 4, 2), ("deepseek_v2", 3, 3)])
def test_awq(family: str, world: int, ep: int, ids: Path, tmp_path: Path) -> None:
    model = awq_models.model_of(family, tmp_path / "model")
    asked = awq_models.request_for(model, ids, tmp_path / "out", nsamples=12, seqlen=512, n_grid=3)
    job = awq_models.planned(asked)
    one = calibrated_alone(job, tmp_path / "one")
    assert_same(one, calibrated_by(job, tmp_path / "many", world, ep=ep), ep)


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("told", [0, 3])
def test_told_in_the_midst_of_a_pass(form: str, told: int, ids: Path, tmp_path: Path) -> None:
    """One of four ranks is told to stop, and all leave: it and its peer where they meet, the others after the pass."""
    source = calibrated if form == "gptq" else awq_models
    model = source.model_of("mixtral", tmp_path / "model")
    job = prepare(source.request_for(model, ids, tmp_path / "out", nsamples=20, seqlen=512)).calibrating
    assert job is not None
    ranks = Threads(4).each
    peer = {0: 1, 3: 2}[told]
    own, calls, late = Experts._expert, [], []

    def expert(self: Experts, *args: Any) -> Any:
        calls.append(True)
        if ranks[told].stop.is_set() and self._peers.stop in (ranks[told].stop, ranks[peer].stop):
            late.append(True)
        if len(calls) == 30:
            ranks[told].stop.set()
        return own(self, *args)

    left = []
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(Experts, "_expert", expert)
        for one in [pool.submit(calibrated_alone, job, tmp_path / "state", rank, ep=2) for rank in ranks]:
            with pytest.raises(Preempted, match="stopped by a signal"):
                one.result(timeout=60)
            left.append(True)
    assert len(left) == 4
    assert len(late) <= 2 * 4  # what is left of a block's, of each of the two


def test_a_rank_has_its_experts_alone(ids: Path, tmp_path: Path) -> None:
    model = calibrated.model_of("mixtral", tmp_path / "model")
    source = prepare(calibrated.request_for(model, ids, tmp_path / "out")).calibrating.source
    net = Network(source.config, source.logical, "cpu", 1 << 26, Peers(Ranks(), (Ranks(1, 3),)))
    (experts,) = net.load(0).experts.values()
    held = {int(name.split(".experts.")[1].split(".")[0]) for name in experts.weights}
    net.close()
    assert held == {1}
    assert len(experts.weights) == 3


@pytest.mark.parametrize(
    ("family", "ep", "world", "error", "said"),
    [
        ("mixtral", 5, 5, Refused, "4 at most"),
        ("llama", 2, 2, Refused, "has no experts to divide"),
        ("mixtral", 2, 3, UsageError, "divides 3 ranks"),
    ],
)
def test_refused(
    family: str, ep: int, world: int, error: type[Exception], said: str, ids: Path, tmp_path: Path
) -> None:
    model = calibrated.model_of(family, tmp_path / "model")
    request = dataclasses.replace(calibrated.request_for(model, ids, tmp_path / "out"), parallel=Parallel(ep=ep, etp=1))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=said):
        run(prepare(request), Settings(world=world))
    assert sorted(tmp_path.iterdir()) == before


def test_a_source_in_whole_numbers_takes_no_ep(ids: Path, tmp_path: Path) -> None:
    model = calibrated.model_of("llama", tmp_path / "model")
    run(prepare(calibrated.request_for(model, ids, tmp_path / "q")), Settings())
    request = calibrated.request_for(tmp_path / "q", ids, tmp_path / "out")
    alone = dataclasses.replace(request, calibration=None, quantization_config=None, parallel=Parallel(ep=2))
    with pytest.raises(Refused, match="--ep"):
        prepare(alone)
