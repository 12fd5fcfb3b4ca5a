"""What the makers of a GGUF's vocabulary share: kinds of tokens, files beside a model, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import Made, parse_json, read_small
from dconv.checkpoint.source import Side
from dconv.errors import Damaged, Refused

Values = dict[str, Any]
#: ``llama_token_type``.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: Scores of tokens that are none of SentencePiece's.
ADDED, PADDED = -1000.0, -10000.0
JSON, PIECES, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
#: Tokens that are control tokens whatever their file says (``does_token_look_special``).
_CONTROLS: Final = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_AROUND: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


def bytes_of(side: Side, name: str) -> bytes:
    path = side[name]
    return path.make() if isinstance(path, Made) else read_small(path, what=name)


def read(side: Side, name: str) -> dict[str, Any] | None:
    if name not in side:
        return None
    path = side[name]
    return parse_json(bytes_of(side, name), where=str(path) if isinstance(path, Path) else name, what=name)


def added_tokens(file: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens beside the vocabulary.

    Raises:
        Damaged: entries that are none.
    """
    found = file.get("added_tokens") or []
    for entry in found:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
            raise Damaged("an added token that none is", where=JSON, found=f"{entry!r:.80}")
    return found


def halves_of(merge: object, where: str) -> tuple[str, str]:
    """
    Raises:
        Damaged: a merge that none is.
    """
    halves = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(halves, list) and len(halves) == 2 and all(isinstance(half, str) and half for half in halves):
        return halves[0], halves[1]
    raise Damaged("a merge that none is", where=f"{JSON} of {where}", found=f"{merge!r:.80}")


def looks_special(token: str) -> bool:
    return token in _CONTROLS or any(token.startswith(a) and token.endswith(b) for a, b in _AROUND)


def other(found: str, where: str) -> Refused:
    return Refused(
        "a tokenizer of a kind that is not written to a GGUF here, nothing was written",
        where=f"{JSON} of {where}",
        expected=f"byte-level BPE with merges, or {PIECES}",
        found=found,
    )


def too_many(token: str, number: object, rows: int, where: str) -> Damaged:
    return Damaged(
        "a token that the model has no row for, nothing was written",
        where=f"{JSON} of {where}",
        expected=f"ids below vocab_size, {rows}",
        found=f"{token[:40]!r} has {number!r:.40}",
        do="the tokenizer belongs to another model: --hf-config DIR names the right one",
    )
