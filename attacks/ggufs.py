"""GGUF headers that lie."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from attacks.corpus import Attack, Canary

_HUGE: Final = 1 << 62
_NAMES: Final = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def number(value: int) -> bytes:
    """A value of type uint32."""
    return struct.pack("<II", 4, value)


@dataclass(frozen=True)
class Tensor:
    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int

    def packed(self) -> bytes:
        axes = len(self.shape)
        return text(self.name) + struct.pack(f"<I{axes}QIQ", axes, *reversed(self.shape), self.kind, self.offset)


@dataclass(frozen=True)
class File:
    """A GGUF, field by field. ``counts``: of tensors and keys, where they are lies."""

    keys: tuple[tuple[bytes, bytes], ...]
    tensors: tuple[Tensor, ...]
    body: bytes = field(repr=False)
    version: bytes = struct.pack("<I", 3)
    counts: tuple[int, int] | None = None
    alignment: int = 32

    def packed(self) -> bytes:
        tensors, keys = self.counts or (len(self.tensors), len(self.keys))
        head = b"GGUF" + self.version + struct.pack("<QQ", tensors, keys)
        head += b"".join(text(key) + value for key, value in self.keys)
        head += b"".join(tensor.packed() for tensor in self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.body

    def write(self, path: Path) -> None:
        path.write_bytes(self.packed())

    def with_key(self, key: str | bytes, value: bytes, *, first: bool = False) -> File:
        name = key if isinstance(key, bytes) else key.encode()
        kept = tuple(pair for pair in self.keys if pair[0] != name)
        return replace(self, keys=((name, value), *kept) if first else (*kept, (name, value)))

    def with_tensor(self, index: int, **changes: Any) -> File:
        tensors = list(self.tensors)
        tensors[index] = replace(tensors[index], **changes)
        return replace(self, tensors=tuple(tensors))


def good(config: Mapping[str, Any], header: Mapping[str, Any], body: bytes) -> File:
    """A Llama without a vocabulary, of a safetensors file's tensors in bf16."""
    keys = [(b"general.architecture", struct.pack("<I", 8) + text("llama"))]
    for key, named in (
        ("block_count", "num_hidden_layers"), ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"), ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"), ("attention.head_count_kv", "num_key_value_heads"),
        ("rope.dimension_count", "head_dim"), ("vocab_size", "vocab_size"),
    ):  # fmt: skip
        keys.append((f"llama.{key}".encode(), number(config[named])))
    keys.append((b"llama.attention.layer_norm_rms_epsilon", struct.pack("<If", 6, config["rms_norm_eps"])))
    keys.append((b"llama.rope.freq_base", struct.pack("<If", 6, config["rope_theta"])))
    tensors, data = [], b""
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            tensors.append(Tensor(_named(name), tuple(entry["shape"]), 30, len(data)))
            data += body[low:high] + bytes(-(high - low) % 32)
    return File(tuple(keys), tuple(tensors), data)


def _named(name: str) -> bytes:
    stem = name.removesuffix(".weight")
    parts = stem.split(".")
    if parts[1:2] == ["layers"]:
        return f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:])]}.weight".encode()
    return f"{_NAMES[stem]}.weight".encode()


def _parse(path: Path) -> File:
    """The twin's file, which has only the types that `good` writes."""
    data = path.read_bytes()
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    at = 24
    held: list[tuple[bytes, bytes]] = []
    listed: list[Tensor] = []

    def name() -> bytes:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        return data[at - length : at]

    for _ in range(keys):
        key, start = name(), at
        at += 4
        if data[start] == 8:
            name()
        else:
            at += 4
        held.append((key, data[start:at]))
    for _ in range(tensors):
        key = name()
        (axes,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{axes}QIQ", data, at + 4)
        at += 4 + 8 * axes + 12
        listed.append(Tensor(key, tuple(reversed(shape)), kind, offset))
    return File(tuple(held), tuple(listed), data[at + -at % 32 :])


def rename_first(path: Path, name: bytes) -> None:
    """Gives the first tensor another name."""
    _parse(path).with_tensor(0, name=name).write(path)


def _change(change: Callable[[File], File]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, _canary: Canary) -> None:
        path = folder / "model.gguf"
        change(_parse(path)).write(path)

    return spoil


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, _canary: Canary) -> None:
        path = folder / "model.gguf"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _sparse(folder: Path, _canary: Canary) -> None:
    path = folder / "model.gguf"
    file = _parse(path).with_key("x", struct.pack("<IIQ", 9, 0, 1 << 40), first=True)
    with path.open("wb") as out:
        out.write(file.packed())
        out.truncate(1 << 41)


def _split(names: tuple[str, ...]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, _canary: Canary) -> None:
        data = (folder / "model.gguf").read_bytes()
        (folder / "model.gguf").unlink()
        for name in names:
            (folder / name).write_bytes(data)

    return spoil


def _link_in_set(folder: Path, canary: Canary) -> None:
    path = folder / "model.gguf"
    path.rename(folder / "model-00001-of-00002.gguf")
    (folder / "model-00002-of-00002.gguf").symlink_to(canary.secret)


def _array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, kind, count) + rest


