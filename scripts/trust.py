"""The promises of docs/trust.md, the tests that hold dconv to them, and how much these tried.

python scripts/trust.py                   print the table
python scripts/trust.py --run [WORD …]    run the tests of the promises in full (an hour on two cores), or those with a
                                          word in their own or their promise's name; counts go to docs/trust.json
python scripts/trust.py --write           put the table between the markers of docs/trust.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "trust.md"
COUNTS: Final = ROOT / "docs" / "trust.json"
_PLACE: Final = re.compile(r"(?<=<!-- table promises -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Promise:
    """What a person may rely on.

    Attributes:
        name: one word.
        says: the promise.
        tests: files below ``tests/`` that hold dconv to it.
        counts: what these tests count, and the word for it in the table.
    """

    name: str
    says: str
    tests: tuple[str, ...]
    counts: Mapping[str, str]


PROMISES: Final = (
    Promise(
        "kills",
        "SIGKILL at any instant loses no finished work and shows no false result: there is the old output, the whole "
        "new one, or none, and any number of ranks goes on to the same bytes",
        ("crash/test_every_call.py", "crash/test_random_kills.py", "crash/test_calibration.py",
         "crash/test_kill_and_resume.py", "crash/test_commit_and_races.py", "crash/test_stealing.py",
         "crash/test_leftovers.py"),
        {"kills at a call": "kills, one before or in the midst of each storage call",
         "runs killed at random": "runs of 1 to 8 ranks killed at random moments"},
    ),
    Promise(
        "power",
        "a power cut at any instant: an output with a receipt is whole, and the next run makes the same bytes",
        ("crash/test_power_loss.py", "crash/test_durable.py", "crash/test_calibration.py"),
        {"states after a power cut": "states of a disk with unsynced writes and names lost"},
    ),
    Promise(
        "faults",
        "storage that fails (full, quota, I/O error, interrupted, another device, short reads and writes) is told as "
        "error 5; nothing is written wrong, and a later run goes on",
        ("crash/test_every_call.py", "crash/test_source_faults.py", "crash/test_transient.py",
         "crash/test_side_by_side.py"),
        {"faults at a call": "faults, one at each storage call of the output",
         "faults at a read": "faults, one at each call that reads the source",
         "numbers of inodes left": "file systems with so many inodes left"},
    ),
    Promise(
        "meetings",
        "conversions into one output at once, sources that change meanwhile, read-only sources, outputs on other file "
        "systems: one whole result, a clear word to the others, nothing lost",
        ("crash/test_side_by_side.py", "hostile/test_bad_output.py", "launch/test_meeting.py"),
        {"pairs of conversions into one output": "pairs started into one output"},
    ),
    Promise(
        "damage",
        "`dconv check` finds every damage to an output that has its receipt, and names the tensor",
        ("damage/test_damage.py", "damage/test_without_receipt.py"),
        {"damages found": "damages of fourteen kinds on every container, all found",
         "bit flips found": "of them single flipped bits"},
    ),
    Promise(
        "lost weights",
        "weights that look lost (all zero, constant, NaN, a band or a page of zeros) are named by `dconv check` and "
        "`dconv inspect --lint`",
        ("damage/test_implausible.py",),
        {},
    ),
    Promise(
        "hostile files",
        "a hostile file can do nothing: it is refused with exit code 4 before a byte is written; nothing is executed, "
        "nothing outside is opened",
        ("hostile/test_attacks.py", "hostile/test_links.py", "hostile/test_bad_source.py",
         "hostile/test_hostile_metadata.py", "formats/test_inert.py", "formats/test_pickle_names.py",
         "formats/test_torchzip.py"),
        {"attacks refused": "attacks (`attacks/README.md`)"},
    ),
    Promise(
        "fuzzing",
        "no input makes a parser do anything but read it or refuse it in dconv's own words",
        ("hostile/test_fuzz_targets.py", "hostile/test_fuzz.py", "hostile/test_safetensors_damage.py",
         "hostile/test_gguf_damage.py", "hostile/test_torchzip_damage.py"),
        {"fuzz targets": "targets (`fuzz/README.md` has what each was fed)",
         "fuzz inputs kept": "inputs kept of them"},
    ),
    Promise(
        "cover",
        "nothing is ever missing, doubled or guessed: a source or a plan that does not cover is refused",
        ("laws/test_cover.py", "hostile/test_replicas.py", "hostile/test_ambiguous_megatron.py",
         "hostile/test_layout_refusals.py", "hostile/test_large_replicas.py"),
        {},
    ),
    Promise(
        "same bytes",
        "the same bytes from any launcher, number of ranks and threads, resumed or not",
        ("cluster/test_same_bytes.py", "laws/test_worlds.py", "laws/test_roundtrip.py"),
        {},
    ),
)  # fmt: skip


def ran(tests: Sequence[str]) -> dict[str, Any]:
    """Run test files in full; by file what it counted and how many of its cases passed.

    Raises:
        SystemExit: something failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        counts, report = Path(folder) / "counts", Path(folder) / "report.xml"
        counts.touch()
        command = [sys.executable, "-m", "pytest", "--long", "-n", os.environ.get("TRUST_WORKERS", "2"),
                   f"--junitxml={report}", *(f"tests/{one}" for one in tests)]  # fmt: skip
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "DCONV_COUNTS": str(counts)}).returncode:
            raise SystemExit("trust.py: a promise is broken; the counts are as they were")
        found: dict[str, Any] = {one: {"cases": 0, "counted": {}} for one in tests}
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - of this very run
            if not len(case):
                module = case.attrib["classname"].removeprefix("tests.").replace(".", "/") + ".py"
                found[module]["cases"] += 1
        for line in counts.read_text().splitlines():
            one = json.loads(line)
            path, _, name = one["test"].removeprefix("tests/").partition("::")
            found[path]["counted"].setdefault(one["what"], {})[name] = one["count"]
    for one in found.values():
        one["counted"] = {what: dict(sorted(by.items())) for what, by in sorted(one["counted"].items())}
    return found


