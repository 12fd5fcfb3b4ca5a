"""docs/scale.md is what its script makes of the stored figures; its arithmetic holds against slow and obvious forms."""

from __future__ import annotations

import heapq
import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import ROOT


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    folder = str(ROOT / "scripts")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def test_the_page_is_what_the_script_writes() -> None:
    scale = script("scale")
    page = scale.PAGE.read_text()
    assert scale.filled(page, json.loads(scale.RATES.read_text()), scale.Assumed()) == page


def test_a_page_without_a_table_is_refused() -> None:
    scale = script("scale")
    page = scale.PAGE.read_text().replace("<!-- table gptq -->", "")
    with pytest.raises(SystemExit, match="gptq"):
        scale.filled(page, json.loads(scale.RATES.read_text()), scale.Assumed())


def agrees(run: dict) -> bool:
    """Whether counted operations are within the formula's bound, and not so far below it that it says nothing."""
    model = script("scale_model")
    seen, looks = model.counted(run["counts"], run["ranks"])
    said = model.operations(run["ranks"], run["source_files"], run["target_files"], run["share"], looks)
    close = all(seen[name] <= 1.05 * said[name] + 5 and said[name] <= 2 * seen[name] + 25 for name in said)
    return close and seen["fsync"] <= model.syncs(run["ranks"], run["tasks"])


def test_the_formula_is_what_was_counted() -> None:
    runs = json.loads(script("scale").RATES.read_text())["metadata"]
    assert {run["ranks"] for run in runs} == {1, 2, 4, 8}
    for run in runs:
        assert agrees(run), run


@pytest.mark.long
def test_the_formula_is_what_is_counted_now(tmp_path: Path) -> None:
    """Real runs, so that the page does not outlive what it says of them."""
    for run in script("scale_measure").metadata(tmp_path):
        assert agrees(run), run


@pytest.mark.parametrize("seed", range(5))
def test_tasks_taken_one_by_one(seed: int) -> None:
    """Against a list from which whoever is free takes the next."""
    drawn = random.Random(seed)
    tasks, size = drawn.randint(1, 400), drawn.randint(1, 1000)
    speeds = [drawn.choice([1.0, 1.0, 0.2, 3.5]) for _ in range(drawn.randint(1, 40))]
    free = [(size / speed, speed) for speed in speeds]  # when each would be done with a next one
    heapq.heapify(free)
    last = 0.0
    for _ in range(tasks):
        last, speed = heapq.heappop(free)
        heapq.heappush(free, (last + size / speed, speed))
    assert script("scale_model").stolen(tasks, tasks * size, speeds) == pytest.approx(last, rel=1e-9)


def test_a_larger_cluster_is_no_slower_where_bytes_are_all() -> None:
    """With nothing but bytes to pay for, n nodes take the n-th part, until the file system gives no more."""
    model = script("scale_model")
    found = json.loads(script("scale").RATES.read_text())
    free = model.Assumed(client=1e9, aggregate=16e9, metadata=1e15, latency=0.0, sync=0.0, start=0.0)
    plan = found["plans"]["405B"] | {"seconds": 0.0}
    work = model.Work(rate=1e12, traffic=2.0)
    spent = {nodes: model.total(model.phases(plan, nodes, 8, work, free)) for nodes in (1, 8, 16, 32, 64)}
    assert spent[1] == pytest.approx(2 * plan["written"] / 1e9)
    assert spent[8] == pytest.approx(spent[1] / 8, rel=0.01)
    assert spent[64] == pytest.approx(spent[32], rel=0.01)
    assert spent[64] == pytest.approx(2 * plan["written"] / 16e9)
