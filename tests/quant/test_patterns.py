"""Expressions of a config: what models' have is tried, what could be searched for very long is not."""

from __future__ import annotations

import re

import pytest

from dconv.coded.patterns import compiled, is_tame

TAME = [
    r"lm_head",
    r".*self_attn\.(q|k|v)_proj$",
    r"model\.layers\.\d+\.mlp\..*_proj",
    r"(?:a|b)(?=c)(?P<n>d)x?",
    r"\*\+\{\}\(\)\*",
    r"[.]mlp[.]",
    r"a\\b.*",
]
WILD = [
    r".*a.*b.*c.*d",
    r"(a+)+b",
    r"(a|aa)*b",
    r"(.*){9}b",
    r"a?a?a?a?aaaa",
    r"\\*\\*\\*\\*\\*\\*x",  # backslashes that are themselves escaped, each as often as it likes
    r"(\\)*(\\)*x",
    r"\(?\(?\(?\(?x",
    "a" * 301,
]


@pytest.mark.parametrize("text", TAME)
def test_usual_ones_are_tried(text: str) -> None:
    assert is_tame(text)
    assert compiled(text) == re.compile(text)


@pytest.mark.parametrize("text", WILD)
def test_long_searches_are_not(text: str) -> None:
    assert not is_tame(text)


@pytest.mark.parametrize("text", ["(", "a{2,1}", "(?<=a*)", "x{99999999999}", "(" * 200])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        compiled(text)
