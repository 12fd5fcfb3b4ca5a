"""A tokenizer's files as the vocabulary of a GGUF: tokens, types, scores, merges, ids, the chat template.

As llama.cpp's converter makes it of the same files (``_set_vocab_gpt2`` and ``_create_vocab_sentencepiece`` in
``conversion/base.py``, ``SpecialVocab`` of the package gguf), without running a tokenizer's class. How text is split
before the merges is known by what a tokenizer makes of one text (`gguf_pretokenizers`), or by the expression that its
file has, where that is one that llama.cpp computes; else it is asked for, never guessed.
"""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import Made, parse_json, read_small
from dconv.checkpoint.gguf_pretokenizers import DIGESTS, NAMES, PROBE
from dconv.checkpoint.source import Side
from dconv.errors import Damaged, Refused, ToolMissing, UsageError

#: ``llama_token_type``.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
#: Scores of tokens that are none of SentencePiece's.
_ADDED, _PADDED = -1000.0, -10000.0
_SPECIAL: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
#: GGUF's keys for their ids, where they are not ``<name>``.
_KEYS: Final = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
_JSON, _PIECES, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
#: Tokens that are control tokens whatever their file says (``does_token_look_special``).
_CONTROLS: Final = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_AROUND: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
#: Names for the expression that splits text, with whether whole words come before merges (``ignore_merges``).
_BY_EXPRESSION: Final = {"llama-bpe": True, "qwen2": False, "qwen35": False, "gpt-4o": False, "tekken": True}
#: Names that ``--gguf-pretokenizer`` takes beside those of the table.
_MORE: Final = ("default", "mpt", "llama3", "jina-v2-de")
OPTION: Final = "--gguf-pretokenizer"

Values = dict[str, Any]


def vocabulary(
    side: Side, config: Mapping[str, object], rows: int, arch: str, pretokenizer: str | None, where: str
) -> tuple[Values, tuple[str, ...]]:
    """The keys ``tokenizer.*``, and what to say of them.

    Args:
        side: the files that travel with the model.
        rows: of the embedding: as many tokens there are.
        arch: GGUF's architecture.
        pretokenizer: what llama.cpp calls the way in which text is split; None finds it out.

    Raises:
        Refused: no tokenizer, one of a kind that llama.cpp lacks, or one that splits text as none that is known.
        Damaged: a file that is broken, or has more tokens than the model.
        ToolMissing: no package tokenizers.
    """
    if pretokenizer is not None:
        _check_name(pretokenizer)
    said = _read(side, _CONFIG) or {}
    values: Values = {}
    if _PIECES in side:
        if pretokenizer is not None:
            raise UsageError(
                "a SentencePiece vocabulary is not split before its merges, nothing was written",
                where=f"{OPTION} {pretokenizer}",
                do="leave it out",
            )
        values |= _pieces(side, said, rows, where)
        if arch.startswith("gemma"):
            values["tokenizer.ggml.add_space_prefix"] = False
        elif isinstance(prefix := said.get("add_prefix_space"), bool) and arch == "llama":
            values["tokenizer.ggml.add_space_prefix"] = prefix
        notes: tuple[str, ...] = ()
        file = _read(side, _JSON)
    else:
        file = _read(side, _JSON)
        if file is None:
            raise _none(where)
        found, notes = _byte_pairs(side, file, said, rows, pretokenizer, where)
        values |= found
    return {**values, **_specials(file, said, config, rows), **_template(side, said)}, notes


def _none(where: str) -> Refused:
    return Refused(
        "no tokenizer beside the model, nothing was written",
        where=where,
        expected=f"{_JSON} or {_PIECES}: a GGUF has its vocabulary inside",
        do="--hf-config DIR brings config.json and tokenizer along; of a tokenizer in other files, "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes tokenizer.json",
    )


def _check_name(name: str) -> None:
    known = {*DIGESTS, *_MORE}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        raise UsageError(
            "llama.cpp has no pre-tokenizer of this name, nothing was written",
            where=f"{OPTION} {name}",
            expected="one of " + ", ".join(sorted(known)),
            do=f"did you mean {close[0]}?" if close else "",
        )


def _bytes(side: Side, name: str) -> bytes:
    path = side[name]
    return path.make() if isinstance(path, Made) else read_small(path, what=name)


def _read(side: Side, name: str) -> dict[str, Any] | None:
    if name not in side:
        return None
    path = side[name]
    return parse_json(_bytes(side, name), where=str(path) if isinstance(path, Path) else name, what=name)