_BROKEN: Final = "a GGUF header is broken"
#: name, idea, what dconv says, what is done.
_HEADERS: Final[tuple[tuple[str, str, str, Callable[[File], File]], ...]] = (
    ("keys-2-62", "more keys than any memory holds", "a key is implausibly long",
     lambda f: replace(f, counts=(len(f.tensors), _HUGE))),
    ("tensors-2-62", "more tensors than any memory holds", "no name of a tensor",
     lambda f: replace(f, counts=(_HUGE, len(f.keys)))),
    ("text-2-62", "a text longer than any file", "is implausibly long",
     lambda f: f.with_key("x", struct.pack("<IQ", 8, _HUGE), first=True)),
    ("name-2-64", "a name's own length is 2^64 - 1", "is implausibly long",
     lambda f: replace(f, body=b"\xff" * 64, tensors=(), counts=(len(f.tensors), len(f.keys) + 1))),
    ("array-2-62", "an array of 2^62 numbers", "cut off inside its header",
     lambda f: f.with_key("x", _array(4, _HUGE), first=True)),
    ("array-overflow", "a count whose product with the item's size wraps around to 0", "cut off inside its header",
     lambda f: f.with_key("x", _array(10, 1 << 61), first=True)),
    ("array-of-arrays", "arrays in arrays, for readers that recurse", "an array of what no array has",
     lambda f: f.with_key("x", _array(9, 1, struct.pack("<IQ", 9, 1) * 50_000), first=True)),
    ("array-of-texts", "2^62 texts", "cut off inside its header",
     lambda f: f.with_key("x", _array(8, _HUGE), first=True)),
    ("type-99", "a value of a type that does not exist", "a value of no known type",
     lambda f: f.with_key("x", struct.pack("<II", 99, 0), first=True)),
    ("key-twice", "one key twice, with two values", "a key stands there twice",
     lambda f: replace(f, keys=(*f.keys, (b"llama.block_count", number(1))))),
    ("key-no-text", "a key that is no UTF-8", "a key is no text", lambda f: f.with_key(b"\xff\xfe", number(1))),
    ("alignment-0", "an alignment to divide by", "an alignment that none is",
     lambda f: f.with_key("general.alignment", number(0))),
    ("alignment-48", "an alignment that is no power of two", "an alignment that none is",
     lambda f: f.with_key("general.alignment", number(48))),
    ("alignment-2-31", "an alignment of 2 GiB", "the file ends before its tensors do",
     lambda f: f.with_key("general.alignment", number(1 << 31))),
    ("alignment-text", "an alignment that is a text", "an alignment that none is",
     lambda f: f.with_key("general.alignment", struct.pack("<I", 8) + text("32"))),
    ("architecture-number", "an architecture that is a number", "architecture is no name",
     lambda f: f.with_key("general.architecture", number(7))),
    ("architecture-path", "an architecture that is a path and a key's first part", "architecture is no name",
     lambda f: f.with_key("general.architecture", struct.pack("<I", 8) + text("../../x"))),
    ("tensor-twice", "two tensors of one name", "two tensors of one name",
     lambda f: f.with_tensor(1, name=f.tensors[0].name)),
    ("axes-4000", "4000 axes", "has too many axes", lambda f: f.with_tensor(0, shape=(1,) * 4000)),
    ("axes-overflow", "a shape whose product wraps around", "a shape that none has",
     lambda f: f.with_tensor(0, shape=(1 << 33, 1 << 33))),
    ("block-odd", "rows that are no whole blocks", "a shape that none has",
     lambda f: f.with_tensor(0, kind=8, shape=(64, 33))),
    ("kind-2-32", "a type that indexes past ggml's table", "is of a type that none is",
     lambda f: f.with_tensor(0, kind=(1 << 32) - 1)),
    ("overlap", "two tensors in the same bytes", "does not begin where the one before it ends",
     lambda f: f.with_tensor(1, offset=0)),
    ("offset-past-end", "an offset far behind the end", "does not begin where the one before it ends",
     lambda f: f.with_tensor(1, offset=_HUGE)),
    ("offset-wraps", "an offset that comes out in front of the data when it is added", "does not begin where",
     lambda f: f.with_tensor(1, offset=(1 << 64) - 32)),
    ("offset-misaligned", "an offset between two elements", "does not begin where",
     lambda f: f.with_tensor(1, offset=f.tensors[1].offset + 1)),
    ("body-cut", "the last tensor reaches past the end", "the file ends before its tensors do",
     lambda f: replace(f, body=f.body[:-64])),
    ("layers-2-31", "2^31 layers, for readers that count up to them", "layers",
     lambda f: f.with_key("llama.block_count", number((1 << 31) - 1))),
    ("heads-0", "no heads, to divide by", "head",
     lambda f: f.with_key("llama.attention.head_count", number(0))),
    ("version-0", "a version that nobody wrote", "a version that none is",
     lambda f: replace(f, version=struct.pack("<I", 0))),
    ("version-2-31", "a version with its highest bit", "a version that none is",
     lambda f: replace(f, version=struct.pack("<I", 1 << 31 | 3))),
)  # fmt: skip

ATTACKS: Final = (
    *(Attack(f"gguf/{name}", idea, says, "gguf", _change(change)) for name, idea, says, change in _HEADERS),
    Attack("gguf/sparse-2-tib", "an array of a terabyte in a file that takes no room", "implausibly large", "gguf",
           _sparse),
    Attack("gguf/letters", "another file's first letters", "not a GGUF file", "gguf",
           _raw(lambda data: b"GGML" + data[4:])),
    Attack("gguf/set-of-99999", "a name that promises 99,999 files", "files of a GGUF are missing", "gguf",
           _split(("model-00001-of-99999.gguf",))),
    Attack("gguf/set-of-0", "the first file of none", "a set of no files", "gguf",
           _split(("model-00001-of-00000.gguf",))),
    Attack("gguf/set-of-one-twice", "one file under both names of a set", "does not belong to it", "gguf",
           _split(("model-00001-of-00002.gguf", "model-00002-of-00002.gguf"))),
    Attack("gguf/set-linked", "a set whose second file is a link to a secret",
           "a link leads out of the checkpoint's directory", "gguf", _link_in_set),
)  # fmt: skip
