"""Kinds of damage, and how many of them are tried: each draws one, does it, and says which tensors it hit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tests.damage.containers import CONTAINERS, Made
from tests.damage.truth import Tensor

PAGE: Final = 4096
#: Keys of a config.json that change what the model computes, with what they are edited to.
EDITS: Final[Mapping[str, Any]] = {
    "num_hidden_layers": 1, "rope_theta": 500000.0, "rms_norm_eps": 1e-6, "hidden_act": "gelu", "vocab_size": 60,
    "num_attention_heads": 8, "tie_word_embeddings": True, "torch_dtype": "float16", "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """What was done.

    Attributes:
        words: for a person whose test fails.
        hit: what must be named: tensors whose bytes are others now, and files that changed otherwise.
    """

    words: str
    hit: frozenset[str]


Draw = np.random.Generator
Kind = Callable[[Made, Draw], Damage]


def flip_weight(made: Made, draw: Draw) -> Damage:
    """One bit of a tensor."""
    if not made.tensors:
        return flip_anywhere(made, draw)
    one = _one(draw, made.tensors)
    return _flip(made, one.file, int(draw.integers(one.begin, one.end)), int(draw.integers(8)))


def flip_between(made: Made, draw: Draw) -> Damage:
    """One bit of what is no tensor's in a file of weights: header, zip directory, pickle, padding."""
    free = {file: np.ones(len(made.content[file]), bool) for file in {one.file for one in made.tensors}}
    for one in made.tensors:
        free[one.file][one.begin : one.end] = False
    files = sorted(file for file, where in free.items() if where.any())
    if not files:
        return flip_anywhere(made, draw)
    file = _one(draw, files)
    at = np.flatnonzero(free[file])
    return _flip(made, file, int(_one(draw, at)), int(draw.integers(8)))


def flip_beside(made: Made, draw: Draw) -> Damage:
    """One bit of config, tokenizer, index, metadata; where there is no such file, of any."""
    weights = {one.file for one in made.tensors}
    files = [file for file in made.content if file not in weights and file != made.kind.seal and made.content[file]]
    return _flip_in(made, draw, _one(draw, files)) if files else flip_anywhere(made, draw)


def flip_receipt(made: Made, draw: Draw) -> Damage:
    """One bit of the file with the digests."""
    return _flip_in(made, draw, made.kind.seal)


def flip_anywhere(made: Made, draw: Draw) -> Damage:
    """One bit of any file; large files are hit more often."""
    files = [file for file, data in made.content.items() if data]
    sizes = np.array([len(made.content[file]) for file in files])
    return _flip_in(made, draw, str(draw.choice(files, p=sizes / sizes.sum())))


def truncate(made: Made, draw: Draw) -> Damage:
    """A file ends too early; often it lacks a byte or two only."""
    file, data = _file(made, draw)
    size = len(data) - int(draw.integers(1, 3)) if draw.random() < 0.3 else int(draw.integers(len(data)))
    return _write(made, {file: data[: max(size, 0)]}, f"{file} cut to {size} of {len(data)} bytes")


def extend(made: Made, draw: Draw) -> Damage:
    """A file goes on: zeros, spaces or noise."""
    file, data = _file(made, draw)
    count = int(draw.integers(1, 2 * PAGE))
    more = [bytes(count), b" " * count, draw.bytes(count)][int(draw.integers(3))]
    return _write(made, {file: data + more}, f"{file} with {count} bytes more")


