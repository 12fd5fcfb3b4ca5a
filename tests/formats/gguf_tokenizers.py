"""Small tokenizers for models that a GGUF is made of, which has its vocabulary inside."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

#: Merges of whole words among them; each token is one of those before it.
MERGES = [("a", "b"), ("\u0120", "a"), ("\u0120a", "b"), ("1", "2")]


def byte_pairs(folder: Path, *, small: bool = False, **config: Any) -> Path:
    """Writes a byte-level tokenizer: bytes, merges, a control token, a token of a user's.

    Args:
        small: without most bytes, so that it fits 61 rows.
        config: of tokenizer_config.json, beside the special tokens.
    """
    letters = sorted(bytes_to_unicode().values())
    if small:
        letters = [*"ab12.:", "\u0120", "\u010a"]
    tokens = [*letters, *(a + b for a, b in MERGES)]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, MERGES))
    level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer, made.decoder = level, decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["b 1"])
    made.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|end|>", "chat_template": "{{ messages }}", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


#: Piece, score, type.
PIECES: list[tuple[str, float, int]] = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("\u2581a", -1.5, 1), ("ab", -2.5, 1), ("\u2581", -3.5, 1), ("a", -4.5, 1), ("b", -5.5, 1), ("hm", 0.0, 4),
]  # fmt: skip


def sentence_pieces(folder: Path, pieces: Iterable[tuple[str, float, int]] = PIECES, **config: Any) -> Path:
    """Writes a SentencePiece model, field by field as ``sentencepiece_model.proto`` has them."""
    body = b""
    for text, score, kind in pieces:
        data = text.encode()
        piece = b"\x0a" + bytes([len(data)]) + data + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        body += b"\x0a" + bytes([len(piece)]) + piece
    trainer = b"\x18\x02"  # model_type
    (folder / "tokenizer.model").write_bytes(body + b"\x12" + bytes([len(trainer)]) + trainer)
    added = {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}
    said = {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def merges_of(pieces: Iterable[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way of parting every piece, the best score first: as transformers makes merges of a SentencePiece model."""
    scored = {text: score for text, score, kind in pieces if kind == 1}
    found: list[tuple[str, str]] = []
    for text in sorted(scored, key=lambda text: -scored[text]):
        parted = [(text[:at], text[at:]) for at in range(1, len(text))]
        found += [(left, right) for left, right in parted if left in scored and right in scored]
    return found


def merged(folder: Path, pieces: list[tuple[str, float, int]], *, space: str = "prepend", **model: Any) -> Path:
    """Writes the tokenizer.json of a SentencePiece model, without the model.

    Args:
        space: how words are told apart: ``prepend``, ``metaspace`` or ``gemma``.
        model: what its model says otherwise.
    """
    prepend: Any = {"type": "Prepend", "prepend": "\u2581"}
    replace: Any = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    split: Any = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    meta: Any = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    normalizer, before = {
        "prepend": ({"type": "Sequence", "normalizers": [prepend, replace]}, None),
        "metaspace": (None, meta),
        "gemma": (replace, split),
    }[space]
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    file = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": normalizer, "pre_tokenizer": before,
        "added_tokens": [
            {"id": number, "content": text, "special": kind != 4, **common}
            for number, (text, _, kind) in enumerate(pieces) if kind in (2, 3, 4)
        ],
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {text: number for number, (text, _, _) in enumerate(pieces)}, "merges": merges_of(pieces), **model,
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file))
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder
