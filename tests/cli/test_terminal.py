"""What a person at a terminal sees: the words that a pipe gets, in the terminal's width, coloured where it may be."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dconv.report.table import Table
from tests.cli.conftest import Dconv
from tests.processes import ROOT

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def at_terminal(words: list[str], cwd: Path, width: int = 80, env: Mapping[str, str] | None = None) -> str:
    """All that a command writes to a terminal of so many columns."""
    folder = str(ROOT / "scripts")
    if folder not in sys.path:
        sys.path.append(folder)
    own = {"DCONV_HISTORY": str(cwd / "history.sqlite"), **(env or {})}
    return importlib.import_module("picture").at_terminal(["dconv", *words], cwd, width, own)


def words_of(text: str) -> list[str]:
    return _CONTROL.sub("", text).split()


COMMANDS = (
    ["plan", "model", "megatron", "--tp", "2", "--pp", "2", "--trace", "*.0.mlp.*"],
    ["inspect", "model"],
    ["check", "model", "--no-run"],
    ["diff", "model", "model"],
    ["archs"],
    ["formats"],
    ["doctor"],
    ["suggest", "model for ollama in 4 bit, and whatever else there is to say about it, make sure"],
    ["convert", "model", "megatron", "--tp", "3"],
    ["convert", "nowhere", "megatron"],
)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_everything_fits_into_a_terminal(hf: Path, words: list[str]) -> None:
    shown = at_terminal(words, hf.parent)
    lines = _CONTROL.sub("", shown).split("\n")
    assert [line for line in lines if len(line) > 80] == []
    assert len(lines) > 1
    assert "Traceback" not in shown


def test_a_long_history_fits(hf: Path) -> None:
    out = hf.parent / ("a-long-name-of-an-output" * 4)
    at_terminal(["convert", "model", "megatron", "-o", str(out)], hf.parent)
    shown = at_terminal(["history"], hf.parent)
    assert max(map(len, _CONTROL.sub("", shown).split("\n"))) <= 80
    assert str(out) in "".join(words_of(shown))


@pytest.mark.parametrize(
    "words", [["inspect", "model"], ["plan", "model", "megatron", "--tp", "2"], ["archs"]], ids=str
)
def test_a_wide_terminal_has_the_words_of_a_pipe(
    hf: Path, words: list[str], dconv: Dconv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hf.parent)
    assert words_of(at_terminal(words, hf.parent, 250)) == dconv(*words).out.split()


@pytest.mark.parametrize("words", [["archs"], ["convert", "model", "megatron", "--tp", "3"]], ids=str)
def test_colour_is_for_those_who_want_it(hf: Path, words: list[str]) -> None:
    assert _COLOUR.search(at_terminal(words, hf.parent))
    plain = at_terminal(words, hf.parent, env={"NO_COLOR": "1"})
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", plain), "NO_COLOR: no colour, whatever else"
    assert "\x1b" not in at_terminal(words, hf.parent, env={"TERM": "dumb"})
    env = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    piped = subprocess.run(
        [sys.executable, "-m", "dconv", *words], capture_output=True, env=env, cwd=hf.parent, check=False
    )
    assert b"\x1b" not in piped.stdout + piped.stderr


def test_json_is_one_line_at_a_terminal_too(hf: Path) -> None:
    assert at_terminal(["inspect", "model", "--json"], hf.parent).count("\n") == 1


def test_a_bar_for_each_rank_and_none_is_left(hf: Path) -> None:
    """What a terminal shows in the end has no bar, whatever was drawn on the way."""
    shown = at_terminal(["convert", "model", "megatron", "--tp", "2", "--nproc", "2"], hf.parent)
    assert "wrote" in shown
    assert "\x1b[?25l" not in shown, "a cursor that is hidden stays so after a kill"


def test_user_errors_have_no_trace_of_the_program(hf: Path) -> None:
    for words in (
        ["convert", "model", "megatrom"],
        ["inspect", "nowhere"],
        ["diff", "model"],
        ["config", "frobnicate"],
    ):
        assert "Traceback" not in at_terminal(words, hf.parent)


def test_a_table_of_words_and_one_of_signs() -> None:
    words = Table([("a", "1"), ("bcd", "22")], ("x", "n"), numbers=frozenset({1}))
    assert str(words) == "x     n\na     1\nbcd  22"
    assert words.parts(3) == [words]
    signs = Table([("row", "=", "", "c")], ("", "one", "two", "six"), centred=frozenset({1, 2, 3}))
    assert [str(part) for part in signs.parts(13)] == ["     one  two\nrow   =", "     six\nrow   c"]
    assert str(Table([])) == ""
