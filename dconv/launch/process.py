"""What a process owes to whoever started it: an answer to a signal, and words that arrive as far as they can."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final, NoReturn, TextIO

from dconv.errors import Damaged, Preempted, Refused, ToolMissing, UsageError, VerifyFailed

#: The signals of a preemption, and Ctrl-C.
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
#: Seconds that a stopped planning has to unwind. A download's threads are waited for on the way, and they hear nothing.
_UNWIND: Final = 2.0
#: Names a folder of whoever started the ranks, for their exit codes: torchrun ends with 1 whatever a rank ended with.
EXIT_CODES: Final = "DCONV_EXIT_CODES"
#: How a conversion ends that ends the same way when it is started again.
_ANSWERS: Final = frozenset(error.exit_code for error in (UsageError, Refused, Damaged, VerifyFailed, ToolMissing))


class Stopped(KeyboardInterrupt):
    """A signal ended the planning. No `Exception`: a library that retries or rewords those must let it pass."""


class Stop(threading.Event):
    """Set by a signal, instead of ending this process at once; a `planning` is ended by it, too."""

    def __init__(self) -> None:
        super().__init__()
        self._planning = False
        self._ending = False
        self._grace = 0.0
        self._last_words: Callable[[], None] = lambda: None
        #: Told the exit code where the process ends at once.
        self.leaving: Callable[[int], None] = lambda _: None
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self._told(number))

    @contextlib.contextmanager
    def planning(self, grace: float, last_words: Callable[[], None]) -> Generator[None]:
        """Until the end of this block a signal raises `Stopped`.

        Args:
            grace: seconds to wait with it, in which the planning may still come to its own end; none after Ctrl-C.
            last_words: called when the planning could not be unwound, just before the process ends.
        """
        self._grace, self._last_words, self._ending = grace, last_words, False
        before = signal.signal(signal.SIGALRM, lambda _, __: self._end())
        threads = set(threading.enumerate())
        self._planning = True
        try:
            if self.is_set():  # told before it began
                self._told(signal.SIGTERM)
            yield
        except Stopped:
            if any(not thread.daemon for thread in set(threading.enumerate()) - threads):
                self._leave()  # Python's own exit would wait for them
            raise
        finally:
            self._planning = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _told(self, number: int) -> None:
        self.set()
        if not self._planning:
            return
        if number == signal.SIGINT or not self._grace:
            self._end()
        elif not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, self._grace)

    def _end(self) -> None:
        if self._ending:  # asked twice, or not unwound in time
            self._leave()
        self._ending = True
        signal.setitimer(signal.ITIMER_REAL, _UNWIND)
        raise Stopped

    def _leave(self) -> NoReturn:
        self._last_words()
        self.leaving(Preempted.exit_code)
        os._exit(Preempted.exit_code)


def preempted() -> Preempted:
    """The error of a run that was stopped before its first byte."""
    return Preempted("stopped by a signal, nothing was written", do="run the same command again")


def tolerate() -> None:
    """Let the standard streams print any name, also one that no encoding has (half of a surrogate pair)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: object, stream: TextIO | None = None) -> None:
    """Print a line, on standard output by default; a reader that has gone (head, less, true) has seen enough."""
    at = stream or sys.stdout
    try:
        print(text, file=at, flush=True)
    except BrokenPipeError:
        mute(at)


def mute(stream: TextIO) -> None:
    """Turn a stream whose reader has gone to nowhere: Python's flush at exit would fail on it once more."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def tell_torchrun(text: str) -> None:
    """Leave an error where torchrun looks for it: it prints a table of failures last, with this as the root cause.

    Source of the form: ``ErrorHandler`` in ``torch/distributed/elastic/multiprocessing/errors/error_handler.py``.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # it is said on standard error as well
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def leave_code(rank: int, code: int | None) -> None:
    """Leave the exit code of a rank where `EXIT_CODES` asks for it; None takes an earlier start's away."""
    folder = os.environ.get(EXIT_CODES)
    if not folder:
        return
    file = Path(folder) / str(rank)
    with contextlib.suppress(OSError):  # the process itself ends with it, too
        if code is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(f"{code}\n")


def left_codes(folder: Path, ranks: int) -> list[int | None]:
    """What each rank left in a folder that `EXIT_CODES` named; None for one that was killed before it could."""
    codes: list[int | None] = []
    for rank in range(ranks):
        try:
            codes.append(int((folder / str(rank)).read_text()))
        except (OSError, ValueError):
            codes.append(None)
    return codes


def no_restart(code: int) -> None:
    """End torchrun where it would start this rank again for an exit code that is an answer.

    torchrun starts ranks again whatever they ended with, and none after a signal of its own. One rank of a machine
    tells it: a second signal would end it before its ranks.
    """
    variables = os.environ
    left = int(variables.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(variables.get("TORCHELASTIC_RESTART_COUNT", 0))
    error_file = variables.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/LOCAL RANK/error.json
    if code not in _ANSWERS or left <= 0 or not error_file:
        return
    with contextlib.suppress(OSError):
        (Path(error_file).parents[1] / "answered").touch(exist_ok=False)
        os.kill(os.getppid(), signal.SIGTERM)
