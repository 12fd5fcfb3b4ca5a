"""Calibration samples: the same tokens for the same files, seed and tokenizer, on every rank and on every machine.

Documents are taken in an order that the seed draws, as many as are needed, and put one after another with the
tokenizer's end of text between them (token ids as they are). What results is cut into blocks of ``seqlen`` without
overlap, of which the seed draws ``nsamples``, kept in their order. Nothing is repeated or filled up: too little data is
refused. Draws are made with sha256, which no library's version changes.

The text that ships is Jane Austen's *Mansfield Park* (1814) and *Persuasion* (1818), which are in the public domain: a
paragraph a line, from the editions of the R package janeaustenr.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import Refused
from dconv.quant.documents import Document, Documents, Ids, read
from dconv.quant.settings import Calibration
from dconv.quant.tokenizer import Tokenizer

#: To be said where no data is named.
DEFAULT_WARNING: Final = (
    "calibrated on the text that ships, two English novels of the 1810s: data like what the model will see makes a "
    "better model: --calibration FILE"
)
#: How documents and blocks are drawn: the receipt's word for the rule above, to be changed with it.
_RULE: Final = "sha256, blocks without overlap"


@dataclass(frozen=True)
class Samples:
    """What a model is calibrated on.

    Attributes:
        tokens: int32 [nsamples, seqlen].
        record: for the receipt: path, digests of files, tokenizer and tokens, counts, lengths, seed. ``sha256`` of the
            tokens is what belongs into the plan's identity.
        warning: what to say of them; "" for nothing.
    """

    tokens: NDArray[np.int32]
    record: dict[str, object]
    warning: str = ""


def load(calibration: Calibration, tokenizer_folder: Path | None, vocabulary: int) -> Samples:
    """Read, tokenise, cut and draw.

    Args:
        calibration: which data, how many samples, how long.
        tokenizer_folder: where the model's tokenizer is; token ids need none.
        vocabulary: rows of the model's embedding.

    Raises:
        Refused: too little data, an id outside of the vocabulary, no tokenizer, or records of no known kind.
        UsageError, Damaged, StorageFault, ToolMissing: see `dconv.quant.documents.read` and `Tokenizer`.
    """
    source = read(calibration.data)
    tokenizer = Tokenizer(tokenizer_folder)
    needed = calibration.nsamples * calibration.seqlen
    taken: list[Ids] = []
    count = used = 0
    end = None if source.kind == "input_ids" else tokenizer.end()
    for number in drawn("document", calibration.seed, len(source.documents)):
        ids = _ids_of(source.documents[number], tokenizer)
        _check(ids, vocabulary, number, source)
        between = [end] if end is not None and taken else []
        taken += [np.array(between, np.int64), ids]
        count += len(between) + len(ids)
        used += 1
        if count >= needed:
            break
    if count < needed:
        raise _too_little(calibration, source, count)
    length = calibration.seqlen
    blocks = np.concatenate(taken)[: count // length * length].reshape(-1, length)
    chosen = sorted(drawn("block", calibration.seed, len(blocks))[: calibration.nsamples])
    tokens = np.ascontiguousarray(blocks[chosen], np.int32)
    record: dict[str, object] = {
        "path": source.path or "the text that ships",
        "kind": source.kind,
        "files": list(source.files),
        "tokenizer": tokenizer.digest() if source.kind != "input_ids" else "",
        "documents": len(source.documents),
        "documents_used": used,
        "tokens_read": count,
        "end_of_text": end,
        "nsamples": calibration.nsamples,
        "seqlen": calibration.seqlen,
        "seed": calibration.seed,
        "rule": _RULE,
        "sha256": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
    }
    return Samples(tokens, record, "" if calibration.data is not None else DEFAULT_WARNING)


def drawn(what: str, seed: int, count: int) -> list[int]:
    """The numbers below ``count`` in an order that the seed alone decides."""
    return sorted(range(count), key=lambda number: hashlib.sha256(f"{what}:{seed}:{number}".encode()).digest())


def _ids_of(document: Document, tokenizer: Tokenizer) -> Ids:
    if isinstance(document, np.ndarray):
        return document
    ids = tokenizer.ids(document) if isinstance(document, str) else tokenizer.conversation(document)
    return np.array(ids, np.int64)


def _check(ids: Ids, vocabulary: int, number: int, source: Documents) -> None:
    """That the model has a row for every id.

    Raises:
        Refused: a token that the model has no row for.
    """
    if not len(ids) or (ids.min() >= 0 and ids.max() < vocabulary):
        return
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    raise Refused(
        f"{len(wrong):,} tokens are outside of the model's vocabulary, nothing was written",
        where=f"document {number:,} of {source.path or 'the text that ships'}",
        expected=f"ids from 0 to {vocabulary - 1}",
        found=f"{int(wrong[0])}",
        do="the ids or the tokenizer belong to another model",
    )


def _too_little(calibration: Calibration, source: Documents, count: int) -> Refused:
    samples, length = calibration.nsamples, calibration.seqlen
    whole = count // length
    return Refused(
        "there is too little calibration data, nothing was written",
        where=source.path or "the text that ships",
        expected=f"{samples} x {length:,} = {samples * length:,} tokens",
        found=f"{count:,} tokens in {len(source.documents):,} documents",
        do=f'"nsamples": {whole} fits' if whole else f'"seqlen": {max(1, count // samples)} fits',
    )
