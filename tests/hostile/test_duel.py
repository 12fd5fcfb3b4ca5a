"""docs/duel.md is what scripts/duel.py finds: a few rows each time, all of them in the longer run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
FOUND: dict[str, Any] = json.loads((ROOT / "docs" / "duel.json").read_text())
RECORDED: dict[str, dict[str, Any]] = {row["key"]: row for row in FOUND["rows"]}


@pytest.fixture(scope="module")
def duel() -> Iterator[ModuleType]:
    """The script, which is no package."""
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("duel")
    finally:
        sys.path.remove(folder)


def verdicts(row: dict[str, Any]) -> tuple[str, str]:
    return row["them"]["verdict"], row["dconv"]["verdict"]


def test_the_page_is_what_was_found(duel: ModuleType) -> None:
    page = (ROOT / "docs" / "duel.md").read_text()
    assert page == duel.filled(page, FOUND)
    assert [row.key for row in duel.ROWS] == list(RECORDED), "python scripts/duel.py --write"
    for row in RECORDED.values():
        assert row["peer"] in page and row["done"] in page


def test_the_page_does_not_hide_a_row(duel: ModuleType) -> None:
    """A row more, or another verdict, is another page."""
    page = (ROOT / "docs" / "duel.md").read_text()
    changed = json.loads(json.dumps(FOUND))
    changed["rows"][0]["dconv"]["verdict"] = "silent"
    assert duel.filled(page, changed) != page
    with pytest.raises(SystemExit):
        duel.filled(page.replace("<!-- table pickle -->", ""), FOUND)


def test_verdicts_follow_from_what_is_found(duel: ModuleType, tmp_path: Path) -> None:
    """The judge, on results of which the verdict is plain."""
    stage = importlib.import_module("duel_stage")
    truth = {"x": ("float32", (2,), np.array([1, 2], "<f4").tobytes())}
    for number, (data, shape, verdict, word) in enumerate((
        ([1, 2], [2], "whole", "right"), ([1, 0], [2], "silent", "1 of 2 values of x are 0"),
        ([1, 3], [2], "silent", "1 of 2 values of x are wrong"), ([1], [1], "silent", "shape [1]"),
    )):  # fmt: skip
        out = tmp_path / str(number)
        out.mkdir()
        save_file({"x": np.array(data, np.float32).reshape(shape)}, out / "model.safetensors")
        done = stage.judged(stage.Ending(True, None, "", "", 0), truth, out)
        assert done.verdict == verdict and word in done.words
        failed = stage.judged(stage.Ending(False, None, "OSError: no", "", 0), truth, out)
        assert failed.verdict == "late" and "1 file left" in failed.words
        (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])
        cut = stage.judged(stage.Ending(True, None, "", "", 0), truth, out)
        assert cut.verdict == "silent" and "cannot be opened" in cut.words
    assert stage.judged(stage.Ending(False, None, "no", "", 0), truth, tmp_path / "nothing").verdict == "error"
    assert stage.judged(stage.Ending(True, truth, "", "", 0), truth, unknown="a guess").verdict == "silent"


def test_dconv_is_never_silent() -> None:
    """The promise; a row that breaks it may not be written down and forgotten."""
    assert {row["dconv"]["verdict"] for row in RECORDED.values()} <= {"whole", "error"}


@pytest.mark.parametrize("key", [key for key, row in RECORDED.items() if row["part"] in ("outside", "pickle")])
def test_hostile_input_is_refused_as_such(key: str) -> None:
    assert RECORDED[key]["dconv"]["words"].startswith("exit 4: ")


@pytest.mark.long
def test_all_rows(duel: ModuleType, counted: Any) -> None:
    """Programs that are installed in one place and not in the other are left out. Before the few: it imports all."""
    bridge = ROOT / ".venvs" / "bridge"
    found = duel.played(duel.ROWS, bridge / "bin" / "python" if (bridge / "bridge-installed").exists() else None)
    now = {row["key"]: verdicts(row) for row in found["rows"]}
    then = {key: verdicts(row) for key, row in RECORDED.items()}
    apart = {key for key in then if "not installed" in (now[key][0], then[key][0])}
    assert {key: now[key] for key in then.keys() - apart} == {key: then[key] for key in then.keys() - apart}
    assert {key: now[key][1] for key in apart} == {key: then[key][1] for key in apart}
    counted("known failures of other programs, played again", len(found["rows"]) - len(apart))


def test_fast_rows(duel: ModuleType, counted: Any) -> None:
    """Played here and now: what each program does is what the page says."""
    rows = [row for row in duel.ROWS if row.fast]
    found = duel.played(rows, None, preload=False)["rows"]
    assert {row["key"]: verdicts(row) for row in found} == {row.key: verdicts(RECORDED[row.key]) for row in rows}
    counted("known failures of other programs, played again", len(found))
