"""``python -m attacks.make DIR`` writes the corpus; ``--readme`` writes the table of README.md anew."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from attacks import configs, ggufs, headers, megatron, pickles, places, zips
from attacks.corpus import SECRET, Attack, Canary
from attacks.twins import TWINS, make_canary, make_twins

ATTACKS: Final[tuple[Attack, ...]] = (
    *pickles.ATTACKS, *zips.ATTACKS, *headers.ATTACKS, *places.ATTACKS, *ggufs.ATTACKS, *megatron.ATTACKS,
    *configs.ATTACKS,
)  # fmt: skip
README: Final = Path(__file__).with_name("README.md")
_BEGIN, _END = "<!-- made by attacks/make.py --readme -->", "<!-- end -->"


def write(folder: Path, attacks: Iterable[Attack] = ATTACKS, secret: str = SECRET, twins: Iterable[str] = ()) -> Canary:
    """The corpus: ``twins/`` (good checkpoints), ``canary/``, and one directory an attack.

    Args:
        folder: where; what is there already is kept.
        secret: the contents of the file that must not be read.
        twins: good checkpoints that are wanted beside those of the attacks.
    """
    attacks = tuple(attacks)
    canary = make_canary(folder / "canary", secret)
    make_twins(folder / "twins", dict.fromkeys([*twins, *(attack.twin for attack in attacks)]))
    for attack in attacks:
        one(folder, attack, canary)
    return canary


def one(folder: Path, attack: Attack, canary: Canary) -> Path:
    """One attack's directory, made of its twin."""
    at = folder / attack.name
    make_twins(folder / "twins", [attack.twin])
    shutil.copytree(folder / "twins" / attack.twin, at)
    attack.spoil(at, canary)
    return at


def words(attack: Attack, at: Path) -> list[str]:
    """MODEL, FORMAT and options with which dconv meets an attack."""
    twin = TWINS[attack.twin]
    return [str(at / twin.model), *(word.replace("{}", str(at)) for word in twin.words)]


def table() -> str:
    """README's table."""
    counts = Counter(attack.kind for attack in ATTACKS)
    lines = [f"{len(ATTACKS)} attacks: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()) + ".", ""]
    lines += ["| attack | idea | in a good | what happens |", "|---|---|---|---|"]
    for attack in ATTACKS:
        idea = attack.idea.replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| `{attack.name}` | {idea} | {attack.twin} | damaged (4): … {attack.says} … |")
    return "\n".join(lines)


def renewed(text: str) -> str:
    """README with its table as it is now."""
    before, _, rest = text.partition(_BEGIN)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{rest.partition(_END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m attacks.make", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="where to write the corpus (380 MB)")
    parser.add_argument("--readme", action="store_true", help="write the table of README.md anew")
    args = parser.parse_args(argv)
    if args.readme:
        README.write_text(renewed(README.read_text()))
    if args.folder is not None:
        write(args.folder)
    return 0 if args.readme or args.folder else 2


if __name__ == "__main__":
    sys.exit(main())
