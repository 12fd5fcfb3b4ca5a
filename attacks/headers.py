"""safetensors headers that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from attacks.corpus import Attack, Canary, read_safetensors, write_safetensors

_FILE: Final = "model.safetensors"
#: Of the twin's tensors the first, one in the middle, and the last.
_FIRST, _SOME, _LAST = "first", "some", "last"
Header = dict[str, Any]


def _spoil(change: Callable[[Header, bytes], tuple[Header | bytes, bytes]]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, _canary: Canary) -> None:
        header, body = read_safetensors(folder / _FILE)
        write_safetensors(folder / _FILE, *change(header, body))

    return spoil


def _names(header: Header) -> list[str]:
    """By place in the file."""
    named = [name for name in header if name != "__metadata__"]
    return sorted(named, key=lambda name: header[name]["data_offsets"])


def _entry(header: Header, which: str) -> Header:
    names = _names(header)
    return header[names[{_FIRST: 0, _SOME: len(names) // 2, _LAST: -1}[which]]]


def _set(key: str, value: Any, which: str = _LAST) -> Callable[[Path, Canary], object]:
    def change(header: Header, body: bytes) -> tuple[Header, bytes]:
        _entry(header, which)[key] = value
        return header, body

    return _spoil(change)


def _text(change: Callable[[bytes, str], bytes]) -> Callable[[Path, Canary], object]:
    """The header's text and the name of a tensor in it."""
    return _spoil(lambda header, body: (change(json.dumps(header).encode(), _names(header)[0]), body))


def _length(value: int) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, _canary: Canary) -> None:
        data = (folder / _FILE).read_bytes()
        (folder / _FILE).write_bytes(value.to_bytes(8, "little") + data[8:])

    return spoil


def _more(name: str, dtype: str = "U8", shape: Any = None, at: Any = None, data: bytes = b"") -> Callable[..., object]:
    """One tensor more, behind the others unless ``at`` says where."""

    def change(header: Header, body: bytes) -> tuple[Header, bytes]:
        place = [len(body), len(body) + len(data)] if at is None else at
        header[name] = {"dtype": dtype, "shape": [len(data)] if shape is None else shape, "data_offsets": place}
        return header, body + data

    return _spoil(change)


