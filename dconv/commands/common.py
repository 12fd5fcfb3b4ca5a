"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """``--json`` and ``--debug``."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show where an internal error happened")


def add_list_options(parser: argparse.ArgumentParser) -> None:
    """Those of a command that prints one of the README's tables."""
    add_answer_options(parser)
    parser.add_argument("--markdown", action="store_true", help="print the README's table")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """A checkpoint, and what it does not say of itself."""
    from dconv.launch.options import add_model_options

    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint directory, or a state dict's file")
    add_model_options(parser)
    add_answer_options(parser)


def given(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, for an engine from outside."""
    ours = ("model", "format", "out", "config", "json", "quiet", "debug", "world", "trace", "save_config")
    every = vars(args).items()
    return {name: value for name, value in every if name not in ours and value != parser.get_default(name)}


def described(args: argparse.Namespace) -> dict[str, Any]:
    """What was said of a source, by the keywords of `dconv.inspect` and `dconv.check`."""
    return {
        "source_format": args.source_format,
        "model_type": args.model_type,
        "hf_config": args.hf_config,
        "drop": tuple(args.drop),
        "rename": args.rename,
        "submodel": args.submodel,
        "with_eagle": args.with_eagle,
    }
