"""Calibration texts as compilers of language models take them: what is said, and what is answered."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from dconv.errors import Refused
from dconv.quant.documents import read

WARNING: Final = (
    "calibrated on the text that ships, two English novels of the 1810s: data like what the model will see makes a "
    "better model: --calibration FILE"
)
#: Characters of a token, about, in prose of European languages: no tokenizer is asked.
_CHARACTERS: Final = 4


def texts(data: str | None, count: int, length: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of a beginning and what follows: a conversation's first two turns, or the halves of a passage.

    The same for the same files on every machine.

    Args:
        data: see `dconv.quant.documents.read`.
        count: how many.
        length: tokens of each, about.
        seed: says which of them are taken where there are more.

    Raises:
        Refused: token ids, which compilers of texts do not take, or too little.
        UsageError, Damaged, ToolMissing: see `dconv.quant.documents.read`.
    """
    source = read(data)
    if source.kind == "input_ids":
        raise Refused("this compiler takes texts to calibrate on, nothing was written", where=source.path,
                      expected="text, or records with text or messages", found="token ids")  # fmt: skip
    found: list[tuple[str, str]] = []
    for document in source.documents:
        found += [_turns(document)] if isinstance(document, list) else _passages(str(document), length * _CHARACTERS)
    pairs = [(first, rest) for first, rest in found if first and rest]
    if len(pairs) < count:
        raise Refused("there is too little to calibrate on, nothing was written",
                      where=source.path or "the text that ships", expected=f"{count:,} passages",
                      found=f"{len(pairs):,}", do="fewer nsamples, or a smaller seqlen")  # fmt: skip
    order = sorted(range(len(pairs)), key=lambda number: hashlib.sha256(f"texts:{seed}:{number}".encode()).digest())
    return [pairs[number] for number in sorted(order[:count])]


def _turns(conversation: list[Any]) -> tuple[str, str]:
    def said(*roles: str) -> str:
        return next((str(turn["content"]) for turn in conversation if turn.get("role") in roles), "")

    return said("user", "human"), said("assistant", "gpt")


def _passages(text: str, length: int) -> Iterable[tuple[str, str]]:
    """Whole words, cut in the middle."""
    words, passage, size = text.split(), list[str](), 0
    for word in words:
        passage.append(word)
        size += len(word) + 1
        if size >= length:
            half = len(passage) // 2
            yield " ".join(passage[:half]), " ".join(passage[half:])
            passage, size = [], 0
