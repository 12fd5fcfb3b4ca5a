"""``dconv check``: read a checkpoint or a hand-off back, and run it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dconv.commands.common import add_source_options, described
from dconv.errors import Refused, ToolMissing, UsageError
from dconv.launch.terminal import show, show_json
from dconv.request import spelled


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    from dconv.launch.values import byte_count

    add_source_options(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--no-run", action="store_true", help="read everything, but do not run the model")
    group.add_argument("--force-run", action="store_true", help="run it even if fp32 weights seem not to fit in memory")
    group.add_argument("--max-memory", type=byte_count, metavar="SIZE",
                       help="run it layer by layer where fp32 weights take more (half of what is free)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="weights that look lost (zeros, NaN) are damage: exit 4")
    parser.add_argument("--no-lint", action="store_true",
                        help="do not look for such: that reads all weights once more than their digests")  # fmt: skip


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Do it; 7 where it could not be run for want of a runtime.

    Raises:
        UsageError: options about a checkpoint's weights, of a hand-off.
        DconvError: see `dconv.checking.check`.
    """
    from dconv.checking import check
    from dconv.hw import manifest

    args = parser.parse_args(words)
    if manifest.is_here(args.path):
        said = {
            **described(args),
            **{name: getattr(args, name) for name in ("force_run", "max_memory", "strict", "no_lint")},
        }
        if given := [spelled(name) for name, value in said.items() if value]:
            raise UsageError(
                "a hand-off is checked by its own manifest",
                where=", ".join(given),
                expected="--no-run and --json at most",
                do="dconv check of a checkpoint in it takes the others",
            )
        return _hand_off(args)
    run: dict[str, Any] = {
        "run": not args.no_run,
        "force": args.force_run,
        "max_memory": args.max_memory,
        "strict": args.strict,
        "lint": not args.no_lint,
    }
    found = check(args.path, **described(args), **run)
    if args.json:
        show_json(found.to_dict())
    else:
        show(found.text())
    return 0 if found.run or args.no_run else ToolMissing.exit_code


def _hand_off(args: argparse.Namespace) -> int:
    from dconv.hw.finish import rejudged
    from dconv.hw.manifest import read
    from dconv.hw.registry import adapter, target_of

    said = read(args.path)
    if target_of(said["target"]) is None:
        raise Refused("no compiler is called this", where=str(args.path), found=f"{said['target']!r:.80}")
    said = rejudged(adapter(said["target"]), args.path)
    how = f"whole      {said['kind']} for {said['platform']}, {len(said['files'])} files as they were written"
    if args.json:
        show_json({"path": str(args.path), **said})
    else:
        show(how)
    return 0
