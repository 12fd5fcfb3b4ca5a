"""Runs the commands of pages and writes what they print into the pages, where it is not what stands there.

    python scripts/docs_commands.py docs/howto/gptq.md …          says which outputs differ
    python scripts/docs_commands.py docs/howto/gptq.md --write    puts them in; ``…`` stands for what varies

A new command gets its output so: write a line ``???`` below it. What a reader need not see is cut to ``…`` by hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.docs.commands import masked, matches, read
from tests.docs.runs import Ran, run_page


def _written(path: Path, ran: list[Ran]) -> int:
    """Put outputs into a page, from its end on so that lines keep their numbers; how many differed."""
    lines, differing = path.read_text().splitlines(), 0
    for one in reversed(ran):
        command = one.command
        if not command.said or matches(command.said, one.printed):
            continue
        differing += 1
        first = command.line - 1 + command.typed.count("\n") + 1
        lines[first : first + len(command.said)] = masked(one.printed).splitlines()
    path.write_text("\n".join(lines) + "\n")
    return differing


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    wrong = 0
    for path in args.pages:
        page = read(path.resolve())
        if page.cluster:
            parser.error(f"{path} runs on a cluster: pytest --long tests/cluster/test_pages.py")
        with tempfile.TemporaryDirectory() as folder:
            ran = run_page(page, Path(folder))
        for one in ran:
            if one.command.said and not matches(one.command.said, one.printed):
                wrong += 1
                print(f"{one.command}: $ {one.command.typed}\n{one.printed}", flush=True)
            elif one.code and not one.command.said:
                print(f"{one.command}: ended with {one.code}\n{one.printed}", flush=True)
        if args.write:
            _written(path, ran)
    return 1 if wrong and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