def _byte_pairs(
    side: Side, file: Mapping[str, Any], said: Mapping[str, Any], rows: int, pretokenizer: str | None, where: str
) -> tuple[Values, tuple[str, ...]]:
    model = file.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise _other(f"a model of type {(model or {}).get('type')!r}" if isinstance(model, dict) else "no model", where)
    if model.get("type") not in (None, "BPE") or not model.get("merges"):
        raise _other(f"a model of type {model.get('type')!r} with {len(model.get('merges') or ())} merges", where)
    if model.get("byte_fallback"):
        raise Refused(
            f"a SentencePiece vocabulary without {_PIECES}, nothing was written",
            where=f"{_JSON} of {where}",
            found="byte_fallback, and no scores",
            expected=f"{_PIECES}, whose scores a GGUF has inside",
            do="fetch it from where the model came from",
        )
    tokenizer = _tokenizer(side)
    notes: tuple[str, ...] = ()
    if pretokenizer is None:
        pretokenizer, how = _pretokenizer(tokenizer, file, where)
        notes = (f"text is split as {pretokenizer} does it in llama.cpp, by {how}",)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [_UNUSED] * rows
    added = {entry["content"]: entry for entry in _added(file)}
    decoder = said.get("added_tokens_decoder") or {}
    every = {**model["vocab"], **{token: entry["id"] for token, entry in added.items()}}
    for token, number in every.items():
        if type(number) is not int or not 0 <= number < rows:
            raise _too_many(token, number, rows, where)
        entry = added.get(token)
        if entry is None:
            tokens[number], types[number] = token, _NORMAL
            continue
        entry = {**entry, **(decoder.get(str(number)) or {})}
        text = token if entry.get("normalized", True) else _normalised(tokenizer, token)
        control = bool(entry.get("special")) or _looks_special(text)
        types[number] = _CONTROL if control else _USER
        tokens[number] = text if control else text.replace("\u2581", " ")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pretokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(merge, where) for merge in model["merges"]],
    }, notes


def _other(found: str, where: str) -> Refused:
    return Refused(
        "a tokenizer of a kind that is not written to a GGUF here, nothing was written",
        where=f"{_JSON} of {where}",
        expected=f"byte-level BPE with merges, or {_PIECES}",
        found=found,
    )


def _too_many(token: str, number: object, rows: int, where: str) -> Damaged:
    return Damaged(
        "a token that the model has no row for, nothing was written",
        where=f"{_JSON} of {where}",
        expected=f"ids below vocab_size, {rows}",
        found=f"{token[:40]!r} has {number!r:.40}",
        do="the tokenizer belongs to another model: --hf-config DIR names the right one",
    )


