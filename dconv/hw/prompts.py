"""Calibration texts as compilers of language models take them: what is said, and what is answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from dconv.errors import Refused
from dconv.quant.data import drawn
from dconv.quant.documents import read

#: Characters of a token, about, in prose of European languages: no tokenizer is asked.
_CHARACTERS: Final = 4


def texts(data: str | None, count: int, length: int) -> list[tuple[str, str]]:
    """Pairs of a beginning and what follows: a conversation's first two turns, or the halves of a passage.

    The same for the same files on every machine.

    Args:
        data: see `dconv.quant.documents.read`.
        count: how many.
        length: tokens of each, about.

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
    return [pairs[number] for number in sorted(drawn("texts", 0, len(pairs))[:count])]


def _turns(conversation: list[Any]) -> tuple[str, str]:
    def said(*roles: str) -> str:
        found = next((turn.get("content") for turn in conversation if turn.get("role") in roles), "")
        return found if isinstance(found, str) else ""  # a call of a tool, or parts that are no words

    return said("user", "human"), said("assistant", "gpt")


def _passages(text: str, length: int) -> Iterable[tuple[str, str]]:
    """Whole words, cut in the middle; what is written without spaces is cut anywhere."""
    passage, size = list[str](), 0
    for word in text.split():
        for piece in _pieces(f" {word}", max(1, length // 2)):
            passage.append(piece)
            size += len(piece)
            if size >= length:
                half = len(passage) // 2
                yield "".join(passage[:half]).strip(), "".join(passage[half:]).strip()
                passage, size = [], 0


def _pieces(word: str, most: int) -> list[str]:
    return [word[at : at + most] for at in range(0, len(word), most)]
