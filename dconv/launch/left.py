"""``python -m dconv.launch.left MODEL FORMAT …``: how many tasks stopped runs of a conversion have finished.

For a batch script that asks whether a run came further than the one before it, and is worth another one. Reads
journals alone: no plan is made.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from glob import escape
from pathlib import Path

from dconv.errors import DconvError
from dconv.launch.options import add_target_options, parse, to_request
from dconv.launch.process import say
from dconv.launch.run_options import add_run_options
from dconv.launch.terminal import tell
from dconv.sharding.journal import good_words


def finished(out: Path) -> int:
    """Tasks that any journal beside ``out`` calls done; of a compiler's input also in the folder that it is made in."""
    count = 0
    name = escape(out.name)
    for pattern in (f"{name}.partial-*", f"{name}.compile-*/*.partial-*"):
        for partial in out.parent.glob(pattern):
            done: set[str] = set()
            for path in partial.glob(".dconv/journal/*"):
                with contextlib.suppress(OSError):  # committed meanwhile
                    done |= {words[1] for words in good_words(path.read_bytes()) if words[0] == "done"}
            count += len(done)
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Print how many tasks of a conversion are finished; returns the exit code."""
    parser = argparse.ArgumentParser("python -m dconv.launch.left", allow_abbrev=False)
    add_target_options(parser)
    add_run_options(parser)
    try:
        say(finished(to_request(parse(parser, sys.argv[1:] if argv is None else argv)).output))
    except DconvError as error:
        tell(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
