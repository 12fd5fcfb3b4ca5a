"""``dconv history``: past runs, one of them, and the same again."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dconv.errors import UsageError
from dconv.launch import history
from dconv.launch.terminal import show, show_json
from dconv.report.table import Table

_SHOWN: Final = 20


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("verb", nargs="?", choices=("show", "rerun"), help="one run, by its number")
    parser.add_argument("number", nargs="?", type=int, metavar="ID")
    parser.add_argument("--all", action="store_true", help=f"all runs (the last {_SHOWN})")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show where an internal error happened")


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        UsageError: no such run, or its directory is gone.
        StorageFault: see `dconv.launch.history.runs`.
    """
    again = list(words[:1]) == ["rerun"]
    args = parser.parse_args(words[:2] if again else words)
    path = history.place()
    if path is None:
        raise UsageError("no history is kept", where=f"{history.VARIABLE}={os.environ.get(history.VARIABLE, '')}")
    if args.verb is None:
        found = history.runs(path, most=0 if args.all else _SHOWN)
        if args.json:
            show_json(found)
        else:
            show(table(found) if found else f"no run yet in {path}")
        return 0
    if args.number is None:
        raise UsageError(
            "which run?", where=f"dconv history {args.verb}", do="its number stands first in dconv history"
        )
    one = next(iter(history.runs(path, number=args.number)), None)
    if one is None:
        raise UsageError("there is no such run", where=f"{args.verb} {args.number}", found=str(path))
    if again:
        return _again(one, words[2:])
    if args.json:
        show_json(one)
    else:
        show(_told(one))
    return 0


def _again(one: Mapping[str, Any], more: Sequence[str]) -> int:
    from dconv.commands import table as commands

    if not Path(one["directory"]).is_dir():
        raise UsageError("the directory of that run is gone", where=one["directory"])
    os.chdir(one["directory"])
    return commands.run("convert", [*one["words"], *more])


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row a run."""
    rows = [
        (
            str(one["id"]),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one["started"])),
            one["state"],
            _lasted(one["seconds"]),
            f"{one['bytes_written'] / 1e9:.2f} GB" if one["bytes_written"] and one["state"] == "done" else "",
            f"{one['source']} -> {one['format']}  {one['target']}",
        )
        for one in found
    ]
    return Table(rows)


def _told(one: Mapping[str, Any]) -> str:
    rate = f", {one['rate'] / 1e9:.2f} GB/s" if one["rate"] else ""
    ranks = f"{one['ranks']} rank{'s' * (one['ranks'] > 1)} on {one['host']}"
    said = {
        "run": f"{one['id']}, {one['state']}" + (f" (exit code {one['code']})" if one["code"] else ""),
        "command": shlex.join(["dconv", "convert", *one["words"]]),
        "in": one["directory"],
        "when": f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one['started']))}, {_lasted(one['seconds'])}",
        "by": ranks,
        "read": f"{one['bytes_read'] / 1e9:.2f} GB of {one['family']}" if one["bytes_read"] else "",
        "wrote": f"{one['bytes_written'] / 1e9:.2f} GB{rate}  ->  {one['target']}" if one["bytes_written"] else "",
        "plan": one["plan"] or "",
        "source": f"{one['source']}  {one['source_digest'] or ''}",
        "target": one["target_digest"] or "",
        "error": (one["error"] or "").replace("\n", "\n         "),
    }
    return "\n".join(f"{key:<8} {value}".rstrip() for key, value in said.items() if value)


def _lasted(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
