"""A byte-level tokenizer.json as the vocabulary of a GGUF, as llama.cpp's converter makes it (``_set_vocab_gpt2``).

How text is split before the merges is known by what a tokenizer makes of one text (`gguf_pretokenizers`), or by the
expression that its file has, where that is one that llama.cpp computes; else it is asked for, never guessed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

from dconv.checkpoint.gguf_pretokenizers import DIGESTS, NAMES, PROBE
from dconv.checkpoint.gguf_tokens import (
    CONTROL,
    JSON,
    NORMAL,
    UNUSED,
    USER,
    Values,
    added_tokens,
    asked,
    bytes_of,
    halves_of,
    looks_special,
    other,
    too_many,
)
from dconv.checkpoint.source import Side
from dconv.errors import Refused, ToolMissing, UsageError
from dconv.sharding.parsed import Json, is_dict

#: Names for the expression that splits text, with whether whole words come before merges (``ignore_merges``).
_BY_EXPRESSION: Final = {"llama-bpe": True, "qwen2": False, "qwen35": False, "gpt-4o": False, "tekken": True}
#: Names that ``--gguf-pretokenizer`` takes beside those of the table.
_MORE: Final = ("default", "mpt", "llama3", "jina-v2-de")
OPTION: Final = "--gguf-pretokenizer"


def check_name(name: str) -> None:
    """See that llama.cpp knows a name that was given for how text is split.

    Raises:
        UsageError: it does not; the nearest one is named.
    """
    known = {*DIGESTS, *_MORE}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        raise UsageError(
            "llama.cpp has no pre-tokenizer of this name, nothing was written",
            where=f"{OPTION} {name}",
            expected="one of " + ", ".join(sorted(known)),
            do=f"did you mean {close[0]}?" if close else "",
        )


def byte_pairs(
    side: Side, file: Mapping[str, Any], said: Mapping[str, Any], rows: int, pretokenizer: str | None, where: str
) -> tuple[Values, tuple[str, ...]]:
    """The keys of a byte-level vocabulary with merges, as llama.cpp's converter writes them, and what to say of them.

    Args:
        side: files that travel with the model, by name.
        file: tokenizer.json.
        said: tokenizer_config.json.
        rows: of the embedding: as many tokens there are.
        pretokenizer: what llama.cpp calls the way in which text is split; None finds it out.
        where: the model, for errors.

    Raises:
        Refused: a tokenizer of another kind, or one that splits text as none that is known.
        Damaged: a token without a row, a merge that is none.
        ToolMissing: no package tokenizers.
    """
    model = file.get("model")
    if not is_dict(model) or not isinstance(model.get("vocab"), dict):
        raise other(f"a model of type {model.get('type')!r}" if is_dict(model) else "no model", where)
    if model.get("type") not in (None, "BPE") or not model.get("merges"):
        raise other(f"a model of type {model.get('type')!r} with {len(model.get('merges') or ())} merges", where)
    tokenizer = _tokenizer(side)
    notes: tuple[str, ...] = ()
    if pretokenizer is None:
        pretokenizer, how = _pretokenizer(tokenizer, file, where)
        notes = (f"text is split as {pretokenizer} does it in llama.cpp, by {how}",)
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    added: dict[str, dict[str, Any]] = {entry["content"]: entry for entry in added_tokens(file)}
    decoder: dict[str, Any] = said.get("added_tokens_decoder") or {}
    every: dict[str, Any] = {**model["vocab"], **{token: entry["id"] for token, entry in added.items()}}
    for token, number in every.items():
        if type(number) is not int or not 0 <= number < rows:
            raise too_many(token, number, rows, f"{JSON} of {where}")
        entry = added.get(token)
        if entry is None:
            tokens[number], types[number] = token, NORMAL
            continue
        more: dict[str, Any] = decoder.get(str(number)) or {}
        entry = {**entry, **more}
        text = token if entry.get("normalized", True) else _normalised(tokenizer, token)
        control = bool(entry.get("special")) or looks_special(text)
        types[number] = CONTROL if control else USER
        tokens[number] = text if control else text.replace("\u2581", " ")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pretokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(merge, where) for merge in model["merges"]],
    }, notes


def _merge(merge: Json, where: str) -> str:
    """Two halves with a space between; spaces in them as GPT-2 spells them."""
    if isinstance(merge, str):
        return merge
    return " ".join(half.replace(" ", chr(ord(" ") + 256)) for half in halves_of(merge, where))


def _tokenizer(side: Side) -> Any:
    """The tokenizer that the package tokenizers makes of tokenizer.json.

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
    with asked(JSON):
        return Tokenizer.from_str(bytes_of(side, JSON).decode())


def _normalised(tokenizer: Any, token: str) -> str:
    """As the converter has it: encoded and decoded again."""
    with asked(JSON):
        return tokenizer.decode(tokenizer.encode(token, add_special_tokens=False).ids, skip_special_tokens=False)


def _pretokenizer(tokenizer: Any, file: Mapping[str, Any], where: str) -> tuple[str, str]:
    """llama.cpp's name for how text is split, and by what it was found.

    Raises:
        Refused: it is not known here.
    """
    digests: list[str] = []
    for special in (True, False):
        with asked(JSON):
            ids = tokenizer.encode(PROBE, add_special_tokens=special).ids
        digests.append(sha256(str(ids).encode()).hexdigest())
        if name := NAMES.get(digests[-1]):
            return name, "what it makes of llama.cpp's probe"
    if name := _by_expression(file):
        return name, f"what {JSON} says"
    raise Refused(
        "how this tokenizer splits text is not known here, nothing was written",
        where=f"pre_tokenizer of {JSON} of {where}",
        expected="one that llama.cpp has a name for",
        found=f"{json.dumps(file.get('pre_tokenizer'), ensure_ascii=False)[:300]}\nprobe {digests[0]}",
        do=f"{OPTION} NAME  says which one it is",
    )


def _by_expression(file: Mapping[str, Any]) -> str:
    """The name of what a file does before its merges, where that is all that llama.cpp does under it; else ""."""
    before: dict[str, Any] = file.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = [before]
    if before.get("type") == "Sequence":
        steps = before.get("pretokenizers", steps)
    normaliser: dict[str, Any] | None = file.get("normalizer")
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
    pattern: dict[str, Any] = first[0].get("pattern") or {}
    expression = pattern.get("Regex")
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS
    except ImportError:
        return ""
    if first[0].get("invert"):
        return ""
    known = (name for name, whole in _BY_EXPRESSION.items() if whole == merges_last and SPLITS.get(name) == expression)
    return next(known, "")
