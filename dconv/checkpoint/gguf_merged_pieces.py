"""A tokenizer.json that was made of a SentencePiece model, as the vocabulary of a GGUF: its merges as scores.

llama.cpp joins the two neighbours whose piece has the best score, the tokenizer the two whose merge comes first. So a
piece's score is where its merge stands, and that is the same function where every way of parting a piece is listed as
a merge, all of one piece together: as they are where merges were made of scores. Where they are not, it is refused.
(llama.cpp's own converter gives all of them one score, ``LlamaHfVocab``, and loses how text is parted.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dconv.checkpoint.gguf_tokens import (
    ADDED,
    BYTE,
    CONTROL,
    JSON,
    NORMAL,
    PADDED,
    PIECES,
    UNKNOWN,
    UNUSED,
    USER,
    Values,
    added_tokens,
    halves_of,
    looks_special,
    too_many,
)
from dconv.errors import Refused
from dconv.sharding.parsed import Json

_SPACE: Final = "\u2581"
_OCTET: Final = re.compile("<0x[0-9A-Fa-f]{2}>")
#: What Metaspace does not, but SentencePiece does.
_TWICE: Final = "llama.cpp puts a space before a text that begins with one, too; this tokenizer does not"
_PREPEND: Final = {"type": "Prepend", "prepend": _SPACE}
_REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def merged_pieces(file: Mapping[str, Any], rows: int, where: str) -> tuple[Values, tuple[str, ...]]:
    """The keys of a vocabulary, and what to say of them.

    Args:
        file: tokenizer.json, whose model falls back to bytes.
        rows: of the embedding: as many tokens there are.
        where: the model, for errors.

    Raises:
        Refused: llama.cpp would part text in another way.
        Damaged: a merge that none is; a token that the model has no row for.
    """
    model = file["model"]
    prefix = _prefix(file)
    if prefix is None or model.get("ignore_merges"):
        found = f"normalizer {file.get('normalizer')!r:.120}, pre_tokenizer {file.get('pre_tokenizer')!r:.120}"
        raise _otherwise(where, found)
    added = {entry["content"]: entry for entry in added_tokens(file)}
    vocab: Mapping[str, Any] = model["vocab"]
    scored = _scores({token for token in vocab if token not in added}, vocab, model["merges"], where)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    scores, types = [PADDED] * rows, [UNUSED] * rows
    every = {**vocab, **{token: entry["id"] for token, entry in added.items()}}
    for token, number in every.items():
        if type(number) is not int or not 0 <= number < rows:
            raise too_many(token, number, rows, f"{JSON} of {where}")
        tokens[number], scores[number], types[number] = token, scored.get(token, 0.0), NORMAL
        if _OCTET.fullmatch(token):
            types[number] = BYTE
        elif token in added:
            control = bool(added[token].get("special")) or looks_special(token)
            tokens[number] = token if control else token.replace(_SPACE, " ")
            scores[number], types[number] = ADDED, CONTROL if control else USER
        elif token == model.get("unk_token"):
            types[number] = UNKNOWN
    values: Values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return values, (_TWICE,) if prefix and file.get("pre_tokenizer") else ()


def _prefix(file: Mapping[str, Any]) -> bool | None:
    """Whether a space is put before a text; None where more is done to it than llama.cpp does."""
    normaliser, before = file.get("normalizer"), file.get("pre_tokenizer")
    steps = [normaliser] if normaliser else []
    if normaliser and normaliser.get("type") == "Sequence":
        steps = normaliser.get("normalizers")
    if before is None or (before.get("type") == "Split" and before.get("pattern") == {"String": " "}):
        # to split at spaces does nothing where none are left
        return {1: False, 2: True}[len(steps)] if steps in ([_REPLACE], [_PREPEND, _REPLACE]) else None
    if before.get("type") != "Metaspace" or before.get("replacement") != _SPACE or before.get("split", True) or steps:
        return None
    return before.get("prepend_scheme", "always") != "never"


def _scores(pieces: set[str], vocab: Mapping[str, Any], merges: Iterable[Json], where: str) -> dict[str, float]:
    """For each piece, less the place of its first merge; for those that no merge makes, less the number of merges.

    Args:
        pieces: those that text is parted into.
        vocab: what they may be made of.
        merges: in their order, the first one first applied.
        where: the model, for errors.
    """
    first: dict[str, float] = {}
    ways: dict[str, set[int]] = {}
    last, count = "", 0
    for place, merge in enumerate(merges):
        left, right = halves_of(merge, where)
        piece, count = left + right, place + 1
        if piece in pieces:
            if piece != last and piece in first:
                raise _otherwise(where, f"merges to {piece!r:.40} at several places, others between them")
            first.setdefault(piece, -float(place))
            ways.setdefault(piece, set()).add(len(left))
        last = piece
    for piece in pieces:
        if _OCTET.fullmatch(piece):
            continue
        parted = {at for at in range(1, len(piece)) if piece[:at] in vocab and piece[at:] in vocab}
        if parted != ways.get(piece, set()):
            raise _otherwise(
                where, f"{len(ways.get(piece, ()))} merges to {piece!r:.40}, of {len(parted)} that there are"
            )
    return {piece: first.get(piece, -float(count)) for piece in pieces if not _OCTET.fullmatch(piece)}


def _otherwise(where: str, found: str) -> Refused:
    return Refused(
        "llama.cpp would part text otherwise than this tokenizer, nothing was written",
        where=f"{JSON} of {where}",
        expected=f"merges as they are made of {PIECES}, or that file itself: its scores say how",
        found=found,
        do=f"fetch {PIECES} from where the model came from",
    )
