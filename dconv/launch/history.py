"""Past runs, in one SQLite file of this person's: what was asked, what came of it, and how to ask for it again.

A run is written down by its rank 0, when it starts and when that rank ends. No conversion fails because its history
cannot be written: that is said, once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dconv.errors import DconvError, Preempted, StorageFault
from dconv.hw import manifest
from dconv.launch.process import say
from dconv.sharding.parsed import is_texts
from dconv.sharding.receipt import read_receipt

#: Names the file; ``off`` writes none.
VARIABLE: Final = "DCONV_HISTORY"
#: Seconds that a writer waits for another one.
_WAITING: Final = 30.0
_SCHEMA: Final = """CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, started REAL NOT NULL, ended REAL, host TEXT NOT NULL, pid INTEGER NOT NULL,
    born TEXT NOT NULL, directory TEXT NOT NULL, words TEXT NOT NULL, ranks INTEGER NOT NULL, source TEXT NOT NULL,
    format TEXT NOT NULL, target TEXT NOT NULL, family TEXT, plan TEXT, bytes_read INTEGER, bytes_written INTEGER,
    code INTEGER, error TEXT, source_digest TEXT, target_digest TEXT)"""
_BEGUN: Final = """INSERT INTO runs (started, host, pid, born, directory, words, ranks, source, format, target)
    VALUES (:started, :host, :pid, :born, :directory, :words, :ranks, :source, :format, :target)"""
_ENDED: Final = """UPDATE runs SET ended = :ended, code = :code, error = :error, family = :family, plan = :plan,
    bytes_read = :bytes_read, bytes_written = :bytes_written, source_digest = :source_digest,
    target_digest = :target_digest WHERE id = :id"""
_ASKED: Final = "SELECT * FROM runs WHERE :id IS NULL OR id = :id ORDER BY id DESC LIMIT :most"
_FACTS: Final = ("error", "family", "plan", "bytes_read", "bytes_written", "source_digest", "target_digest")


def place(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where the file is: `VARIABLE`, else under ``XDG_STATE_HOME``; None where it is switched off."""
    said = environment.get(VARIABLE)
    if said is not None:
        return None if said.strip().lower() in ("", "off") else Path(said).expanduser()
    state = environment.get("XDG_STATE_HOME", "")
    base = Path(state) if Path(state).is_absolute() else Path("~/.local/state").expanduser()
    return base / "dconv" / "history.sqlite"


@dataclass
class Record:
    """A run, as it is written down.

    Attributes:
        path: of the file; None writes nothing.
    """

    path: Path | None = None
    _number: int = 0
    _target: Path = Path()
    _facts: dict[str, object] = field(default_factory=dict[str, object])

    def begin(self, words: Sequence[str], source: Path, format: str, target: Path, ranks: int) -> None:
        """Write down that a run starts; paths as they were given."""
        self._target = target.absolute()
        known = {
            "started": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()),
            "directory": str(Path.cwd()), "words": json.dumps(list(words)), "ranks": ranks, "source": str(source),
            "format": format, "target": str(self._target),
        }  # fmt: skip
        self._number = self._write(_BEGUN, known)

    def note(self, **facts: object) -> None:
        """Facts that are known now, of `_FACTS`; written at the end."""
        self._facts |= facts

    def end(self, code: int) -> None:
        """Write down what came of it."""
        if not self._number:
            return
        found = {**dict.fromkeys(_FACTS), **self._facts, **({} if code else digests(self._target))}
        self._write(_ENDED, {**found, "ended": time.time(), "code": code, "id": self._number})

    def _write(self, statement: str, values: Mapping[str, object]) -> int:
        """Execute a statement; the number of the row that it made."""
        if self.path is None:
            return 0
        try:
            with _opened(self.path) as file:
                return file.execute(statement, values).lastrowid or 0
        except (sqlite3.Error, OSError) as fault:
            say(f"history: not written: {self.path}: {fault}", sys.stderr)
            self.path = None
            return 0


def digests(target: Path) -> dict[str, object]:
    """``source_digest`` and ``target_digest`` of what dconv wrote, and its plan's id; nothing without a receipt.

    The target's digest is one over those of its tensors and files; the source's is one over names and sizes of its
    files, of which nobody reads all bytes.
    """
    if (receipt := read_receipt(target)) is not None:
        made = {name: receipt.get(name) for name in ("digest", "frames", "closing", "tensors")}
        source = _digest(receipt.get("source_files"))
        return {"plan": receipt["plan"], "source_digest": source, "target_digest": _digest(made)}
    with contextlib.suppress(DconvError):
        if manifest.is_here(target):
            said = manifest.read(target)
            return {"source_digest": _digest(said.get("source")), "target_digest": _digest(said["files"])}
    return {}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _born(pid: int) -> str:
    """When a process started, which tells it from a later one of the same number; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def _opened(path: Path) -> Generator[sqlite3.Connection]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(path, timeout=_WAITING, isolation_level="IMMEDIATE")
    try:
        with file:
            file.execute(_SCHEMA)
        with file:
            yield file
    finally:
        file.close()


def runs(path: Path, *, number: int | None = None, most: int = 0) -> list[dict[str, Any]]:
    """Runs that were written down, the newest first, with their ``state``.

    Args:
        path: of the file.
        number: that one alone.
        most: how many; 0 is all.

    Raises:
        StorageFault: the file cannot be read.
    """
    if not path.is_file():
        return []
    try:
        file = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_WAITING)
        file.row_factory = sqlite3.Row
        try:
            found = [dict(row) for row in file.execute(_ASKED, {"id": number, "most": most or -1})]
        finally:
            file.close()
        return [_told(run) for run in found]
    except (sqlite3.Error, ValueError, TypeError) as fault:  # the latter of rows that are none of dconv's
        raise StorageFault("the history cannot be read", where=str(path), found=str(fault)) from fault


def _told(run: dict[str, Any]) -> dict[str, Any]:
    run["words"] = json.loads(run["words"])
    if not is_texts(run["words"]):
        raise ValueError(f"words of a command: {run['words']!r:.80}")
    run["seconds"] = None if run["ended"] is None else run["ended"] - run["started"]
    if run["code"] == 0 and run["target_digest"] is None:  # its rank 0 ended before the rank that commits
        made = digests(Path(run["target"]))
        if made and made.get("plan", run["plan"]) == run["plan"]:
            run |= made
    run["state"] = _state(run)
    whole = run["state"] == "done" and run["bytes_written"] and run["seconds"]
    run["rate"] = run["bytes_written"] / run["seconds"] if whole else None
    return run


def _state(run: Mapping[str, Any]) -> str:
    """done, failed, preempted, running, lost (killed), or unknown: only another machine, or the output, could say."""
    if run["code"] is None:
        if run["host"] != socket.gethostname():
            return "unknown"
        return "running" if run["born"] and _born(run["pid"]) == run["born"] else "lost"
    if run["code"] == Preempted.exit_code:
        return "preempted"
    if run["code"]:
        return "failed"
    return "done" if run["target_digest"] else "unknown"
