"""``dconv archs``: the model families."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dconv.commands.common import add_list_options as options
from dconv.launch.terminal import show, show_json
from dconv.report.table import Table

__all__ = ["options", "run"]


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """List them."""
    from dconv.arch.about import lines, markdown
    from dconv.arch.registry import families

    args = parser.parse_args(words)
    known = list(families().values())
    if args.json:
        keys = ("family", "models", "layouts", "note", "shown")
        said = [dict(zip(keys, line, strict=True)) for line in lines(known)]
        architectures = {family.name: family.config.architecture for family in known}
        show_json([{**line, "architecture": architectures[line["family"]]} for line in said])
    elif args.markdown:
        show(markdown(known).rstrip())
    else:
        table = Table([(name, models, sizes, shown) for name, models, sizes, _, shown in lines(known)])
        show(table, "", "All of them: HuggingFace to Megatron (torch_dist, legacy), back, and Megatron to Megatron.")
    return 0
