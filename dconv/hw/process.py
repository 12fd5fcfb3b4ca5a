"""A compiler, run: in a process group of its own, its words kept and passed on, with an end if it finds none."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from dconv.errors import Preempted, StorageFault, ToolMissing

#: How often it is looked at whether a compiler is to be stopped, in seconds.
_EVERY: Final = 0.1
#: How long it may take to leave when it is told to, in seconds.
_PATIENCE: Final = 5.0
#: Last lines of a log that an error shows.
_SHOWN: Final = 6
#: How a full disk reads in the words of C, Python and shells.
_FULL: Final = re.compile(r"No space left on device|ENOSPC|Disk quota exceeded|errno 28\b", re.IGNORECASE)
#: What ends a process for want of memory: the kernel's SIGKILL.
_KILLED: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)


@dataclass(frozen=True)
class Ran:
    """A compiler that came to its end and said that all is well.

    Attributes:
        seconds: from its start to its end.
        log: all that it printed.
    """

    seconds: float
    log: str


def run(
    argv: list[str],
    log: Path,
    *,
    cwd: Path,
    environment: Mapping[str, str],
    timeout: float,
    told: Callable[[str], None],
    stopped: Callable[[], bool],
    words: str,
) -> Ran:
    """Run a compiler to its end.

    Args:
        argv: the program and its arguments.
        log: gets all that it prints.
        cwd: where it runs.
        environment: added to this process's own.
        timeout: seconds.
        told: gets each line that it prints.
        stopped: whether this process was asked to leave.
        words: what it is called.

    Raises:
        ToolMissing: it failed, or took longer.
        StorageFault: it found no room on the disk, or its words cannot be kept.
        Preempted: this process was asked to leave.
    """
    began = time.monotonic()
    with log.open("wb", buffering=0) as kept:
        try:
            process = subprocess.Popen(
                argv, cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as fault:
            raise ToolMissing(f"{words} does not start", where=argv[0], found=str(fault)) from fault
        faults: list[OSError] = []
        reader = threading.Thread(target=_read, args=(process, kept, told, faults), daemon=True)
        reader.start()
        while process.poll() is None and not faults:
            late = time.monotonic() - began > timeout
            if late or stopped():
                _end(process)
                reader.join(_PATIENCE)
                if not late:
                    raise Preempted(f"stopped while {words} was compiling", do="run again: what was prepared is kept")
                raise ToolMissing(
                    f"{words} took longer than it may, and was stopped",
                    where=str(log),
                    expected=f"an end within {timeout:g} s",
                    found=tail(log) or "not a word",
                    do="--toolchain-timeout SECONDS gives it longer",
                )
            time.sleep(_EVERY)
        _end(process)  # what it may have left in the background, which still holds the pipe
        reader.join(_PATIENCE)
    if faults:
        raise StorageFault(f"the words of {words} cannot be kept", where=str(log), found=str(faults[0])) from faults[0]
    said = log.read_text(errors="replace")
    if process.returncode:
        _raise(process.returncode, said, log, words)
    return Ran(time.monotonic() - began, said)


def _raise(code: int, said: str, log: Path, words: str) -> None:
    last = tail(log)
    if _FULL.search(said):
        raise StorageFault(f"{words} found no room on the disk", where=str(log), found=last)
    how = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    raise ToolMissing(
        f"{words} failed ({how})",
        where=str(log),
        found=last or "not a word",
        do="memory ran out, most likely: compile where there is more" if code in _KILLED else "",
    )


def _read(process: subprocess.Popen[bytes], kept: FileIO, told: Callable[[str], None], faults: list[OSError]) -> None:
    with contextlib.suppress(ValueError, OSError):  # the log is closed under a reader that was given up
        for line in process.stdout or ():
            try:
                kept.write(line)
            except OSError as fault:
                faults.append(fault)  # unread, the compiler would wait for ever
                return
            told(line.decode(errors="replace").rstrip())


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group: compilers start others."""
    for number, wait in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            if number == signal.SIGTERM and _group_is_gone(process.pid):
                return


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def tail(log: Path) -> str:
    """The last lines of a log that are not empty, six at most; nothing of one that cannot be read."""
    with contextlib.suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(line[:200] for line in lines[-_SHOWN:])
    return ""
