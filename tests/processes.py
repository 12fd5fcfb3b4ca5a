"""dconv in processes of its own: started outside this test's own launcher, waited for with patience, killed whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Seconds. What takes longer hangs.
PATIENCE = 300
#: Variables of launchers that these tests may themselves run under.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "TORCHELASTIC", "MASTER_")

_running: set[subprocess.Popen[str]] = set()


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    """A command in a session of its own that imports dconv from here; ``variables`` are added to its environment."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    process = subprocess.Popen(
        command,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _running.add(process)
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error, once all that hold these have closed them.

    Raises:
        subprocess.TimeoutExpired: it hangs, and was killed.
    """
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except BaseException:
        kill(process)
        raise
    _running.discard(process)
    return process.returncode, out, err


def call(*command: str, **variables: str) -> tuple[int, str, str]:
    """`start` and `ended`."""
    return ended(start(*command, **variables))


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process and all that it started; returns when they have let go of its output."""
    others = list(_descendants(process.pid))  # torchrun's ranks are in sessions of their own
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    _running.discard(process)


def _descendants(pid: int) -> Iterator[int]:
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, listed.read_text().split()):
                yield from _descendants(child)
                yield child


def kill_all() -> None:
    """`kill` to what a test started and did not see the end of."""
    for process in list(_running):
        kill(process)


def one_rank(*words: object) -> list[str]:
    """The command of one rank: what a launcher starts, or a person by hand."""
    return [sys.executable, "-m", "dconv.launch", *map(str, words)]


def local(count: int, *words: object) -> list[str]:
    """The command of a conversion by ``count`` ranks on this machine."""
    return [sys.executable, "-m", "dconv", "convert", *map(str, words), "--nproc", str(count)]
