"""What our own launchers tell the ranks that they start, and how these are told to leave."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dconv import calibrate_rank
from dconv.errors import UsageError
from dconv.launch import local, ray_ranks
from dconv.launch.history import Record
from dconv.launch.left import finished
from dconv.launch.run_options import check_launch
from dconv.pipeline import Request, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from dconv.sharding.tuning import AUTO
from tests.launched import small_llama


class _Child:
    """A rank that leaves when it is killed."""

    def __init__(self, events: list[str], number: int) -> None:
        self._events, self._number, self._killed = events, number, False

    def poll(self) -> int | None:
        return -9 if self._killed else None

    def terminate(self) -> None:
        self._events.append(f"told {self._number}")

    def kill(self) -> None:
        self._killed = True
        self._events.append(f"killed {self._number}")

    def wait(self, seconds: float | None = None) -> int:
        if not self._killed:
            raise subprocess.TimeoutExpired("rank", seconds or 0)
        return -9


def test_all_local_ranks_are_told_before_any_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that hang have their seconds together, not one after the other."""
    monkeypatch.setattr(local, "_PATIENCE", 0.01)
    events: list[str] = []
    codes = local._finish([_Child(events, number) for number in range(3)], stop=True)  # type: ignore[misc, arg-type]
    assert codes == [75] * 3
    assert events == [*(f"told {number}" for number in range(3)), *(f"killed {number}" for number in range(3))]


def test_no_rank_is_left_where_one_could_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_PATIENCE", 0.01)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    events: list[str] = []

    def started(*_: object, **__: object) -> _Child:
        if len(events) == 2:
            raise BlockingIOError("no more processes")
        events.append("started")
        return _Child(events, len(events))

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(local, "Stop", lambda: None)
    with pytest.raises(BlockingIOError):
        local.run([], argparse.Namespace(), 9, Record())
    assert sorted(events[2:]) == ["killed 1", "killed 2", "told 1", "told 2"]


@pytest.mark.parametrize("said", [None, "follow"])
def test_ranks_on_other_machines_hear_whose_the_links_are(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCONV_LINKS", raising=False)
    if said:
        monkeypatch.setenv("DCONV_LINKS", said)
    ranks: Any = object.__new__(ray_ranks.Ranks)
    ranks._gpus, ranks._ray = 0, SimpleNamespace(nodes=list)
    told = ranks._variables([("a", 1), ("a", 2), ("b", 3)])
    assert [one.get("DCONV_LINKS") for one in told] == [said] * 3


@pytest.mark.parametrize(
    "option", [{"max_restarts": 0}, {"cpus_per_rank": 0.0}, {"wait": True}, {"sbatch": ["-x"]}, {"nodes": 1}], ids=str
)
def test_options_of_another_launcher_are_refused_whatever_they_say(option: dict[str, object]) -> None:
    none = dict.fromkeys(("max_restarts", "address", "cpus_per_rank", "gpus_per_rank", "nodes", "partition", "account"))
    args = {**none, "time": None, "sbatch": [], "wait": False, "launcher": "local"}
    check_launch(argparse.Namespace(**args))
    with pytest.raises(UsageError, match="no use for this"):
        check_launch(argparse.Namespace(**{**args, **option}))


@pytest.mark.parametrize("name", ["out", "out[1]", "o?t*"])
def test_what_is_finished_is_counted_whatever_the_output_is_called(name: str, tmp_path: Path) -> None:
    """As a batch script counts it; every other rank of two has never been there."""
    model = small_llama(tmp_path)
    job = prepare(Request(model, "megatron", tmp_path / name, parallel=Parallel(tp=2, etp=2)))
    run(job, Settings(rank=1, world=2))
    assert finished(tmp_path / name) == len(job.plan.share(1, 2)) > 0


@pytest.mark.parametrize(("asked", "found"), [(1, 1), (3, 3), (AUTO, 4)])
def test_one_thread_is_one_for_a_calibration_too(asked: int, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(calibrate_rank.os, "cpu_count", lambda: 8)
    assert calibrate_rank._threads(asked, 2) == found  # type: ignore[misc]
