"""``dconv doctor``: which runtimes and compilers are here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dconv.commands.common import add_answer_options
from dconv.launch.terminal import show, show_json


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--toolchain-python", type=Path, metavar="PYTHON", help="look for toolchains there, too")
    add_answer_options(parser)


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Look for them."""
    from dconv.report.doctor import examined, parts

    args = parser.parse_args(words)
    said = examined(args.toolchain_python)
    if args.json:
        show_json(said)
    else:
        show(*parts(said))
    return 0
