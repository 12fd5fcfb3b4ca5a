"""``dconv formats``: the conversion matrix, and everything that has a name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dconv.commands.common import add_list_options as options
from dconv.launch.terminal import show, show_json

__all__ = ["options", "run"]


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """List them."""
    from dconv import matrix
    from dconv.formats import outsiders
    from dconv.report.formats import known, parts

    args = parser.parse_args(words)
    if args.json:
        show_json({**known(), "outside": dict(outsiders())})
    elif args.markdown:
        show(matrix.markdown())
    else:
        also = (f"writes (FORMAT)  {name}, by {engine}, an entry point" for name, engine in outsiders().items())
        show(*parts(), *also)
    return 0
