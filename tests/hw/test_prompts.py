"""Texts that a compiler of language models is calibrated with: words of any language, and nothing that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dconv.errors import Refused
from dconv.hw.prompts import texts


def test_a_text_without_spaces_is_cut_as_well(tmp_path: Path) -> None:
    written = "".join(chr(0x4E00 + number % 500) for number in range(1000))
    (tmp_path / "text.txt").write_text(written, encoding="utf-8")
    pairs = texts(str(tmp_path / "text.txt"), 10, 16)
    assert len(pairs) == 10
    for first, rest in pairs:
        assert first and rest
        assert first + rest in written


def test_words_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("every word of this text is short\nand whole " * 20, encoding="utf-8")
    known = {"every", "word", "of", "this", "text", "is", "short", "and", "whole"}
    for pair in texts(str(tmp_path / "text.txt"), 4, 16):
        assert set(" ".join(pair).split()) <= known


def test_turns_that_are_no_text_are_not_taken(tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": "What is there?"}, {"role": "assistant", "tool_calls": [{"name": "look"}]}],
        [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A lake."}],
        [{"role": "user", "content": "And here?"}, {"role": "assistant", "content": "A hill."}],
    ]
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    assert texts(str(path), 1, 16) == [("And here?", "A hill.")]
    with pytest.raises(Refused, match="too little"):
        texts(str(path), 2, 16)
