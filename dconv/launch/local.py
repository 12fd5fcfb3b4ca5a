"""Ranks of this machine without a launcher of its own: this process is one, and starts the others."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dconv.errors import Preempted
from dconv.launch.history import Record
from dconv.launch.place import Place
from dconv.launch.process import Stop, say
from dconv.launch.worker import main

if TYPE_CHECKING:
    from subprocess import Popen

#: Seconds that a rank of ours has to leave once another one has failed; launchers wait as long.
_PATIENCE: Final = 30.0


def run(argv: Sequence[str], args: argparse.Namespace, count: int, record: Record) -> int:
    """Run ``count`` ranks on this machine: this process is rank 0, the others are children with the same options."""
    import subprocess

    launched = time.time()
    stop = Stop()  # before there are children, that a signal to this process must not leave behind
    code = 1
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # where calibrating ranks meet
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    children: list[Popen[bytes]] = []
    try:
        for rank in range(1, count):
            variables = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            words = [sys.executable, "-m", "dconv.launch", *argv]
            children.append(subprocess.Popen(words, env={**os.environ, **variables}))
        threading.Thread(target=_tell, args=(stop, children), daemon=True).start()
        code = main(args, Place(0, count, 0, launched, record), stop)
    finally:
        codes = _finish(children, stop=bool(code))
    lost = [rank for rank, c in enumerate(codes, 1) if c > 128]
    if code == 0 and lost and args.verify == "none" and not args.quiet and not stop.is_set():
        say(f"rank {', '.join(map(str, lost))} was killed; the others have done its part", sys.stderr)
    if code == 0 and args.verify == "none":
        codes = [c for c in codes if c <= 128]  # what the lost were at is done: this rank ends at a whole output only
    failed = [c for c in (code, *codes) if c]
    preempted = Preempted.exit_code
    return next((c for c in failed if c != preempted), failed[0] if failed else 0)


def _tell(stop: Stop, children: Sequence[Popen[bytes]]) -> None:
    """Pass a signal on, as launchers do: ranks that work together leave together."""
    stop.wait()
    for child in children:
        if child.poll() is None:
            child.terminate()


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _finish(children: Sequence[Popen[bytes]], *, stop: bool) -> list[int]:
    """Wait for the ranks, or tell all of them to leave, which then have the same time; their exit codes."""
    for child in children:
        if stop and child.poll() is None:
            child.terminate()
    until = time.monotonic() + _PATIENCE if stop else None
    return [_ended(child, until) for child in children]


def _ended(child: Popen[bytes], until: float | None) -> int:
    """The exit code of a rank, which is killed once it is time; 128 and more is a signal's."""
    import subprocess

    try:
        code = child.wait(None if until is None else max(until - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:  # it waits for a rank that is not there; what it has finished is kept
        child.kill()
        return Preempted.exit_code if child.wait() else 0
    if until is not None and code == -signal.SIGTERM:  # it had not begun to listen
        return Preempted.exit_code
    return code if code >= 0 else 128 - code
