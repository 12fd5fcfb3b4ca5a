"""``torchrun --nproc-per-node 8 -m dconv.launch MODEL FORMAT -o OUT --tp 8``: one rank of a conversion."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dconv.errors import UsageError
from dconv.launch.options import add_run_options, add_target_options, parse
from dconv.launch.worker import main as run_rank
from dconv.launch.worker import place, report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m dconv.launch", description=__doc__)
    add_target_options(parser)
    add_run_options(parser)
    where = place()
    try:
        args = parse(parser, sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        if where.local == 0:
            report(error, as_json=False)
        return error.exit_code
    return run_rank(args, where)


if __name__ == "__main__":
    sys.exit(main())