def _added(file: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens beside the vocabulary.

    Raises:
        Damaged: entries that are none.
    """
    found = file.get("added_tokens") or []
    for entry in found:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
            raise Damaged("an added token that none is", where=_JSON, found=f"{entry!r:.80}")
    return found


def _merge(merge: object, where: str) -> str:
    """Two halves with a space between; spaces in them as GPT-2 spells them."""
    if isinstance(merge, str):
        return merge
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(half, str) for half in merge):
        return " ".join(half.replace(" ", chr(ord(" ") + 256)) for half in merge)
    raise Damaged("a merge that none is", where=f"{_JSON} of {where}", found=f"{merge!r:.80}")


def _looks_special(token: str) -> bool:
    return token in _CONTROLS or any(token.startswith(a) and token.endswith(b) for a, b in _AROUND)


def _tokenizer(side: Side) -> Any:
    """
    Raises:
        ToolMissing: no package tokenizers.
        Damaged: it makes nothing of the file.
    """
    try:
        from tokenizers import Tokenizer  # only where a vocabulary is written
    except ImportError as fault:
        raise ToolMissing(
            "a tokenizer is told by the package tokenizers", found=str(fault), do="pip install tokenizers"
        ) from None
    try:
        return Tokenizer.from_str(_bytes(side, _JSON).decode())
    except Exception as fault:  # of a library, on what a file says
        raise Damaged("a tokenizer that cannot be loaded", where=_JSON, found=str(fault)[:200]) from fault


def _normalised(tokenizer: Any, token: str) -> str:
    """As the converter has it: encoded and decoded again."""
    return tokenizer.decode(tokenizer.encode(token, add_special_tokens=False).ids, skip_special_tokens=False)


def _pretokenizer(tokenizer: Any, file: Mapping[str, Any], where: str) -> tuple[str, str]:
    """llama.cpp's name for how text is split, and by what it was found.

    Raises:
        Refused: it is not known here.
    """
    digests = []
    for special in (True, False):
        ids = tokenizer.encode(PROBE, add_special_tokens=special).ids
        digests.append(sha256(str(ids).encode()).hexdigest())
        if name := NAMES.get(digests[-1]):
            return name, "what it makes of llama.cpp's probe"
    if name := _by_expression(file):
        return name, f"what {_JSON} says"
    raise Refused(
        "how this tokenizer splits text is not known here, nothing was written",
        where=f"pre_tokenizer of {_JSON} of {where}",
        expected="one that llama.cpp has a name for",
        found=f"{json.dumps(file.get('pre_tokenizer'), ensure_ascii=False)[:300]}\nprobe {digests[0]}",
        do=f"{OPTION} NAME  says which one it is",
    )


def _by_expression(file: Mapping[str, Any]) -> str:
    """The name of what a file does before its merges, where that is all that llama.cpp does under it; else ""."""
    before = file.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before]) if before.get("type") == "Sequence" else [before]
    normaliser = file.get("normalizer")
    if (normaliser or {"type": "NFC"}).get("type") != "NFC" or not steps:
        return ""
    *first, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return ""
    merges_last = bool(file["model"].get("ignore_merges"))
    if last.get("use_regex", True):
        if merges_last or normaliser:
            return ""
        if first == [{"type": "Digits", "individual_digits": True}]:
            return "smollm"
        return "" if first else "gpt-2"
    if len(first) != 1 or first[0].get("type") != "Split" or first[0].get("behavior") != "Isolated":
        return ""
    expression = (first[0].get("pattern") or {}).get("Regex")
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS
    except ImportError:
        return ""
    if first[0].get("invert"):
        return ""
    known = (name for name, whole in _BY_EXPRESSION.items() if whole == merges_last and SPLITS.get(name) == expression)
    return next(known, "")


def _specials(
    file: Mapping[str, Any] | None, said: Mapping[str, Any], config: Mapping[str, object], rows: int
) -> Values:
    """Ids of special tokens, and whether the first and last are put around a text."""
    ids = {entry["content"]: entry["id"] for entry in _added(file or {})}
    around = _around(file or {}, said)
    values: Values = {}
    for name in _SPECIAL:
        token = said.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = ids.get(text) if isinstance(text, str) else None
        number = config.get(f"{name}_token_id") if number is None else number
        if type(number) is int and 0 <= number < rows:
            values[f"tokenizer.ggml.{_KEYS.get(name, name)}_token_id"] = number
    for name in ("bos", "eos", "sep"):
        entry = said.get(f"add_{name}_token")
        wanted = around.get(name, entry)
        if isinstance(wanted, bool):
            values[f"tokenizer.ggml.add_{name}_token"] = wanted
    return values


def _around(file: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, bool]:
    """What ``post_processor`` puts around a text: of templates the first and the last token."""
    found: dict[str, bool] = {}
    processor = file.get("post_processor") or {}

    def text(name: str) -> object:
        token = said.get(f"{name}_token")
        return token.get("content") if isinstance(token, dict) else token

    for one in processor.get("processors", [processor] if processor else []):
        if one.get("type") == "ByteLevel":
            found = {"bos": False, "eos": False, **found}
        elif one.get("type") == "TemplateProcessing" and len(single := one.get("single") or []) > 1:
            if first := single[0].get("SpecialToken", {}).get("id"):
                found["bos"] = first in (text("bos"), text("cls")) or not said
            if last := single[-1].get("SpecialToken", {}).get("id"):
                found["eos"] = last == text("eos") or not said
    return found


def _template(side: Side, said: Mapping[str, Any]) -> Values:
    """The chat template of tokenizer_config.json, or of a file of its own."""
    found = said.get("chat_template")
    if found is None and "chat_template.jinja" in side:
        found = _bytes(side, "chat_template.jinja").decode(errors="replace")
    if found is None and "chat_template.json" in side:
        found = (_read(side, "chat_template.json") or {}).get("chat_template")
    if isinstance(found, str):
        return {"tokenizer.chat_template": found} if found else {}
    values: Values = {}
    named = {str(one.get("name")): one.get("template") for one in found or [] if isinstance(one, dict)}
    for name, template in named.items():
        if isinstance(template, str) and template:
            values["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    others = [name for name in named if name != "default"]
    return {**values, "tokenizer.chat_templates": others} if others else values


def _pieces(side: Side, said: Mapping[str, Any], rows: int, where: str) -> Values:
    """A SentencePiece model: its pieces, and the tokens that files beside it add."""
    tokens: list[str | bytes] = [f"[PAD{number}]" for number in range(rows)]
    scores, types = [_PADDED] * rows, [_UNUSED] * rows
    for number, (piece, score, kind) in enumerate(_model_pieces(_bytes(side, _PIECES), where)):
        if number >= rows:
            raise _too_many(piece.decode(errors="replace"), number, rows, where)
        tokens[number], scores[number] = piece, score
        types[number] = _NORMAL if kind == _USER else kind
    for token, number in (_read(side, "added_tokens.json") or {}).items():
        if type(number) is not int or not 0 <= number < rows:
            raise _too_many(token, number, rows, where)
        tokens[number], scores[number], types[number] = token, _ADDED, _USER
    for key, entry in (said.get("added_tokens_decoder") or {}).items():
        number = int(key) if key.isdecimal() else -1
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(token, str) or not 0 <= number < rows:
            raise _too_many(str(token), key, rows, where)
        control = bool(entry.get("special")) or _looks_special(token)
        tokens[number] = token if control else token.replace("\u2581", " ")
        scores[number], types[number] = _ADDED, _CONTROL if control else _USER
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
        piece, score, kind = b"", 0.0, _NORMAL
        for inner, found in _fields(value, where):
            if inner == 1 and isinstance(found, bytes):
                piece = found
            elif inner == 2 and isinstance(found, bytes) and len(found) == 4:
                (score,) = struct.unpack("<f", found)
            elif inner == 3 and isinstance(found, int):
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
        "no SentencePiece model", where=f"{_PIECES} of {where}", expected="a protocol buffer with pieces",
        do="the download or copy was cut off: fetch it again",
    )  # fmt: skip
