"""``dconv convert``: by ranks on this machine, or by those of another launcher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from dconv.commands.common import given
from dconv.errors import ToolMissing, UsageError
from dconv.launch.terminal import show, show_json


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    from dconv.launch.options import add_target_options
    from dconv.launch.run_options import add_launch_options, add_run_options

    add_target_options(parser)
    add_run_options(parser)
    add_launch_options(parser)


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it.

    Raises:
        DconvError: options that contradict each other; what a conversion meets is printed, and is its exit code.
    """
    from dconv.launch import local, worker
    from dconv.launch.options import parse
    from dconv.launch.place import place
    from dconv.launch.run_options import add_launch_options, check_launch

    args = parse(parser, words)
    code = _by_an_engine_from_outside(parser, args)
    if code is not None:
        return code
    check_launch(args)
    if args.save_config is not None:
        from dconv.commands.table import parser_of
        from dconv.launch.options import target, to_request
        from dconv.launch.run_file import save

        if target(args) is None:
            to_request(args)  # what is wrong with them is said first
        save(args.save_config, parser_of("convert"), words)
    here = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_launch_options(here)
    others = here.parse_known_args(words)[1]  # the started ranks know the other options only
    where = place()
    if (args.nproc > 1 or args.launcher != "local") and where.world > 1:
        raise UsageError(
            "two launchers at once",
            where=f"--nproc {args.nproc}" if args.nproc > 1 else f"--launcher {args.launcher}",
            found=f"this process is already rank {where.rank} of {where.world}",
            do="leave it out: the launcher's ranks are used",
        )
    if args.launcher == "slurm":
        from dconv.launch import slurm

        return slurm.submit(args, others)
    if args.launcher == "torchrun":
        from dconv.launch import torchrun

        return torchrun.run(args, others)
    record = worker.recorded(words, args, args.nproc) if where.rank == 0 else where.record
    code = 1
    try:
        if args.launcher == "ray":
            from dconv.launch import on_ray

            code = on_ray.run(args, others, record)
        elif args.nproc == 1:
            code = worker.main(args, replace(where, record=record))
        else:
            code = local.run(others, args, args.nproc, record)
    finally:
        record.end(code)
    return code


def _by_an_engine_from_outside(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int | None:
    """Convert by an entry point's engine, told the options that were given; None where FORMAT is one of ours."""
    from dconv.request import FORMATS

    if args.format in FORMATS:
        return None
    from dconv.formats import outside

    engine = outside(args.format)
    if engine is None:
        return None
    out = args.out or f"{args.model.resolve().name}-{args.format}"
    went, said = engine.convert(args.model, out, **given(parser, args))
    shown = said or {}
    if args.json:
        show_json(shown)
    else:
        show(str(shown.get("error") or f"{args.format}: {'done' if went else 'failed'}"))
    return 0 if went else int(shown.get("exit_code", ToolMissing.exit_code))
