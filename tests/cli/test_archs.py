"""``dconv archs``, the README's table and the tests of functions say the same of every family."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dconv.arch.about import ABOUT, LOGITS, markdown
from dconv.arch.registry import families
from dconv.cli import main

ROOT = Path(__file__).parents[2]


def test_every_family_is_described_and_no_other() -> None:
    assert families().keys() == ABOUT.keys()


def test_the_readme_has_the_table() -> None:
    assert (
        f"<!-- dconv archs --markdown -->\n{markdown(families().values())}<!-- -->" in (ROOT / "README.md").read_text()
    )


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["archs"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.split("\n\n")[0].splitlines()] == list(families())
    assert main(["archs", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [line["family"] for line in said] == list(families())


def test_equal_logits_have_a_test() -> None:
    """A family whose logits are said to be equal stands in a test that runs the real megatron-core."""
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "arch").glob("test_*.py"))
    judged = set(re.findall(r'"([a-z0-9_-]+)"', tests))
    assert {name for name, about in ABOUT.items() if about.shown == LOGITS} <= judged
