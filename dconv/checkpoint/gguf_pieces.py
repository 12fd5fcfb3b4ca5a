"""A SentencePiece model as the vocabulary of a GGUF: of tokenizer.model, or of the tokenizer.json that was made of one.

As llama.cpp's converter makes it (``_create_vocab_sentencepiece``), without running a tokenizer's class.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dconv.checkpoint.gguf_tokens import (
    ADDED,
    BYTE,
    CONFIG,
    CONTROL,
    NORMAL,
    PADDED,
    PIECES,
    UNUSED,
    USER,
    Values,
    bytes_of,
    looks_special,
    read,
    too_many,
)
from dconv.checkpoint.source import Side
from dconv.errors import Damaged
from dconv.sharding.parsed import is_dict

_ADDED: Final = "added_tokens.json"


def pieces(side: Side, said: Mapping[str, Any], rows: int, where: str) -> Values:
    """A SentencePiece model: its pieces, and the tokens that files beside it add."""
    tokens: list[str | bytes] = [f"[PAD{number}]" for number in range(rows)]
    scores, types = [PADDED] * rows, [UNUSED] * rows
    for number, (piece, score, kind) in enumerate(_model_pieces(bytes_of(side, PIECES), where)):
        if number >= rows:
            raise too_many(piece.decode(errors="replace"), number, rows, f"{PIECES} of {where}")
        tokens[number], scores[number] = piece, score
        types[number] = NORMAL if kind == USER else kind
    for token, number in (read(side, _ADDED) or {}).items():
        if type(number) is not int or not 0 <= number < rows:
            raise too_many(token, number, rows, f"{_ADDED} of {where}")
        tokens[number], scores[number], types[number] = token, ADDED, USER
    decoder: dict[str, Any] = said.get("added_tokens_decoder") or {}
    for key, entry in decoder.items():
        number = int(key) if key.isdecimal() and len(key) < 10 else -1
        token = entry.get("content") if is_dict(entry) else None
        if not isinstance(token, str) or not 0 <= number < rows:
            raise too_many(str(token), key, rows, f"{CONFIG} of {where}")
        control = bool(entry.get("special")) or looks_special(token)
        tokens[number] = token if control else token.replace("\u2581", " ")
        scores[number], types[number] = ADDED, CONTROL if control else USER
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
    }


def _model_pieces(data: bytes, where: str) -> Iterator[tuple[bytes, float, int]]:
    """Text, score and type of every piece. Source: ``sentencepiece_model.proto``.

    Raises:
        Damaged: no such file.
    """
    count = 0
    for field, value in _fields(data, where):
        if field != 1 or not isinstance(value, bytes):
            continue
        piece, score, kind = b"", 0.0, NORMAL
        for inner, found in _fields(value, where):
            if inner == 1 and isinstance(found, bytes):
                piece = found
            elif inner == 2 and isinstance(found, bytes) and len(found) == 4:
                (score,) = struct.unpack("<f", found)
            elif inner == 3 and isinstance(found, int):
                if not 0 < found <= BYTE:
                    raise _torn(where)
                kind = found
        count += 1
        yield piece, score, kind
    if not count:
        raise _torn(where)


def _fields(data: bytes, where: str) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer: whole numbers, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at, where)
        if tag & 7 == 0:
            value, at = _number(data, at, where)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            length, at = _number(data, at, where)
        else:
            length = {1: 8, 5: 4}.get(tag & 7, -1)
        if length < 0 or at + length > len(data):
            raise _torn(where)
        yield tag >> 3, data[at : at + length]
        at += length


def _number(data: bytes, at: int, where: str) -> tuple[int, int]:
    found = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        octet = data[at]
        at += 1
        found |= (octet & 0x7F) << shift
        if octet < 0x80:
            return found, at
    raise _torn(where)


def _torn(where: str) -> Damaged:
    return Damaged(
        "no SentencePiece model", where=f"{PIECES} of {where}", expected="a protocol buffer with pieces",
        do="the download or copy was cut off: fetch it again",
    )  # fmt: skip
