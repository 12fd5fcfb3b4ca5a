"""Conversions that wait in their midst until a test has done to them what it came for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import PATIENCE, ROOT

#: Loaded by every process of a run. Each does some tasks, and waits with the next until a file is there or a signal
#: has come. Product code has no such hook.
HOOK = """
import os, pathlib, time
if os.environ.get("HELD_GATE"):
    from dconv.launch.process import Stop
    from dconv.sharding.execute import Worker
    gate, left, leaving = pathlib.Path(os.environ["HELD_GATE"]), int(os.environ["HELD_AFTER"]), False
    real_do, real_told = Worker.do, Stop._told
    def told(self, number):
        global leaving
        leaving = True
        real_told(self, number)
    def do(self, task):
        global left
        left -= 1
        while left < 0 and not leaving and not gate.exists():
            time.sleep(0.02)
        return real_do(self, task)
    Worker.do, Stop._told = do, told
"""


class Gate:
    """Holds the processes that are started with `variables` once each has done ``after`` tasks."""

    def __init__(self, folder: Path, after: int = 3) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(HOOK)
        self._file = folder / "open"
        path = os.pathsep.join([str(folder), str(ROOT)])
        self.variables = {"PYTHONPATH": path, "HELD_GATE": str(self._file), "HELD_AFTER": str(after)}

    def open(self) -> None:
        self._file.touch()


def journals(out: Path) -> dict[int, int]:
    """Of each process that has noted something beside ``out``: its id, and how many lines it wrote."""
    found: dict[int, int] = {}
    for path in out.parent.glob(f"{out.name}.partial-*/.dconv/journal/[0-9]*"):
        lines = path.read_bytes().count(b"\n")
        if lines:
            found[int(path.name.split("-")[1])] = lines
    return found


def until(met: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    """Wait for something that must come.

    Raises:
        TimeoutError: it did not, or who was to bring it about has ended.
    """
    end = time.monotonic() + PATIENCE
    while not met():
        if time.monotonic() > end or not alive():
            raise TimeoutError("what the test waits for did not come")
        time.sleep(0.05)
