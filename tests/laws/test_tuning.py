"""The number of threads follows what storage and processor do; it changes no byte (`test_worlds`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dconv.arch.registry import by_name
from dconv.pipeline import Request, prepare, run
from dconv.sharding import tuning
from dconv.sharding.rank import Settings
from dconv.sharding.tuning import AUTO, Tuner
from tests.models import config_of, tree_digest, write_random


class Storage:
    """A clock that passes as tasks end, at a rate that depends on the threads."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        self.now, self._rate = 0.0, rate

    def __call__(self) -> float:
        return self.now

    def runs(self, tuner: Tuner, tasks: int = 1000) -> int:
        for _ in range(tasks):
            self.now += 32e6 / self._rate(tuner.threads)
            tuner.done(32_000_000)
        return tuner.threads


@pytest.mark.parametrize(
    ("rate", "found"),
    [
        (lambda _: 1e9, 1),  # the processor, or one disk
        (lambda n: 1e9 * min(n, 4), 4),  # four at a time
        (lambda n: 0.1e9 * n, 16),  # an object store: the more the better
        (lambda n: 1e9 / n, 1),  # threads in each other's way
        (lambda n: 1e9 * n**0.1, 1),  # a little better, not worth it
        (lambda n: 1e6 * min(n, 2), 2),  # slow: half a minute a task
    ],
)
def test_threads_are_doubled_as_long_as_it_pays(rate: Callable[[int], float], found: int) -> None:
    storage = Storage(rate)
    assert storage.runs(Tuner(AUTO, 1 << 30, storage)) == found


def test_what_is_asked_for_is_had() -> None:
    storage = Storage(lambda n: 1e9 * n)
    assert storage.runs(Tuner(3, 1 << 30, storage)) == 3


def test_no_more_threads_than_memory_has_tiles_for() -> None:
    for room, most in ((1 << 20, 1), (64 << 20, 2), (256 << 20, 8), (1 << 30, 16)):
        storage = Storage(lambda n: 1e8 * n)
        assert storage.runs(Tuner(AUTO, room, storage)) == most


@pytest.mark.parametrize("slow", [True, False])
def test_storage_that_takes_its_time_gets_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """A real run: reads that wait are hidden by threads; the bytes are those of one."""
    family = by_name("llama")
    config = config_of(family, hidden_size=64, intermediate_size=192, num_hidden_layers=40, head_dim=16)
    model = write_random(tmp_path / "model", family, config)
    run(prepare(Request(model, "megatron", tmp_path / "one")), Settings())
    chosen: list[int] = []
    real_done, real_read = Tuner.done, os.preadv

    def done(self: Tuner, nbytes: int) -> None:
        real_done(self, nbytes)
        chosen.append(self.threads)

    def read(*words: Any) -> int:
        time.sleep(0.005 if slow else 0)
        return real_read(*words)

    monkeypatch.setattr(tuning, "_SECONDS", 0.02)
    monkeypatch.setattr(Tuner, "done", done)
    monkeypatch.setattr(os, "preadv", read)
    assert run(prepare(Request(model, "megatron", tmp_path / "auto")), Settings(threads=AUTO)).committed
    assert tree_digest(tmp_path / "auto") == tree_digest(tmp_path / "one")
    if slow:
        assert max(chosen) >= 4, chosen
