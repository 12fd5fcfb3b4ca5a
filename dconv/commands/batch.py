"""``dconv batch``: many conversions of one file, with a line for each change and a table at the end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dconv.launch.batch import Batch, Result, read
from dconv.launch.process import Stop, say
from dconv.launch.values import positive, whole


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML or JSON: models, and options of convert")
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="conversions at a time (1)")
    parser.add_argument("--max-retries", type=whole, default=2, metavar="M",
                        help="attempts after one that storage, a signal or a kill ended (2)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no line for each change")
    parser.add_argument("--debug", action="store_true", help="show where an internal error happened")


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        DconvError: see `dconv.launch.batch.read`.
    """
    args = parser.parse_args(words)
    jobs = read(args.file)
    stop = Stop()

    def told(one: Result, all_: Sequence[Result]) -> None:
        if not args.quiet and not args.json:
            over = sum(result.state in ("done", "failed") for result in all_)
            say(f"[{over}/{len(all_)}] {one.state:<8} {_line(one)}", sys.stderr)

    batch = Batch(jobs, args.workers, max(args.max_retries, 0), stop, told)
    code = batch.run()
    if args.json:
        say(json.dumps([result.to_dict() for result in batch.results]))
    else:
        say(table(batch.results))
    return code


def table(results: Sequence[Result]) -> str:
    """A line a conversion, and how many of each state."""
    lines = [
        (
            result.state,
            f"{result.attempts} attempt{'s' * (result.attempts != 1)}",
            f"{result.seconds:.1f} s",
            _line(result),
        )
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    states = [result.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return "\n".join([*("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines), counts])


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