def lose_page(made: Made, draw: Draw) -> Damage:
    """A page of a file reads as zeros."""
    while True:
        file, data = _file(made, draw)
        begin = int(draw.integers(-(-len(data) // PAGE))) * PAGE
        lost = data[begin : begin + PAGE]
        if any(lost):
            changed = data[:begin] + bytes(len(lost)) + data[begin + PAGE :]
            return _write(made, {file: changed}, f"{file} without the page at {begin}")


def swap_tensors(made: Made, draw: Draw) -> Damage:
    """Two tensors of one form have each other's bytes."""
    by_form: dict[str, list[Tensor]] = {}
    for one in made.tensors:
        by_form.setdefault(one.form, []).append(one)
    pairs = [
        (a, b)
        for alike in by_form.values()
        for i, a in enumerate(alike)
        for b in alike[:i]
        if _bytes(made, a) != _bytes(made, b)
    ]
    if not pairs:
        return swap_files(made, draw)
    a, b = _one(draw, pairs)
    changed = {file: bytearray(made.content[file]) for file in (a.file, b.file)}
    changed[a.file][a.begin : a.end], changed[b.file][b.begin : b.end] = _bytes(made, b), _bytes(made, a)
    return _write(made, changed, f"{a.name} and {b.name} swapped")


def swap_files(made: Made, draw: Draw) -> Damage:
    """Two files have each other's names."""
    while True:
        (a, first), (b, second) = _file(made, draw), _file(made, draw)
        if first != second:
            return _write(made, {a: second, b: first}, f"{a} and {b} swapped", whole=True)


def put_in(made: Made, draw: Draw) -> Damage:
    """A file is that of another model of the same shape."""
    files = [file for file, data in made.foreign.items() if made.content.get(file, data) != data]
    file = _one(draw, files)
    return _write(made, {file: made.foreign[file]}, f"{file} of another model", whole=True)


def delete(made: Made, draw: Draw) -> Damage:
    """A file is gone. Not the one with the digests: without it nothing is promised."""
    file = _one(draw, [file for file in made.content if file != made.kind.seal])
    (made.folder / file).unlink()
    return Damage(f"{file} deleted", frozenset([file]))


def edit_config(made: Made, draw: Draw) -> Damage:
    """A value of config.json is another."""
    files = [file for file in made.content if file.endswith("config.json") and "tokenizer" not in file]
    configs = [(file, said) for file in files if EDITS.keys() & (said := json.loads(made.content[file])).keys()]
    if not configs:
        return edit_receipt(made, draw)
    file, said = _one(draw, configs)
    key = _one(draw, sorted(EDITS.keys() & said.keys()))
    value = EDITS[key] if said[key] != EDITS[key] else None
    changed = json.dumps({**said, key: value}, indent=2).encode()
    return _write(made, {file: changed}, f"{key} of {file} is {value} now")


def edit_receipt(made: Made, draw: Draw) -> Damage:
    """The file with the digests says something else, in good JSON, and keeps the digest of its own."""
    said = json.loads(made.content[made.kind.seal])
    lists = [key for key in ("tensors", "frames", "closing", "files") if said.get(key)]
    key = _one(draw, [*lists, "dconv"])
    if key == "dconv":
        said[key] = "9.9.9"
    else:
        name = _one(draw, sorted(said[key]))
        entry = said[key].pop(name)
        if draw.random() < 0.5:  # else it is no longer listed
            said[key][name] = _altered(entry)
    changed = json.dumps(said, indent=1).encode() + b"\n"
    return _write(made, {made.kind.seal: changed}, f"{key} of {made.kind.seal} edited")


KINDS: Final[tuple[Kind, ...]] = (
    flip_weight, flip_between, flip_beside, flip_receipt, flip_anywhere, truncate, extend, lose_page, swap_tensors,
    swap_files, put_in, delete, edit_config, edit_receipt,
)  # fmt: skip
#: Rounds of all kinds that are tried on each container: with --long, and else.
ROUNDS: Final = 8
QUICK: Final = 1
#: How many damages ``--long`` tries, in all and of each kind.
EACH: Final = ROUNDS * len(CONTAINERS)
TOTAL: Final = EACH * len(KINDS)


def damages(rounds: range) -> list[tuple[int, Kind]]:
    """Seeds and kinds, in the order in which they are tried."""
    return [(number * len(KINDS) + i, kind) for number in rounds for i, kind in enumerate(KINDS)]


def _altered(entry: Any) -> Any:
    """Another digest, or what has one."""
    if isinstance(entry, dict):
        key = "digest" if "digest" in entry else "sha256"
        return {**entry, key: _altered(entry[key])}
    return f"{'1' if entry[0] == '0' else '0'}{entry[1:]}"


def _one(draw: Draw, among: Any) -> Any:
    return among[int(draw.integers(len(among)))]


def _file(made: Made, draw: Draw) -> tuple[str, bytes]:
    file = _one(draw, [file for file, data in made.content.items() if data])
    return file, made.content[file]


def _bytes(made: Made, one: Tensor) -> bytes:
    return made.content[one.file][one.begin : one.end]


def _flip_in(made: Made, draw: Draw, file: str) -> Damage:
    return _flip(made, file, int(draw.integers(len(made.content[file]))), int(draw.integers(8)))


def _flip(made: Made, file: str, at: int, bit: int) -> Damage:
    changed = bytearray(made.content[file])
    changed[at] ^= 1 << bit
    return _write(made, {file: changed}, f"bit {bit} of byte {at} of {file}")


def _write(made: Made, files: Mapping[str, bytes | bytearray], words: str, *, whole: bool = False) -> Damage:
    """Write changed files; the tensors that were hit are those whose bytes are others at their place.

    Args:
        whole: a file stands in another's place: it is named or its tensors are, whatever else is said of what is in it.
    """
    hit: set[str] = set()
    for file, data in files.items():
        before = made.content[file]
        assert bytes(data) != before
        (made.folder / file).write_bytes(data)
        tensors = [one for one in made.tensors if one.file == file]
        names = {one.name for one in tensors if data[one.begin : one.end] != _bytes(made, one)}
        hit |= {file} if whole or not names else names
    return Damage(words, frozenset() if made.kind.seal in files else frozenset(hit))
