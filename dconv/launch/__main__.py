"""``torchrun --nproc-per-node 8 -m dconv.launch MODEL FORMAT -o OUT --tp 8``: one rank of a conversion."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from dconv.launch.process import Stop, leave_code, tolerate


def main(argv: Sequence[str] | None = None) -> int:
    code = 1
    try:
        code = _run(argv)
    except SystemExit as left:  # argparse's way out
        code = left.code if isinstance(left.code, int) else 2
        raise
    finally:
        leave_code(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    stop = Stop()  # before the imports that take a while
    tolerate()

    from dconv.errors import UsageError
    from dconv.launch.options import add_target_options, parse
    from dconv.launch.run_options import add_run_options
    from dconv.launch.worker import main as run_rank
    from dconv.launch.worker import place, recorded, report

    name = "python -m dconv.launch"
    usage = f"{name} MODEL FORMAT [-o OUT] [options]"
    parser = argparse.ArgumentParser(name, usage=usage, description=__doc__, allow_abbrev=False)
    add_target_options(parser)
    add_run_options(parser)
    words = sys.argv[1:] if argv is None else argv
    first = True
    try:
        where = place()
        first = where.local == 0
        args = parse(parser, words)
    except UsageError as error:
        if first:
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
