"""Many conversions, some at a time, each a process of its own; what is done already is seen by its receipt.

There is no state beside the outputs: a batch that was interrupted goes on when it is run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from dconv.checkpoint.small_config import read_mapping
from dconv.errors import Preempted, StorageFault, UsageError
from dconv.launch.arguments import arguments_of
from dconv.launch.config_file import by_dest, typed
from dconv.launch.options import every_option, to_request
from dconv.sharding.parsed import is_list, is_mapping

MODELS: Final = "models"
#: Seconds before a second attempt; twice as many before each further one.
_BACK_OFF: Final = 2.0
_LONGEST: Final = 60.0
#: Seconds that a conversion has to leave once it was told to, and between two looks at whether it was.
_PATIENCE: Final = 35.0
_TICK: Final = 1.0


@dataclass(frozen=True)
class Job:
    """One of the conversions.

    Attributes:
        words: after ``dconv convert``.
        title: for a person.
        ranks, launcher: how many it starts, and by whom.
        page: of its report, where one is named.
    """

    title: str
    words: tuple[str, ...]
    out: Path
    ranks: int = 1
    launcher: str = "local"
    page: Path | None = None


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        state: waiting, running, done, failed, or stopped.
        said: what the last attempt printed, its result or its error.
        seconds: of all attempts.
    """

    job: Job
    state: str = "waiting"
    attempts: int = 0
    code: int = 0
    said: Mapping[str, Any] | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "model": self.job.title, "out": str(self.job.out), "words": list(self.job.words), "state": self.state,
            "attempts": self.attempts, "code": self.code, "seconds": round(self.seconds, 3), "said": self.said,
        }  # fmt: skip


def read(path: Path) -> list[Job]:
    """The jobs of a file: its ``models``, each with any options of ``dconv convert``; those beside them are everyone's.

    Raises:
        UsageError: no such file, an option that is not known, one that cannot be, or two jobs with one output.
        Refused, Damaged: see `dconv.launch.options.to_request` and `dconv.checkpoint.small_config.read_mapping`.
    """
    values = read_mapping(path, "batch", expected=f"{MODELS}: a list")
    entries = values.pop(MODELS, None)
    if not is_list(entries) or not entries:
        raise UsageError("there is nothing to convert", where=str(path), expected=f"{MODELS}: a list of models")
    jobs = [_job(path, number, values, entry) for number, entry in enumerate(entries, 1)]
    _apart("output", "out: another one for each", [(job, job.out) for job in jobs])
    _apart("report", "report: true  writes each beside its output", [(job, job.page) for job in jobs if job.page])
    return jobs


def _apart(what: str, do: str, places: Sequence[tuple[Job, Path]]) -> None:
    """Raise where two jobs would write to one place: the later one would replace what the other made."""
    seen: dict[Path, Job] = {}
    for job, place in places:
        if (other := seen.setdefault(place.resolve(), job)) is not job:
            raise UsageError(f"two conversions have one {what}, nothing was written", where=str(place),
                             found=f"{other.title}\n{job.title}", do=do)  # fmt: skip


def _job(path: Path, number: int, everyone: Mapping[Any, Any], entry: object) -> Job:
    own: object = {"model": entry} if isinstance(entry, str) else entry
    where = f"{path}, {MODELS}, number {number}"
    if not is_mapping(own):
        raise UsageError("this is no model", where=where, expected="its path, or a mapping of options",
                         found=f"{entry!r:.80}")  # fmt: skip
    parser, place = every_option(), Path(where)
    said = {**by_dest(everyone, place, parser), **by_dest(own, place, parser)}
    found = typed(said, place, parser)
    for name in ("config", "debug", "json"):
        if said.pop(name, None):
            raise UsageError(f"{name} is the batch's own", where=where)
    for name in ("model", "format"):
        if name not in found:
            raise UsageError(f"{name.upper()} is missing", where=where)
    parser.set_defaults(**found)
    args = parser.parse_args([])
    try:
        out = to_request(args).output
    except UsageError as error:
        error.where = f"{where}: {error.where}" if error.where else where
        raise
    page = args.report if isinstance(args.report, Path) else None
    return Job(f"{args.model} -> {args.format}", tuple(_words(parser, said)), out, args.nproc, args.launcher, page)


def _words(parser: argparse.ArgumentParser, said: Mapping[str, object]) -> list[str]:
    """Options as they stand on a line, each value as the file has it; one that begins with a dash is none the less."""
    words = [str(said["model"]), str(said["format"])]
    for action in arguments_of(parser):
        value = said.get(action.dest)
        if not action.option_strings or value is None or value is False:
            continue
        option = action.option_strings[-1]
        if value is True:
            words.append(option)
        else:
            words += [f"{option}={one}" for one in (value if is_list(value) else [value])]
    return words


