"""``dconv batch``: many conversions of one file, with a line for each change and a table at the end."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from dconv.errors import UsageError
from dconv.launch.batch import Batch, Here, Job, Result, read
from dconv.launch.process import Stop, say
from dconv.launch.terminal import show, show_json
from dconv.launch.values import number, positive, whole
from dconv.report.table import Table
from dconv.request import spelled


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML or JSON: models, and options of convert")
    parser.add_argument("--workers", type=positive, metavar="N",
                        help="conversions at a time (1; with ray as many as there is room for)")  # fmt: skip
    parser.add_argument("--max-retries", type=whole, default=2, metavar="M",
                        help="attempts after one that storage, a signal or a kill ended (2)")  # fmt: skip
    parser.add_argument("--launcher", choices=("local", "ray"), default="local",
                        help="run each on this machine, or on a node of a Ray cluster (local)")  # fmt: skip
    parser.add_argument("--address", metavar="ADDRESS", help="of the cluster (RAY_ADDRESS, else one on this machine)")
    parser.add_argument("--cpus-per-rank", type=number, metavar="N", help="cores that a rank asks Ray for (1)")
    parser.add_argument("--gpus-per-rank", type=number, metavar="N", help="GPUs that a rank asks Ray for (0)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no line for each change")
    parser.add_argument("--debug", action="store_true", help="show where an internal error happened")


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        UsageError: options of another launcher.
        ToolMissing: no Ray cluster.
        DconvError: see `dconv.launch.batch.read`.
    """
    args = parser.parse_args(words)
    jobs = read(args.file)
    _check(args, jobs)
    stop = Stop()

    def told(one: Result, all_: Sequence[Result]) -> None:
        if not args.quiet and not args.json:
            over = sum(result.state in ("done", "failed") for result in all_)
            say(f"[{over}/{len(all_)}] {one.state:<8} {_line(one)}", sys.stderr)

    with contextlib.ExitStack() as stack:
        if args.launcher == "ray":
            from dconv.launch import ray_batch

            runner = stack.enter_context(ray_batch.cluster(args.address, args.cpus_per_rank, args.gpus_per_rank))
            workers = args.workers or min(len(jobs), ray_batch.MOST)
        else:
            runner, workers = Here(), args.workers or 1
        batch = Batch(jobs, workers, max(args.max_retries, 0), stop, told, runner)
        code = batch.run()
    if args.json:
        show_json([result.to_dict() for result in batch.results])
    else:
        show(*table(batch.results))
    return code


def _check(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Raise where options or conversions are another launcher's."""
    if args.launcher == "ray":
        for job in jobs:
            if job.launcher != "local":
                raise UsageError(
                    "two launchers at once, nothing was written",
                    where=str(job.out),
                    found=f"launcher: {job.launcher}",
                    do="leave it out: Ray starts the conversion",
                )
        return
    given = [name for name in ("address", "cpus_per_rank", "gpus_per_rank") if getattr(args, name) is not None]
    if given:
        raise UsageError(
            "--launcher local has no use for this, nothing was written",
            where=", ".join(map(spelled, given)),
            expected="--launcher ray beside it",
        )


def table(results: Sequence[Result]) -> tuple[Table, str]:
    """A row a conversion, and how many of each state."""
    rows = [
        (
            result.state,
            f"{result.attempts} attempt{'s' * (result.attempts != 1)}",
            f"{result.seconds:.1f} s",
            _line(result),
        )
        for result in results
    ]
    states = [result.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return Table(rows), counts


def _line(result: Result) -> str:
    said = result.said or {}
    if result.state == "failed":
        why = f" ({result.code}: {said.get('what') or said.get('error') or 'killed'})"
    elif result.state == "done":
        written = said.get("bytes_written")
        why = " (was there)" if said.get("already_done") else f" ({written / 1e9:.2f} GB)" if written else ""
    else:
        why = ""
    return f"{result.job.title}  {result.job.out}{why}"
