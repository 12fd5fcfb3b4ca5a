"""docs/trust.md is what its script makes of the kept counts, and the counts are those of the code as it is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attacks import make
from fuzz.targets import TARGETS
from tests.crash import test_every_call, test_power_loss, test_random_kills
from tests.crash.cases import ALL, job_of
from tests.crash.disk import ways
from tests.crash.storage import CHANGING
from tests.damage import kinds
from tests.processes import ROOT

KEPT: dict[str, Any] = json.loads((ROOT / "docs" / "trust.json").read_text())
_AGAIN = "python scripts/trust.py --run --write"


def script() -> ModuleType:
    folder = str(ROOT / "scripts")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("trust")


def kept(test: str, what: str) -> dict[str, int]:
    return KEPT[test]["counted"][what]


def test_the_page_is_what_the_script_writes() -> None:
    trust = script()
    page = trust.PAGE.read_text()
    assert trust.filled(page, KEPT) == page, _AGAIN


def test_each_promise_has_its_tests_and_was_tried() -> None:
    trust = script()
    for promise in trust.PROMISES:
        assert all((ROOT / "tests" / test).is_file() for test in promise.tests), promise.name
        for test in promise.tests:
            assert KEPT[test]["cases"], f"{test} was not run in full: {_AGAIN}"
        _, found = trust.totals(KEPT, promise)
        assert all(found[what] for what in promise.counts), promise.name


@pytest.mark.parametrize("case", ALL)
def test_calls_of_a_run(small: Path, results: dict[str, dict[str, str]], root: Path, case: str) -> None:
    """Every call of a run was killed, met each fault, and was cut off by a power cut."""
    calls = test_every_call.count_of(job_of(small, case, root / "out"), case, root, CHANGING)
    assert kept("crash/test_every_call.py", "kills at a call")[f"test_killed_at_each_call[{case}-killed]"] == calls
    for fault, (_, names) in test_every_call.FAULTS.items():
        calls = test_every_call.count_of(job_of(small, case, root / "out"), case, root, names)
        for often in ("once", "for good"):
            name = f"test_each_call_meets_a_fault[{case}-{fault}-{often}]"
            assert kept("crash/test_every_call.py", "faults at a call")[name] == calls
    record, before, _ = test_power_loss.recorded(small, root / "work", case)
    states = (len(record.events) - before) * len(ways(0))
    assert kept("crash/test_power_loss.py", "states after a power cut")[f"test_each_moment[{case}]"] == states


def test_what_else_was_counted() -> None:
    assert sum(kept("crash/test_random_kills.py", "runs killed at random").values()) == test_random_kills.RUNS >= 500
    assert sum(kept("damage/test_damage.py", "damages found").values()) == kinds.TOTAL
    assert sum(kept("damage/test_damage.py", "bit flips found").values()) >= 1000
    assert sum(kept("hostile/test_attacks.py", "attacks refused").values()) == len(make.ATTACKS) >= 120
    assert sum(kept("hostile/test_fuzz_targets.py", "fuzz targets").values()) == len(TARGETS)
