"""One small conversion to each container, the same at each call: what kills, faults and power cuts are tried on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from dconv.arch.registry import by_name
from dconv.pipeline import Job, Request, prepare, run
from dconv.sharding import rank
from dconv.sharding.coords import Parallel
from dconv.sharding.execute import Done
from dconv.sharding.journal import Journal
from dconv.sharding.outputs import Outputs
from dconv.sharding.plan import Task
from dconv.sharding.rank import Settings
from dconv.sharding.receipt import RECEIPT
from tests.formats.gguf_tokenizers import byte_pairs
from tests.models import config_of, tree_digest, write_random

_SHARDS: Final = Parallel(tp=2, pp=2, etp=2)
#: What an output of each is asked for with, beside the model.
CASES: Final = {
    "hf": {"format": "hf", "shard_size": 60_000},
    "legacy": {"format": "megatron", "megatron_format": "legacy", "parallel": _SHARDS, "divisor": 8},
    "torch_dist": {"format": "megatron", "parallel": _SHARDS, "divisor": 8},
    "pt": {"format": "pt"},
    "bmtrain": {"format": "bmtrain"},
    "mlx": {"format": "mlx"},
    "gguf": {"format": "gguf"},
    "fp8": {"format": "fp8"},
    "neuron": {"format": "neuron"},
}  # fmt: skip
#: An output of dconv that is in the way, and is replaced.
OVER: Final = "torch_dist over hf"
ALL: Final = (*CASES, OVER)
#: Of all calls one in so many is tried by default.
STEP: Final = 23


def model_in(folder: Path) -> Path:
    """A Llama of some 100 kB in several files."""
    family = by_name("llama")
    found = write_random(folder / "model", family, config_of(family, num_hidden_layers=2), shard_size=30_000)
    return byte_pairs(found, small=True)


@cache
def _described(model: Path, case: str) -> Job:
    words = CASES["torch_dist" if case == OVER else case]
    return prepare(Request(model, out=model.parent / "out", **words))


def job_of(model: Path, case: str, out: Path) -> Job:
    """A case's conversion to ``out``, which holds an older output where that is the case."""
    if case == OVER and not out.exists():
        run(job_of(model, "hf", out), Settings())
    found = _described(model, case)
    return replace(found, request=replace(found.request, out=out))


def settings_of(case: str, **more: object) -> Settings:
    return Settings(overwrite=case == OVER, **more)  # type: ignore[arg-type]


class InStep:
    """In the place of `dconv.sharding.journal.Flusher`: each task is flushed and noted when it is done, in the same
    thread, so that a run makes the same calls each time, and as many as it can."""

    def __init__(
        self, outputs: Outputs, journal: Journal, before: Callable[[Sequence[Task]], None] | None = None
    ) -> None:
        self._outputs, self._journal, self._before = outputs, journal, before

    def __enter__(self) -> InStep:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, done: Done) -> None:
        self._outputs.sync([done.task.file])
        if self._before is not None:
            self._before([done.task])
        self._journal.append([done])


def in_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rank, "Flusher", InStep)


def each(request: pytest.FixtureRequest, count: int, first: int = 0) -> Iterator[int]:
    """Numbers of calls from 1 to ``count``: all with --long, else some, the last among them."""
    step = 1 if request.config.getoption("--long") else STEP
    yield from sorted({*range(1 + first % step, count + 1, step), count})


def whole_or_none(out: Path, case: str, results: dict[str, dict[str, str]]) -> bool:
    """Whether the new output is there; what is there has all its bytes, be it the new or the old one."""
    if case == OVER:
        aside = next(iter(out.parent.glob("out.replaced-*")), None)
        there = [path for path in (out, aside) if path is not None and path.exists()]
        assert there, "the old output is gone, and the new one is not there"
        if out.exists() and tree_digest(out) == results[case]:
            return True
        assert tree_digest(there[0]) == results["hf"]
        return False
    if not out.exists():
        return False
    assert (out / RECEIPT).is_file()
    assert tree_digest(out) == results[case]
    return True


def goes_on(job: Job, case: str, number: int, expected: dict[str, str]) -> None:
    """Another number of ranks makes the same bytes, and leaves nothing beside them; all of it is removed then."""
    out = job.request.output
    world = 1 + number % 3
    launched = time.time()
    for one in range(world):
        run(job, settings_of(case, rank=one, world=world, resume=True, launched=launched))
    assert tree_digest(out) == expected
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    shutil.rmtree(out)