def _overlap(header: Header, body: bytes) -> tuple[Header, bytes]:
    first, last = _entry(header, _FIRST), _entry(header, _LAST)
    low, high = last["data_offsets"]
    last["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + high - low]
    return header, body


def _gap(header: Header, body: bytes) -> tuple[Header, bytes]:
    low, high = (last := _entry(header, _LAST))["data_offsets"]
    last["data_offsets"] = [low + 4096, high + 4096]
    return header, body + bytes(4096)


def _hidden(header: Header, body: bytes) -> tuple[Header, bytes]:
    """The last tensor's entry is gone, its bytes are not."""
    del header[_names(header)[-1]]
    return header, body


def _swapped(header: Header, body: bytes) -> tuple[Header, bytes]:
    _entry(header, _SOME)["data_offsets"].reverse()
    return header, body


def _many(_header: Header, _body: bytes) -> tuple[bytes, bytes]:
    """As many tensors without an element as a header's length allows."""
    entry = b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(b'"%x' % i + entry for i in range(1_600_000)) + b"}", b""


def _values(_header: Header, _body: bytes) -> tuple[bytes, bytes]:
    return b'{"a":[' + b"[]," * 12_000_000 + b"0]}", b""


def _deep(text: bytes, _name: str) -> bytes:
    return text[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def _twice(text: bytes, name: str) -> bytes:
    entry = json.dumps(json.loads(text)[name]).encode()
    return text[:-1] + b"," + json.dumps(name).encode() + b":" + entry + b"}"


def _replaced(before: bytes, after: bytes) -> Callable[[Path, Canary], object]:
    return _text(lambda text, _name: text.replace(before, after, 1))


def _trailing(folder: Path, _canary: Canary) -> None:
    with (folder / _FILE).open("ab") as file:
        file.write(b"PK\x05\x06" + bytes(18))


_HEADER: Final = "a safetensors header is broken"
_LENGTH: Final = "not a safetensors file, or cut off inside its header"
_JSON: Final = "the safetensors header is not valid JSON"
_OTHER: Final = "a safetensors file is not as long as its header says"

_ATTACKS: Final[tuple[tuple[str, str, str, Callable[[Path, Canary], object]], ...]] = (
    ("length-2-63", "a header of 2^63 bytes", _LENGTH, _length(1 << 63)),
    ("length-2-64", "a header of 2^64 - 1 bytes: 7 with the 8 in front", _LENGTH, _length((1 << 64) - 1)),
    ("length-100-mb", "one byte more than the reference implementation takes", _LENGTH, _length(100_000_001)),
    ("length-0", "no header", _LENGTH, _length(0)),
    ("length-past-end", "a header longer than its file", _LENGTH, _length(90_000_000)),
    ("negative-offsets", "offsets in front of the data: the header itself as a weight", _HEADER,
     _set("data_offsets", [-64, 0])),
    ("offsets-reversed", "an end before its beginning", _HEADER, _spoil(_swapped)),
    ("offsets-wrap", "offsets that come out right modulo 2^64", _HEADER,
     _set("data_offsets", [(1 << 64) - 32, (1 << 64) + 32])),
    ("offsets-float", "offsets that are floats", _HEADER, _set("data_offsets", [0.0, 64.0])),
    ("offsets-three", "three offsets", _HEADER, _set("data_offsets", [0, 32, 64])),
    ("offsets-past-end", "a tensor far behind the file's end", _HEADER, _set("data_offsets", [1 << 40, (1 << 40) + 64])),
    ("overlap", "two tensors in the same bytes", _HEADER, _spoil(_overlap)),
    ("gap", "a page between two tensors that nobody reads", _HEADER, _spoil(_gap)),
    ("hidden-tail", "bytes at the end that no tensor has", _OTHER, _spoil(_hidden)),
    ("trailing", "a second file, a zip, behind the data", _OTHER, _trailing),
    ("shape-overflow", "a shape whose product is 0 modulo 2^64", _HEADER, _set("shape", [1 << 33, 1 << 33])),
    ("shape-negative", "two negative axes whose product is right", _HEADER, _set("shape", [-1, -32])),
    ("shape-bool", "true as a number", _HEADER, _set("shape", [True, 32])),
    ("shape-axes", "100,000 axes of 1", _HEADER, _set("shape", [1] * 100_000 + [32])),
    ("shape-object", "a shape that is an object", _HEADER, _set("shape", {"0": 32})),
    ("shape-2-63", "an axis of 2^63 beside one of 0", _HEADER, _more("x", shape=[1 << 63, 0])),
    ("dtype-unknown", "a dtype that nobody has", _HEADER, _set("dtype", "F7")),
    ("dtype-sub-byte", "three numbers of four bits: a byte and a half", _HEADER,
     _more("x", "F4", [3], data=b"\x12\x03")),
    ("dtype-list", "a dtype that is a list", _HEADER, _set("dtype", ["BF16"])),
    ("dtype-wider", "a dtype twice as wide: the next tensor's bytes as well", _HEADER, _set("dtype", "F32")),
    ("key-twice", "one tensor's name twice, at two places", "stands there twice", _text(_twice)),
    ("metadata-twice", "__metadata__ twice", "stands there twice",
     _text(lambda text, _n: b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"},' + text[1:])),
    ("metadata-list", "__metadata__ that is no map of texts", _HEADER, _spoil(
        lambda header, body: ({**header, "__metadata__": {"format": [[]]}}, body))),
    ("entry-key-twice", "data_offsets twice in one entry", "stands there twice",
     _replaced(b'"dtype"', b'"data_offsets": [0, 0], "dtype"')),
    ("entry-more", "a key more in an entry, which some readers take", _HEADER, _set("strides", [1])),
    ("entry-null", "an entry that is null", _HEADER, _spoil(lambda header, body: ({**header, "x": None}, body))),
    ("deep", "100,000 lists, each in the other", _JSON, _text(_deep)),
    ("many-tensors", "1.6 million tensors without an element, in 100 MB", "holds more tensors than any",
     _spoil(_many)),
    ("many-values", "12 million empty lists, which take 700 MB", "holds more values than any", _spoil(_values)),
    ("nan", "NaN, which is no JSON", _HEADER, _replaced(b'"shape": [', b'"shape": [NaN, ')),
    ("1e400", "a number that is infinite", _HEADER, _replaced(b'"shape": [', b'"shape": [1e400, ')),
    ("digits", "a number of a million digits", _JSON,
     _replaced(b'"shape": [', b'"shape": [1' + b"0" * 1_000_000 + b", ")),
    ("invalid-utf-8", "a name that is no UTF-8", _JSON, _replaced(b"model.", b"mod\xff\xfel.")),
    ("bom", "a byte order mark in front", _JSON, _text(lambda text, _n: b"\xef\xbb\xbf" + text)),
    ("utf-16", "the header in UTF-16, which Python's json guesses", _JSON,
     _text(lambda text, _n: text.decode().encode("utf-16-le"))),
    ("surrogate", "a name with half of a surrogate pair", _JSON, _more("model.\ud800", data=b"1234")),
    ("name-nul", "a name with NUL: to C it ends there", "no name of a tensor", _more("model.norm.weight\0x", data=b"12")),
    ("name-empty", "a name of no letters", "no name of a tensor", _more("", data=b"1234")),
    ("name-control", "a name that writes to a terminal", "no name of a tensor", _more("\x1b]0;x\x07", data=b"1234")),
    ("name-megabyte", "a name of a megabyte", "no name of a tensor", _more("a" * (1 << 20), data=b"1234")),
    ("name-path", "a name that is a path, for who makes files of names", "no name of a tensor",
     _more("../../../ran", data=b"1234")),
    ("name-absolute", "an absolute path as a name", "no name of a tensor", _more("/ran", data=b"1234")),
    ("spaces", "40 MB of spaces around two braces", _OTHER,
     _spoil(lambda _h, _b: (b"{" + b" " * 40_000_000 + b"}", b"1234"))),
    ("list", "a header that is a list", "is not a JSON object", _text(lambda _t, _n: b"[]")),
)  # fmt: skip

ATTACKS: Final = tuple(
    Attack(f"safetensors/{name}", idea, says, "one file", spoil) for name, idea, says, spoil in _ATTACKS
)
