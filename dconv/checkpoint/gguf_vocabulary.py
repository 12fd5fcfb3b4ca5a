"""A tokenizer's files as the vocabulary of a GGUF: tokens, types, scores, merges, ids, the chat template.

As llama.cpp's converter makes it of the same files (``conversion/base.py``, ``SpecialVocab`` of the package gguf).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from dconv.checkpoint.files import Made
from dconv.checkpoint.gguf_byte_pairs import OPTION, byte_pairs, check_name
from dconv.checkpoint.gguf_merged_pieces import merged_pieces
from dconv.checkpoint.gguf_older import PAIRS, as_json
from dconv.checkpoint.gguf_pieces import pieces
from dconv.checkpoint.gguf_tokens import CONFIG, JSON, PIECES, Values, added_tokens, bytes_of, read
from dconv.checkpoint.source import Side
from dconv.errors import Damaged, Refused, UsageError
from dconv.sharding.parsed import is_dict

_SPECIAL: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
#: GGUF's keys for their ids, where they are not ``<name>``.
_KEYS: Final = {"unk": "unknown", "sep": "seperator", "pad": "padding"}


def vocabulary(
    side: Side, config: Mapping[str, object], rows: int, arch: str, pretokenizer: str | None, where: str
) -> tuple[Values, tuple[str, ...]]:
    """The keys ``tokenizer.*``, and what to say of them.

    Args:
        side: the files that travel with the model.
        config: config.json.
        rows: of the embedding: as many tokens there are.
        arch: GGUF's architecture.
        pretokenizer: what llama.cpp calls the way in which text is split; None finds it out.
        where: the model, for errors.

    Raises:
        Refused: no tokenizer, one of a kind that llama.cpp lacks, or one that splits text as none that is known.
        Damaged: a file that is broken, or has more tokens than the model.
        ToolMissing: no package tokenizers.
    """
    if pretokenizer is not None:
        check_name(pretokenizer)
    said = read(side, CONFIG) or {}
    notes: tuple[str, ...] = ()
    if PIECES in side:
        _check_unsplit(pretokenizer)
        values = pieces(side, said, rows, where)
        if arch.startswith("gemma"):
            values["tokenizer.ggml.add_space_prefix"] = False
        elif isinstance(prefix := said.get("add_prefix_space"), bool) and arch == "llama":
            values["tokenizer.ggml.add_space_prefix"] = prefix
        file = read(side, JSON)
    else:
        if JSON not in side and all(name in side for name in PAIRS):
            side = {**side, JSON: Made(partial(as_json, side, config))}
        file = read(side, JSON)
        if file is None:
            raise _none(where)
        model: dict[str, Any] = file.get("model") or {}
        _check_vocabulary(model)
        if isinstance(model.get("vocab"), dict) and model.get("byte_fallback") and model.get("merges"):
            _check_unsplit(pretokenizer)
            values, notes = merged_pieces(file, rows, where)
        else:
            values, notes = byte_pairs(side, file, said, rows, pretokenizer, where)
    return {**values, **_specials(file, said, config, rows), **_template(side, said)}, notes


def _check_vocabulary(model: Mapping[str, Any]) -> None:
    """That a tokenizer.json's vocabulary is of the type that goes with its model.

    Raises:
        Damaged: it is not.
    """
    held, kind = model.get("vocab"), list if model.get("type") == "Unigram" else dict
    if held is not None and not isinstance(held, kind):
        raise Damaged(f"a part of {JSON} that none is", where="model.vocab", found=f"{held!r:.80}")


def _check_unsplit(pretokenizer: str | None) -> None:
    if pretokenizer is not None:
        raise UsageError(
            "a SentencePiece vocabulary is not split before its merges, nothing was written",
            where=f"{OPTION} {pretokenizer}",
            do="leave it out",
        )


def _none(where: str) -> Refused:
    return Refused(
        "no tokenizer beside the model, nothing was written",
        where=where,
        expected=f"{JSON}, {PIECES} or {' and '.join(PAIRS)}: a GGUF has its vocabulary inside",
        do="--hf-config DIR brings config.json and tokenizer along; of a tokenizer in other files, "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes tokenizer.json",
    )


def _specials(
    file: Mapping[str, Any] | None, said: Mapping[str, Any], config: Mapping[str, object], rows: int
) -> Values:
    """Ids of special tokens, and whether the first and last are put around a text."""
    ids = {entry["content"]: entry["id"] for entry in added_tokens(file or {})}
    around = _around(file or {}, said)
    values: Values = {}
    for name in _SPECIAL:
        token = said.get(f"{name}_token")
        text = token.get("content") if is_dict(token) else token
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
    processor: dict[str, Any] = file.get("post_processor") or {}
    steps: list[dict[str, Any]] = (processor.get("processors") or []) if "processors" in processor else [processor]

    def text(name: str) -> object:
        token = said.get(f"{name}_token")
        return token.get("content") if is_dict(token) else token

    for one in steps:
        if one.get("type") == "ByteLevel":
            found = {"bos": False, "eos": False, **found}
        elif one.get("type") == "TemplateProcessing" and len(single := one.get("single") or []) > 1:
            if first := _special(single[0]):
                found["bos"] = first in (text("bos"), text("cls")) or not said
            if last := _special(single[-1]):
                found["eos"] = last == text("eos") or not said
    return found


def _special(part: Mapping[str, Any]) -> object:
    """The token of a part of a template; None of a text's place."""
    token: Mapping[str, Any] = part.get("SpecialToken") or {}
    return token.get("id")


def _template(side: Side, said: Mapping[str, Any]) -> Values:
    """The chat template of tokenizer_config.json, or of a file of its own."""
    found = said.get("chat_template")
    if found is None and "chat_template.jinja" in side:
        found = bytes_of(side, "chat_template.jinja").decode(errors="replace")
    if found is None and "chat_template.json" in side:
        found = (read(side, "chat_template.json") or {}).get("chat_template")
    if isinstance(found, str):
        return {"tokenizer.chat_template": found} if found else {}
    values: Values = {}
    named: dict[str, Any] = {str(one.get("name")): one.get("template") for one in found or () if is_dict(one)}
    for name, template in named.items():
        if isinstance(template, str) and template:
            values["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    others = [name for name in named if name != "default"]
    return {**values, "tokenizer.chat_templates": others} if others else values
