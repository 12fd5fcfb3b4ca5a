"""The parts of docs/ that the code itself says: tables of formats and families, every command's help.

python scripts/docs_reference.py              which pages are not what the code says; exit code 1 where one is not
python scripts/docs_reference.py --write      put it between the markers of the pages
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
DOCS: Final = ROOT / "docs"
#: Columns of a terminal that help is made for; a page has room for them.
_WIDTH: Final = "100"


def formats() -> str:
    """The table of ``dconv formats --markdown``."""
    from dconv import matrix

    return matrix.markdown().strip()


def families() -> str:
    """The table of ``dconv archs --markdown``."""
    from dconv.arch.about import markdown
    from dconv.arch.registry import families as known

    return markdown(known().values()).strip()


def commands() -> str:
    """What each command says of itself."""
    from dconv.cli import COMMANDS

    parts = []
    for name in ("", *COMMANDS):
        title = f"dconv {name}".strip()
        parts.append(f"## {title}\n\n```text\n{said(name)}\n```")
    return "\n\n".join(parts)


def said(command: str) -> str:
    """``dconv COMMAND --help``, without colours."""
    words = [sys.executable, "-m", "dconv", *([command] if command else []), "--help"]
    here = {**os.environ, "COLUMNS": _WIDTH, "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=here, stdin=subprocess.DEVNULL)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


#: Page -> the words of its marker, and what stands behind it.
MADE: Final[Mapping[str, tuple[str, Callable[[], str]]]] = {
    "reference/formats.md": ("dconv formats --markdown", formats),
    "reference/families.md": ("dconv archs --markdown", families),
    "reference/cli.md": ("dconv COMMAND --help", commands),
}


def filled(page: str) -> str:
    """A page as it should be: its own text, and between the markers what the code says.

    Raises:
        ValueError: it has no markers.
    """
    marker, make = MADE[page]
    first, last = f"<!-- {marker} -->\n", "\n<!-- -->"
    before, found, rest = (DOCS / page).read_text().partition(first)
    _, ends, after = rest.partition(last)
    if not found or not ends:
        raise ValueError(f"docs/{page} has no {first.strip()} … {last.strip()}")
    return f"{before}{first}{make()}{last}{after}"


def main() -> int:
    """Say which pages differ, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/")
    args = parser.parse_args()
    differing = [page for page in MADE if filled(page) != (DOCS / page).read_text()]
    for page in differing:
        if args.write:
            (DOCS / page).write_text(filled(page))
        print(f"docs/{page}: {'written' if args.write else 'is not what the code says'}")
    return 1 if differing and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