def totals(counts: Mapping[str, Any], promise: Promise) -> tuple[int, Counter[str]]:
    """How many cases a promise's tests have, and all that they counted."""
    found: Counter[str] = Counter()
    cases = 0
    for test in promise.tests:
        entry = counts.get(test, {"cases": 0, "counted": {}})
        cases += entry["cases"]
        for what, by_test in entry["counted"].items():
            found[what] += sum(by_test.values())
    return cases, found


def table(counts: Mapping[str, Any]) -> str:
    """The promises in Markdown."""
    lines = ["| promise | tried | tests |", "|---|---|---|"]
    for promise in PROMISES:
        cases, found = totals(counts, promise)
        tried = [f"**{found[what]:,}** {words}" for what, words in promise.counts.items()]
        tried.append(f"{cases:,} test cases")
        tests = ", ".join(f"`{test}`" for test in promise.tests)
        lines.append(f"| {promise.says} | {'; '.join(tried)} | {tests} |")
    return "\n".join(lines) + "\n"


def filled(page: str, counts: Mapping[str, Any]) -> str:
    """The page with the table of these counts.

    Raises:
        SystemExit: it has no place for one.
    """
    if not _PLACE.search(page):
        raise SystemExit(f"{PAGE.name} has no place for the table of promises")
    return _PLACE.sub(lambda _: table(counts), page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", metavar="WORD", help="run the tests in full, all or some")
    parser.add_argument("--write", action="store_true", help="put the table into docs/trust.md")
    args = parser.parse_args()
    counts = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if args.run is not None:
        named = {test: f"{one.name} {test}" for one in PROMISES for test in one.tests}
        chosen = [test for test, name in named.items() if not args.run or any(word in name for word in args.run)]
        if not chosen:
            parser.error(f"no promise and no test of that name; there are {', '.join(one.name for one in PROMISES)}")
        counts |= ran(sorted(chosen))
        COUNTS.write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), counts))
    else:
        print(table(counts), end="")


if __name__ == "__main__":
    main()
