"""``dconv plan``: what a conversion would read and write, by whom."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dconv.commands.common import add_answer_options, described, given
from dconv.errors import UsageError
from dconv.launch.terminal import show, show_json


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    from dconv.launch.options import add_target_options
    from dconv.launch.run_options import add_save_option
    from dconv.launch.values import positive

    add_target_options(parser)
    parser.add_argument("--world", type=positive, metavar="N", help="show the shares of N ranks (default: one a shard)")
    parser.add_argument("--trace", action="append", default=[], metavar="PATTERN",
                        help="show the way of tensors from file to file; of either side's names")  # fmt: skip
    add_save_option(parser)
    add_answer_options(parser)


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        DconvError: see `dconv.pipeline.prepare`.
    """
    from dconv.examine import price
    from dconv.formats import outsiders
    from dconv.launch.options import parse, target, to_request
    from dconv.pipeline import prepare
    from dconv.report import plan as report
    from dconv.report.trace import text
    from dconv.trace import trace

    args = parse(parser, words)
    if args.format in outsiders() and not target(args):
        said = _planned_outside(parser, args)
        shown = "\n".join(f"{key}: {value}" for key, value in said.items())
    elif target(args):
        from dconv.launch.compiling import planned

        if useless := [option for option, said in (("--world", args.world), ("--trace", args.trace)) if said]:
            raise UsageError(
                "what goes to a hardware compiler is planned by the conversions that make it, nothing was written",
                where=", ".join(useless),
                do="leave it out; dconv plan MODEL huggingface has it of a checkpoint",
            )
        said = planned(args)
        shown = "\n".join(f"{key}: {value}" for key, value in said.items())
    else:
        job = prepare(to_request(args), config_alone=True)
        job = replace(job, trace=trace(job.plan, job.request.parallel, args.trace))
        said = price(job, args.world)
        shown = report.text(said) + (f"\n\n{text(job.trace)}" if job.trace else "")
    if args.save_config is not None:
        from dconv.commands.table import parser_of
        from dconv.launch.run_file import save

        save(args.save_config, parser_of("plan"), words)
    if args.json:
        show_json(said)
    else:
        show(shown)
    return 0


def _planned_outside(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Mapping[str, Any]:
    """What an entry point's engine would do."""
    from dconv.formats import planned

    if own := [f"--{name}" for name in ("world", "trace") if getattr(args, name)]:
        raise UsageError(
            f"{args.format} is planned by its own engine, which has no shares and no ways of tensors",
            where=", ".join(own),
            do="leave it out",
        )
    return planned(args.format, args.model, described(args), given(parser, args))
