"""``torchrun --nproc-per-node 8 -m dconv.launch MODEL FORMAT -o OUT --tp 8``: one rank of a conversion."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from dconv.launch.process import Stop, leave_code, no_restart, tolerate

if TYPE_CHECKING:
    from dconv.launch.place import Place


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank, as a launcher starts it: ``python -m dconv.launch``; returns its exit code."""
    stop = Stop()  # before the imports that take a while
    tolerate()

    from dconv.errors import UsageError
    from dconv.launch.place import place
    from dconv.launch.worker import report

    words = sys.argv[1:] if argv is None else argv
    try:
        where = place()
    except UsageError as error:
        report(error, as_json="--json" in words)
        return error.exit_code
    leave_code(where.rank, None)
    stop.leaving = partial(leave_code, where.rank)
    code = 1
    try:
        code = _run(words, where, stop)
    except SystemExit as end:  # argparse's
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        leave_code(where.rank, code)
        if not stop.is_set():
            no_restart(code)
    return code


def _run(words: Sequence[str], where: Place, stop: Stop) -> int:
    from dconv.errors import UsageError
    from dconv.launch.options import add_target_options, parse
    from dconv.launch.run_options import add_run_options
    from dconv.launch.worker import main as run_rank
    from dconv.launch.worker import recorded, report

    name = "python -m dconv.launch"
    usage = f"{name} MODEL FORMAT [-o OUT] [options]"
    parser = argparse.ArgumentParser(name, usage=usage, description=__doc__, allow_abbrev=False)
    add_target_options(parser)
    add_run_options(parser)
    try:
        args = parse(parser, words)
    except UsageError as error:
        if where.local == 0:
            report(error, as_json="--json" in words)
        return error.exit_code
    if where.rank:
        return run_rank(args, where, stop)
    record = recorded([*words, *(["--nproc", str(where.world)] if where.world > 1 else [])], args, where.world)
    code = 1
    try:
        code = run_rank(args, replace(where, record=record), stop)
    finally:
        record.end(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
