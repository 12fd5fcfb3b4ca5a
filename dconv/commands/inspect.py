"""``dconv inspect``: what a checkpoint is, and what would be refused."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dconv.commands.common import add_source_options, described
from dconv.launch.terminal import show, show_json


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_source_options(parser)
    parser.add_argument("--explain", nargs="?", const=True, default=False, metavar="SCHEME",
                        help="what scales mean and codes cost, measured; of a plain model, --explain fp8")  # fmt: skip
    parser.add_argument("--scale-rule", choices=("floor", "ceil", "even"),
                        help="beside --explain, how MX formats find their powers of two")  # fmt: skip
    parser.add_argument("--lint", action="store_true", help="read all weights, name those that look lost: zeros, NaN")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page: map of layers, scales, modules")


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        DconvError: see `dconv.examine.inspect` and `dconv.report.page.write`.
    """
    from dconv.examine import inspect

    args = parser.parse_args(words)
    asked = {"explain": args.explain, "scale_rule": args.scale_rule, "lint": args.lint}
    report = inspect(args.path, **described(args), **asked)
    if args.html:
        from dconv.report.page import write

        write(args.html, report.html())
    if args.json:
        show_json(report.to_dict())
    else:
        show(report.text())
    return 0
