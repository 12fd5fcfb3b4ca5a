"""``--report``: what a rank notes on its way, and the page that the rank which commits writes at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dconv.errors import StorageFault, UsageError, VerifyFailed
from dconv.report.tracks import TICK, Recorder, tracks
from dconv.sharding.finish import STATE
from dconv.sharding.receipt import partial_folder

if TYPE_CHECKING:
    from dconv.pipeline import Job
    from dconv.report.tracks import Track
    from dconv.sharding.rank import Settings


def place_of(report: Path | bool | None, out: Path) -> Path | None:
    """Where the page goes: as was said, or beside the output, which has in it what its receipt names and no more."""
    if report is None or report is False:
        return None
    return out.with_name(f"{out.name}.report.html") if report is True else Path(report)


def check_report(job: Job, report: Path | bool | None) -> None:
    """That the page of a job can be written, before the first byte of the output is.

    Raises:
        UsageError: it would be in the output, or replace something else than a report.
        StorageFault: it cannot be written there.
    """
    if not report:
        return
    partial = partial_folder(job.request.output, job.plan)  # refuses an output without a name, beside which is no place
    path = place_of(report, job.request.output)
    if path is None:
        return
    from dconv.report.conversion_page import check_place

    real = path.absolute().parent.resolve() / path.name
    for folder in (job.request.output, partial):
        if real.is_relative_to(folder.absolute().parent.resolve() / folder.name):
            raise UsageError(
                "the report would lie in the output, nothing was written",
                where=f"--report {path}",
                expected="a place beside it: an output has in it what its receipt names, and no more",
                do=f"--report alone writes {place_of(True, job.request.output)}",
            )
    check_place(path)


@dataclass
class Reporting:
    """What one rank does for the report; nothing where none was asked for.

    Attributes:
        path: of the page; None where none was asked for.
        since: when the run began (seconds since the epoch); ``began`` is this process's own clock at its command.
    """

    job: Job
    path: Path | None
    world: int
    since: float
    began: float
    recorder: Recorder | None = None
    _seconds: float = 0.0
    _tracks: tuple[Track, ...] = field(default=())

    @property
    def state(self) -> Path:
        """The folder of working state, which goes at the commit."""
        return partial_folder(self.job.request.output, self.job.plan) / STATE

    def settings(self, settings: Settings) -> Settings:
        """Settings with which a run notes what it does."""
        if (recorder := self.recorder) is None:
            return settings

        def committing() -> None:
            self._tracks = tuple(tracks(self.state))  # they go at the commit
            settings.committing()

        return replace(settings, committing=committing, watch=recorder)

    def ended(
        self, verify: Callable[[], dict[str, object] | None], *, already: bool = False
    ) -> dict[str, object] | None:
        """Verify, and write the page, also where verification fails; by the rank that committed or found it done.

        Raises:
            VerifyFailed: from ``verify``.
            StorageFault: the page cannot be written; the output is whole.
        """
        if not already:  # the rank that commits may have come late, and what follows is no part of the conversion
            first = min((track.began for track in self._tracks if track.began >= self.since - TICK), default=math.inf)
            self._seconds = max(time.monotonic() - self.began, time.time() - first)
        try:
            verified = verify()
        except VerifyFailed as failure:
            self._write(None, failure, already)
            raise
        self._write(verified, None, already)
        return verified

    def _write(self, verified: Mapping[str, Any] | None, failure: VerifyFailed | None, already: bool) -> None:
        if self.path is None:
            return
        from dconv.report.conversion import Run, conversion_of  # a run without a report does not pay for it
        from dconv.report.conversion_page import page, write

        run = Run(self.world, self._seconds, self.since, self._tracks, already, verified, failure)
        try:
            write(self.path, page(conversion_of(self.job, run)))
        except UsageError as fault:
            raise StorageFault(
                "something came to the report's place meanwhile; the output is whole", where=str(self.path)
            ) from fault


def reporting_of(
    job: Job, report: Path | bool | None, rank: int, world: int, since: float, began: float | None = None
) -> Reporting:
    """What a rank of a job notes, where a report was asked for.

    Args:
        job: the conversion.
        report: where the page goes; True is beside the output, None is none.
        rank: this process's.
        world: how many there are.
        since: when the run began (seconds since the epoch).
        began: its command, by `time.monotonic`; None is now.
    """
    path = place_of(report, job.request.output)
    made = Reporting(job, path, world, since, time.monotonic() if began is None else began)
    if path is not None:
        made.recorder = Recorder(made.state, job.plan, rank, world)
    return made
