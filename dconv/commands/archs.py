"""``dconv archs``: the model families, and what becomes of each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dconv.commands.common import add_list_options
from dconv.errors import UsageError
from dconv.launch.terminal import show, show_json
from dconv.report.table import Table

if TYPE_CHECKING:
    from dconv.report.archs import Directions

_FORMS: Final = ("md", "html", "pdf")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_list_options(parser)
    parser.add_argument("--format", choices=_FORMS, help="the families by what they are read from, written as and "
                        "handed to: as Markdown, one HTML page, or a PDF (default: as -o ends)")  # fmt: skip
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="write that table to FILE")
    parser.add_argument("--overwrite", action="store_true", help="replace a FILE that is such a table")


def run(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """List them, or write the table.

    Raises:
        UsageError: options that contradict each other; FILE exists.
        ToolMissing: what writes a PDF is not installed.
        StorageFault: FILE cannot be written.
    """
    args = parser.parse_args(words)
    if args.format is not None or args.out is not None:
        _write(args)
        return 0
    if args.overwrite:
        raise UsageError("--overwrite without a FILE", where="--overwrite", expected="-o FILE beside it")
    from dconv.arch.about import lines, markdown
    from dconv.arch.registry import families

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


def _write(args: argparse.Namespace) -> None:
    from dconv.report.archs import MARK, markdown, page
    from dconv.report.archs_pdf import pdf
    from dconv.report.parts import require_place, write_whole

    given = [name for name in ("markdown", "json") if getattr(args, name)]
    if given:
        raise UsageError("two forms of a list at once", where=f"--{given[0]} beside --format, -o", do="leave one out")
    out: Path | None = args.out
    ends = {".md": "md", ".html": "html", ".htm": "html", ".pdf": "pdf"}
    form = args.format or ends.get(out.suffix.lower() if out else "", "md")
    if out is None and form == "pdf":
        raise UsageError("a PDF is no text for a terminal", where="--format pdf", expected="-o FILE beside it")
    if out is not None:
        require_place(out, MARK, overwrite=args.overwrite)
    table = _directions()
    made = pdf(table) if form == "pdf" else f"{(page if form == 'html' else markdown)(table)}\n".encode()
    if out is None:
        show(made.decode().rstrip())
    else:
        write_whole(out, made, MARK, overwrite=args.overwrite)


def _directions() -> Directions:
    """The table of today, with what other packages add to it."""
    from datetime import date

    from dconv.arch.registry import families
    from dconv.directions import columns, lines
    from dconv.formats import outsiders
    from dconv.report.archs import Directions

    known = columns(outsiders())
    return Directions(date.today(), known, lines(families().values(), known))
