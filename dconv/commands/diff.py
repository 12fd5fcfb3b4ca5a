"""``dconv diff``: two checkpoints as logical tensors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dconv.commands.common import add_answer_options
from dconv.launch.terminal import show, show_json


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    from dconv.checkpoint.rename import SUBMODELS

    parser.add_argument("a", type=Path, metavar="A", help="a checkpoint, of any format and layout")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--model-type", metavar="FAMILY", help="model family of both (normally detected)")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="take config.json of both from DIR")
    parser.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave matching tensors out")
    parser.add_argument("--rename", type=Path, metavar="FILE", help="house spellings, of the side that they fit")
    parser.add_argument("--submodel", choices=SUBMODELS, help="of the side that is a distillation checkpoint")
    add_answer_options(parser)


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Compare; 1 where they differ.

    Raises:
        DconvError: see `dconv.compare.diff`.
    """
    from dconv.compare import diff

    args = parser.parse_args(words)
    keys = ("model_type", "hf_config", "rename", "submodel")
    found = diff(args.a, args.b, **{key: getattr(args, key) for key in keys}, drop=tuple(args.drop))
    if args.json:
        show_json(found.to_dict())
    else:
        show(found.text())
    return 0 if found.equal else 1
