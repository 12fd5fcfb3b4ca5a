"""Machines of one run make sure, before the first byte, that they work in one folder."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.errors import Preempted, StorageFault, UsageError
from dconv.launch.meeting import Machines, machines
from tests.models import config_of, tree_digest, write_random
from tests.processes import call, ended, one_rank, start


def meet(folders: list[Path], words: list[str], patience: float = 60.0) -> list[StorageFault | None]:
    """Machines at one time; what each of them met."""

    def one(node: int) -> StorageFault | None:
        try:
            machine = Machines(node, len(folders), words[node], speaks=True, patience=patience)
            machine.meet(folders[node], None, lambda _: None)
        except StorageFault as fault:
            return fault
        return None

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(one, range(len(folders))))


@pytest.mark.parametrize("nodes", [1, 2, 3, 16])
def test_one_folder(tmp_path: Path, nodes: int) -> None:
    assert meet([tmp_path] * nodes, [f"{node:016x}" for node in range(nodes)]) == [None] * nodes


def test_folders_of_their_own(tmp_path: Path) -> None:
    """Two share one, the third has another: all three hear who is missing."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found = meet([tmp_path / "a", tmp_path / "a", tmp_path / "b"], ["x", "y", "z"], patience=0.3)
    assert [str(fault.found).partition(" in ")[0] for fault in found if fault] == [
        "nothing of machine 2", "nothing of machine 2", "nothing of machine 0, 1",
    ]  # fmt: skip


def test_words_of_an_earlier_run_say_nothing(tmp_path: Path) -> None:
    assert meet([tmp_path] * 2, ["a", "b"]) == [None, None]
    with pytest.raises(StorageFault):
        Machines(0, 2, "c", speaks=True, patience=0.2).meet(tmp_path)
    assert meet([tmp_path] * 2, ["c", "d"]) == [None, None]


def test_other_ranks_of_a_machine_wait_for_the_one_that_speaks(tmp_path: Path) -> None:
    silent = Machines(0, 2, "a", speaks=False)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(silent.meet, tmp_path)
        time.sleep(0.1)
        assert not waiting.done()
        assert meet([tmp_path] * 2, ["a", "b"]) == [None, None]
        waiting.result(10)


def test_a_signal_ends_it(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Preempted):
        Machines(0, 2, "a", speaks=True).meet(tmp_path, stop)


def test_how_long_they_wait() -> None:
    torchrun = {"RANK": "5", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "DCONV_RUN": "7"}
    assert machines(torchrun, 8, 1).patience == 120
    assert machines({**torchrun, "DCONV_MEETING_SECONDS": "0.5"}, 8, 1).patience == 0.5
    for odd in ("soon", "0", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match="no number of seconds") as caught:
            machines({**torchrun, "DCONV_MEETING_SECONDS": odd}, 8, 1)
        assert "DCONV_MEETING_SECONDS" in caught.value.where


def test_numbers_of_machines() -> None:
    """Torchrun's, then SLURM's; a launcher's own word counts."""
    torchrun = {"RANK": "5", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "DCONV_RUN": "7"}
    slurm = {"SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "3"}
    assert machines(torchrun, 8, 1).nodes == 2
    assert machines(torchrun, 8, 1).node == 1
    assert not machines(torchrun, 8, 1).speaks
    assert (machines(slurm, 6, 0).node, machines(slurm, 6, 0).nodes) == (2, 3)
    assert machines({"RANK": "0", **slurm}, 2, 0).nodes == 1  # ranks of another launcher within a step
    assert machines({}, 1, 0).nodes == 1
    assert machines(torchrun, 8, 1).word == machines(torchrun, 8, 0).word
    assert machines(torchrun, 8, 1).word != machines(torchrun | {"DCONV_RUN": "8"}, 8, 1).word
    with pytest.raises(UsageError):
        machines({"GROUP_RANK": "2", "GROUP_WORLD_SIZE": "2"}, 4, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = by_name("llama")
    return write_random(tmp_path_factory.mktemp("source") / "model", family, config_of(family))


@pytest.mark.parametrize("shared", [True, False])
def test_two_machines_convert(model: Path, tmp_path: Path, shared: bool) -> None:
    """Two ranks, each on a machine of its own; without a common folder nothing is written, and nothing is left."""
    code, _, err = call(*one_rank(model, "megatron", "-o", tmp_path / "alone"))
    assert code == 0, err
    ranks = []
    for rank in range(2):
        folder = tmp_path / ("both" if shared else f"node{rank}")
        folder.mkdir(exist_ok=True)
        # one path, as every machine of a cluster is told, that is another folder on each
        command = [sys.executable, "-c", f"import os, runpy, sys; os.chdir({str(folder)!r}); "
                   "runpy.run_module('dconv.launch', run_name='__main__', alter_sys=True)",
                   str(model), "megatron", "-o", "out"]  # fmt: skip
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "GROUP_RANK": rank, "GROUP_WORLD_SIZE": 2}
        variables = {key: str(value) for key, value in place.items()}
        ranks.append(start(*command, **variables, DCONV_RUN="1", DCONV_MEETING_SECONDS="30" if shared else "1"))
    ends = [ended(rank) for rank in ranks]
    if shared:
        assert [code for code, _, _ in ends] == [0, 0], ends
        assert tree_digest(tmp_path / "both" / "out") == tree_digest(tmp_path / "alone")
    else:
        assert [code for code, _, _ in ends] == [5, 5], ends
        for rank, (_, _, err) in enumerate(ends):
            assert "not all machines" in err
            assert f"machine {1 - rank}" in err
            assert os.listdir(tmp_path / f"node{rank}") == []
