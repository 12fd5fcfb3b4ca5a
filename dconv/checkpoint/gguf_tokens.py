"""What the makers of a GGUF's vocabulary share: kinds of tokens, files beside a model, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import Made, parse_json, read_small
from dconv.checkpoint.source import Side
from dconv.errors import Damaged, Refused
from dconv.sharding.parsed import Json, is_dict, is_list

Values = dict[str, Any]
#: ``llama_token_type``.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: Scores of tokens that are none of SentencePiece's.
ADDED, PADDED = -1000.0, -10000.0
JSON, PIECES, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
#: Tokens that are control tokens whatever their file says (``does_token_look_special``).
_CONTROLS: Final = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_STEPS: Final = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
_TEMPLATED: Final = {".single": list, ".single.*": dict, ".single.*.SpecialToken": dict}
#: What the parts of each file are, by their place in it.
_FORMS: Final[Mapping[str, Mapping[str, type | tuple[type, ...]]]] = {
    JSON: {
        "model": dict, "model.merges": list, "added_tokens": list,
        **dict.fromkeys(_STEPS, dict),
        **{f"{part}.{inner}": list for part, inner in _STEPS.items()},
        **{f"{part}.{inner}.*": dict for part, inner in _STEPS.items()},
        "pre_tokenizer.pretokenizers.*.pattern": dict,
        **{f"post_processor{inner}": kind for inner, kind in _TEMPLATED.items()},
        **{f"post_processor.processors.*{inner}": kind for inner, kind in _TEMPLATED.items()},
    },
    CONFIG: {"added_tokens_decoder": dict, "added_tokens_decoder.*": dict, "chat_template": (str, list)},
    "chat_template.json": {"chat_template": (str, list)},
}  # fmt: skip
_AROUND: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


def bytes_of(side: Side, name: str) -> bytes:
    """The bytes of a file that travels with the model, read or made."""
    path = side[name]
    return path.make() if isinstance(path, Made) else read_small(path, what=name)


def read(side: Side, name: str) -> dict[str, Any] | None:
    """A file of the tokenizer, parsed, its parts seen to be of their types; None where there is none.

    Raises:
        Damaged: it is no JSON, or a part is of another type.
    """
    if name not in side:
        return None
    path = side[name]
    file = parse_json(bytes_of(side, name), where=str(path) if isinstance(path, Path) else name, what=name)
    _check_form(file, name)
    return file


@contextmanager
def asked(where: str) -> Generator[None, None, None]:
    """What a library raises on what a file says; a panic of its Rust is no `Exception`.

    Raises:
        Damaged: it does.
    """
    try:
        yield
    except BaseException as fault:
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        raise Damaged("a tokenizer that cannot be used", where=where, found=str(fault)[:200]) from fault


def _check_form(file: Mapping[str, Any], name: str) -> None:
    """That the parts of a file that are looked into are what they should be.

    Raises:
        Damaged: one is not.
    """
    for path, kind in _FORMS.get(name, {}).items():
        for part in _parts(file, path.split(".")):
            if not isinstance(part, kind):
                raise Damaged(f"a part of {name} that none is", where=path, found=f"{part!r:.80}")


def _parts(node: object, keys: Sequence[str]) -> Iterator[object]:
    """What lies at a path of keys, ``*`` being all of a list or a mapping. What is null is not there."""
    if not keys:
        yield node
    elif keys[0] == "*":
        for part in node.values() if is_dict(node) else node if is_list(node) else ():
            yield from _parts(part, keys[1:])
    elif is_dict(node) and node.get(keys[0]) is not None:
        yield from _parts(node[keys[0]], keys[1:])


def added_tokens(file: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens beside the vocabulary.

    Raises:
        Damaged: entries that are none.
    """
    found: list[Any] = file.get("added_tokens") or []
    for entry in found:
        if not is_dict(entry) or not isinstance(entry.get("content"), str) or type(entry.get("id")) is not int:
            raise Damaged("an added token that none is", where=JSON, found=f"{entry!r:.80}")
    return found


def halves_of(merge: Json, where: str) -> tuple[str, str]:
    """What a merge joins: two texts with a space between, or a list of the two, as newer files have it.

    Raises:
        Damaged: a merge that none is.
    """
    halves = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(halves, list) and len(halves) == 2 and all(isinstance(half, str) and half for half in halves):
        return halves[0], halves[1]
    raise Damaged("a merge that none is", where=f"{JSON} of {where}", found=f"{merge!r:.80}")


def looks_special(token: str) -> bool:
    """Whether a token is a control token by its looks, as llama.cpp's converter takes it."""
    return token in _CONTROLS or any(token.startswith(a) and token.endswith(b) for a, b in _AROUND)


def other(found: str, where: str) -> Refused:
    """The refusal of a tokenizer that llama.cpp has no kind for."""
    return Refused(
        "a tokenizer of a kind that is not written to a GGUF here, nothing was written",
        where=f"{JSON} of {where}",
        expected=f"byte-level BPE with merges, or {PIECES}",
        found=found,
    )


def too_many(token: str, number: object, rows: int, where: str) -> Damaged:
    """The error of a token (of the file ``where``) whose id is no row of the embedding, of which there are ``rows``."""
    return Damaged(
        "a token that the model has no row for, nothing was written",
        where=where,
        expected=f"ids below vocab_size, {rows}",
        found=f"{token[:40]!r} has {number!r:.40}",
        do="the tokenizer belongs to another model: --hf-config DIR names the right one",
    )