class Attempt(Protocol):
    """A conversion under way."""

    def stop(self) -> None:
        """Tell it to leave."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def ended(self, seconds: float) -> tuple[int, str, str] | None:
        """Exit code (128 and more is a signal's), standard output and standard error; None if it lasts longer."""
        ...


class Runner(Protocol):
    """What starts conversions: `Here`, or a cluster."""

    def start(self, job: Job, words: Sequence[str]) -> Attempt:
        """Start ``python -m dconv`` with ``words``, which do the job."""
        ...


class Here:
    """Conversions are processes of this machine."""

    def start(self, job: Job, words: Sequence[str]) -> Attempt:  # noqa: ARG002 - where it runs, they share what is there
        """See `Runner`."""
        return _Process([sys.executable, "-m", "dconv", *words])


class _Process:
    def __init__(self, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                         stdin=subprocess.DEVNULL, text=True)  # fmt: skip
        self.stop, self.kill = self._process.terminate, self._process.kill

    def ended(self, seconds: float) -> tuple[int, str, str] | None:
        try:
            out, err = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        code = self._process.returncode
        return 128 - code if code < 0 else code, out, err


class Batch:
    """A run of jobs.

    Args:
        told: called with all results whenever one changes.
    """

    def __init__(
        self, jobs: Sequence[Job], workers: int, retries: int, stop: threading.Event,
        told: Callable[[Result, Sequence[Result]], None], runner: Runner,
    ) -> None:  # fmt: skip
        self.results = [Result(job) for job in jobs]
        self._workers, self._retries, self._stop, self._told = workers, retries, stop, told
        self._runner = runner
        self._lock = threading.Lock()
        self._running: set[Attempt] = set()

    def run(self) -> int:
        """Do all of them; the exit code: 0, that of the first that failed, or that of a stop."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watcher.start()
        with ThreadPoolExecutor(self._workers) as pool:
            list(pool.map(self._do, range(len(self.results))))
        over.set()
        watcher.join()
        if any(result.state in ("waiting", "stopped") for result in self.results):
            return Preempted.exit_code
        return next((result.code for result in self.results if result.code), 0)

    def _watch(self, over: threading.Event) -> None:
        """Pass a stop on."""
        while not over.wait(0.1):
            if self._stop.is_set():
                with self._lock:
                    for attempt in self._running:
                        attempt.stop()
                return

    def _do(self, number: int) -> None:
        while not self._stop.is_set():
            result = self._attempt(number)
            if result.state != "failed" or not _passes(result.code) or result.attempts > self._retries:
                return
            self._set(number, state="waiting")
            self._stop.wait(min(_BACK_OFF * 2 ** (result.attempts - 1), _LONGEST))

    def _attempt(self, number: int) -> Result:
        job = self.results[number].job
        self._set(number, state="running", attempts=self.results[number].attempts + 1)
        began = time.monotonic()
        words = ["convert", *job.words, "--resume", "--json"]
        with self._lock:  # between a look at the stop and the list of those who are told of it nothing starts
            attempt = None if self._stop.is_set() else self._runner.start(job, words)
            if attempt is not None:
                self._running.add(attempt)
        if attempt is None:
            return self._set(number, state="stopped", code=Preempted.exit_code)
        code, said = self._heard(attempt)
        with self._lock:
            self._running.discard(attempt)
        left = (Preempted.exit_code, 128 + signal.SIGTERM, 128 + signal.SIGKILL)
        stopped = self._stop.is_set() and code in left
        state = "stopped" if stopped else "failed" if code else "done"
        seconds = self.results[number].seconds + time.monotonic() - began
        return self._set(number, state=state, code=code, said=said, seconds=seconds)

    def _heard(self, attempt: Attempt) -> tuple[int, Mapping[str, Any]]:
        """The exit code of a conversion, and what it printed, once it has ended."""
        until = math.inf
        while (ended := attempt.ended(_TICK)) is None:
            if self._stop.is_set():
                until = min(until, time.monotonic() + _PATIENCE)
            if time.monotonic() > until:
                attempt.kill()
        code, out, err = ended
        for line in reversed(out.splitlines()):
            with contextlib.suppress(ValueError):  # torn, where it was killed
                if line.startswith("{"):
                    return code, json.loads(line)
        return code, {"error": (err.strip().splitlines() or [""])[-1][:400]}

    def _set(self, number: int, **changes: Any) -> Result:
        with self._lock:
            self.results[number] = replace(self.results[number], **changes)
            self._told(self.results[number], self.results)
            return self.results[number]


def _passes(code: int) -> bool:
    """Whether the same conversion may go well the next time: storage, a preemption, or a process that was killed."""
    return code in (StorageFault.exit_code, Preempted.exit_code) or code > 128
