"""Known failures of the programs beside dconv, played again on small checkpoints, and what dconv does: docs/duel.md.

python scripts/duel.py                   play all rows and print what was seen (one to three minutes)
python scripts/duel.py --only DCP        those whose key has the word
python scripts/duel.py --write           put the result into docs/duel.json, and the tables into docs/duel.md

Each program runs in a process of its own, on input that this script makes. A verdict is what was found on the disk or
in memory afterwards; none is written down here. Megatron-Bridge is asked where ``scripts/bridge_env.sh`` has installed
it (``--bridge DIR``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where a test loads this file by its path

import duel_stage
from duel_damage import LOST, WRONG
from duel_hostile import OUTSIDE, PICKLES
from duel_moments import MOMENTS
from duel_rows import PARTS, Row, Stage

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "duel.md"
FOUND: Final = ROOT / "docs" / "duel.json"
ROWS: Final[Sequence[Row]] = (*LOST, *WRONG, *OUTSIDE, *PICKLES, *MOMENTS)
#: What the table calls a verdict; in the order from good to bad.
WORDS: Final = {
    "whole": "right: the tensors that went in, bit by bit",
    "error": "a refusal, and nothing is under the final name",
    "late": "an error, after bytes are under the final name",
    "half": "killed, and a half result is under the final name",
    "silent": "success, and the result is wrong or a guess",
    "runs": "it executed what it was given, or read outside of it",
}


def play(stage: Stage, row: Row) -> dict[str, Any]:
    """What a peer and dconv do with one input."""
    return {
        "key": row.key,
        "part": row.part,
        "done": row.done,
        "peer": row.peer,
        "input": row.ours,
        "them": asdict(row.them(stage)),
        "dconv": asdict(row.us(stage)),
    }


def played(rows: Sequence[Row], bridge: Path | None, *, preload: bool = True) -> dict[str, Any]:
    """Play rows, in a temporary folder.

    Args:
        bridge: the python of Megatron-Bridge's environment.
        preload: import all programs at once; for a few rows that is not worth it.
    """
    duel_stage.serve(*duel_stage.PRELOADED, *(duel_stage.PRELOADED_TOO if preload else ()))
    with tempfile.TemporaryDirectory(prefix="duel-") as folder:
        stage = Stage(Path(folder), bridge)
        versions = stage.peer("versions", str(bridge.parents[1] if bridge else "/nowhere")).value
        found = [play(stage, row) for row in rows]
    return {"day": time.strftime("%Y-%m-%d"), "versions": versions, "rows": found}


def tables(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """The parts of the page that follow from what was found."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    made = {"versions": [f"{found['day']}; {versions}."], "score": _score(found["rows"])}
    for part in PARTS:
        made[part] = _table([row for row in found["rows"] if row["part"] == part])
    return made


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| done to the input | by | it did | | dconv did | | dconv's input |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    before = ""
    for row in rows:
        done = row["done"] if row["done"] != before else ""
        before = row["done"]
        cells = [done, row["peer"]]
        for who in ("them", "dconv"):
            cells += [f"**{row[who]['verdict']}**", _cell(row[who]["words"])]
        lines.append("| " + " | ".join([*cells, row["input"]]) + " |")
    return lines


def _cell(text: str) -> str:
    return re.sub(r"([|*_<>\[\]])", r"\\\1", text)


def _score(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of how many rows each verdict is."""
    theirs, ours = (Counter(row[who]["verdict"] for row in rows) for who in ("them", "dconv"))
    lines = ["| | | peers | dconv |", "| --- | --- | --- | --- |"]
    lines += [f"| **{word}** | {means} | {theirs[word]} | {ours[word]} |" for word, means in WORDS.items()]
    if theirs["not installed"]:
        lines.append(f"| **not installed** | the program is not here | {theirs['not installed']} | 0 |")
    return lines


def filled(page: str, found: Mapping[str, Any]) -> str:
    """A page with each part between its markers.

    Raises:
        SystemExit: a marker of no part, or a part without a marker.
    """
    made, seen = tables(found), []

    def put(match: re.Match[str]) -> str:
        seen.append(match[1])
        return "\n".join([f"<!-- table {match[1]} -->", *made[match[1]], "<!-- end -->"])

    names = "|".join(made)
    text = re.sub(rf"<!-- table ({names}) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)
    if sorted(seen) != sorted(made) or text.count("<!-- table ") != len(made):
        raise SystemExit(f"the page has parts {seen}, not {list(made)} once each")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose key has it")
    parser.add_argument("--write", action="store_true", help="into docs/duel.json and docs/duel.md")
    parser.add_argument("--bridge", type=Path, default=ROOT / ".venvs" / "bridge", metavar="DIR",
                        help="Megatron-Bridge's environment")  # fmt: skip
    args = parser.parse_args()
    if args.only and args.write:
        parser.error("the page has all rows")
    os.environ["PYTHONWARNINGS"] = "ignore"  # what programs say of others that they would like to have
    rows = [row for row in ROWS if args.only in row.key]
    python = args.bridge / "bin" / "python"
    found = played(rows, python if (args.bridge / "bridge-installed").exists() else None)
    if args.write:
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(filled(PAGE.read_text(), found))
        return
    for row in found["rows"]:
        print(f"{row['key']:32} {row['done']}  [{row['input']}]")
        for who, name in (("them", row["peer"]), ("dconv", "dconv")):
            print(f"    {row[who]['verdict']:7} {name}: {row[who]['words']}")


if __name__ == "__main__":
    main()
