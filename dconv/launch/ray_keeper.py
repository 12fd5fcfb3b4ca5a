"""What an actor of Ray does here: it keeps one child process, which is a rank like those of any other launcher.

The child has a process of its own, so that its signals, exit codes and memory are its own, and Ray's are Ray's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dconv.errors import Preempted
from dconv.launch.progress import NOTES

#: Seconds that what a child has said may take to arrive once it has ended: others may hold its output open.
_LAST_WORDS: Final = 5.0
#: Calls that a keeper answers at a time: `Keeper.run` lasts as long as the child.
CALLS: Final = 4


@dataclass(frozen=True, slots=True)
class Heard:
    """What a child has said since it was asked the last time, and how far it is."""

    out: str = ""
    err: str = ""
    note: Mapping[str, int] = field(default_factory=dict[str, int])


class Keeper:
    """One child. Its methods are called by several threads: `run` lasts until the child has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False
        self._said: dict[str, list[str]] = {"out": [], "err": []}
        self._aside = tempfile.TemporaryDirectory(prefix="dconv-rank-")
        self._notes = Path(self._aside.name) / "notes.json"

    def where(self) -> tuple[str, int]:
        """The node's id, and a port that nobody listens at there."""
        import ray

        with socket.socket() as one:
            one.bind(("", 0))
            return ray.get_runtime_context().get_node_id(), one.getsockname()[1]

    def run(self, module: str, words: Sequence[str], directory: str, variables: Mapping[str, str]) -> int:
        """Run ``python -m MODULE WORDS`` to its exit code; below 0 it is a signal's.

        Args:
            module: as Python imports it.
            words: its command line.
            directory: to work in, where this node has it.
            variables: of the environment, beside those of this node.
        """
        with self._lock:
            if self._stopped:
                return Preempted.exit_code
            self._child = subprocess.Popen(
                [sys.executable, "-m", "dconv.launch.tied", str(os.getpid()), module, *words],
                cwd=directory if Path(directory).is_dir() else None,
                env={**os.environ, **variables, NOTES: str(self._notes)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
            )
        child = self._child
        readers = [
            threading.Thread(target=self._read, args=(stream, self._said[name]), daemon=True)
            for name, stream in (("out", child.stdout), ("err", child.stderr))
        ]
        for reader in readers:
            reader.start()
        code = child.wait()
        for reader in readers:
            reader.join(_LAST_WORDS)
        self._aside.cleanup()
        if self._stopped and code == -signal.SIGTERM:  # it had not begun to listen
            return Preempted.exit_code
        return code

    def heard(self) -> Heard:
        """Whole lines that came since the last call, and the latest note."""
        note: Mapping[str, int] = {}
        with contextlib.suppress(OSError, ValueError):  # none yet, or half of one
            note = json.loads(self._notes.read_text())
        with self._lock:
            out, err = ("".join(lines) for lines in self._said.values())
            for lines in self._said.values():
                lines.clear()
        return Heard(out, err, note)

    def stop(self) -> None:
        """Tell the child to leave; one that is not there yet will not come."""
        with self._lock:
            self._stopped = True
            if self._child is not None and self._child.poll() is None:
                self._child.terminate()

    def _read(self, stream: Iterable[str] | None, lines: list[str]) -> None:
        for line in stream or ():
            with self._lock:
                lines.append(line)
