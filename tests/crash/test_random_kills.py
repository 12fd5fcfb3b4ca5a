"""SIGKILL to some or all of one to eight ranks at any moment, again and again; the next run ends with the same bytes.

Ranks are processes of this one, forked: nothing of them is left but what they put on the disk.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.pipeline import Job, run
from dconv.sharding import stealing
from tests.crash.cases import ALL, goes_on, job_of, settings_of, whole_or_none

#: Runs that are killed, in the longer matrix; and those tried by default.
RUNS, SAMPLE = 500, 10
#: Seconds that a run of the small model takes, about.
_RUN = 0.02


@pytest.mark.parametrize("part", range(10))
def test_killed_at_any_moment(
    small: Path, results: dict[str, dict[str, str]], root: Path, part: int, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest, counted: Callable[[str, int], None],
) -> None:  # fmt: skip
    """Each run is killed up to three times, each time as another number of ranks; some help each other."""
    monkeypatch.setattr(stealing, "_PATIENCE", 0.1)  # what a killed rank was at is soon anyone's
    monkeypatch.setattr(stealing, "_LOOK", 0.05)
    chance = random.Random(part)
    count = RUNS // 10 if request.config.getoption("--long") else SAMPLE // 10
    out = root / "out"
    killed = 0
    for number in range(count):
        case = chance.choice(ALL)
        job = job_of(small, case, out)
        hit = 0
        while hit == 0:  # a run that was done before it could be killed is run once more
            for _ in range(chance.randint(1, 3)):
                hit += _killed(job, case, chance)
                if whole_or_none(out, case, results):
                    break
            if not hit:
                goes_on(job, case, number, results[case])
                job = job_of(small, case, out)
        killed += 1
        goes_on(job, case, number, results[case])
    assert killed == count
    counted("runs killed at random", killed)


def _killed(job: Job, case: str, chance: random.Random) -> int:
    """A run of one to eight ranks, of which some are killed at a moment; how many of them were at work then."""
    world, steal, launched = chance.choice([1, 1, 2, 3, 4, 5, 6, 7, 8]), chance.random() < 0.3, time.time()
    ranks = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _one(job, case, rank=rank, world=world, launched=launched, steal=steal)
        ranks.append(child)
    time.sleep(chance.random() * _RUN * (1 + world / 2))
    victims = ranks if chance.random() < 0.5 else chance.sample(ranks, chance.randint(1, world))
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    endings = {rank: os.waitpid(rank, 0)[1] for rank in ranks}
    for rank, status in endings.items():
        assert os.WIFSIGNALED(status) if rank in victims and os.WIFSIGNALED(status) else status == 0, (rank, status)
    return sum(os.WIFSIGNALED(status) for status in endings.values())


def _one(job: Job, case: str, **settings: object) -> None:
    """One rank, in this process, which never returns."""
    code = 1
    try:
        run(job, settings_of(case, resume=True, **settings))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
