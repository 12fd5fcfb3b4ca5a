"""Zip bombs, and zips whose parts disagree, where torch keeps tensors."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attacks.corpus import Attack, Canary, edit_zip, records, root_of, zipped

_FILE: Final = "pytorch_model.bin"
_DIRECTORY: Final = "a broken zip directory"
_ODD: Final = "a record that torch does not write"
_NOT_TORCH: Final = "a zip that torch.save did not write"


def _raw(change: Callable[[bytearray], object]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, _canary: Canary) -> None:
        data = bytearray((folder / _FILE).read_bytes())
        made = change(data)
        (folder / _FILE).write_bytes(made if isinstance(made, bytes) else data)

    return spoil


def _held(change: Callable[[dict[str, bytes], str], object]) -> Callable[[Path, Canary], object]:
    return lambda folder, _canary: edit_zip(folder / _FILE, lambda held: change(held, root_of(held)))


def _put(form: str, offset: int, value: int, name: bytes = b"/data/0") -> Callable[[bytearray], object]:
    """Writes over a field of a record's entry in the directory."""

    def change(data: bytearray) -> None:
        at = data.rindex(name)
        at = data.rindex(b"PK\x01\x02", 0, at)
        struct.pack_into(form, data, at + offset, value)

    return change


def _end(form: str, offset: int, value: int) -> Callable[[bytearray], object]:
    """Writes over a field of the end record, and takes the 64-bit one in front of it away."""

    def change(data: bytearray) -> None:
        at = data.rindex(b"PK\x05\x06")
        struct.pack_into(form, data, at + offset, value)
        if (locator := data.rfind(b"PK\x06\x07")) >= 0:
            data[locator : locator + 4] = b"XX\x06\x07"
            data[data.rindex(b"PK\x06\x06") :][:4] = b"XX\x06\x06"

    return change


def _end64(form: str, offset: int, value: int) -> Callable[[bytearray], object]:
    return lambda data: struct.pack_into(form, data, data.rindex(b"PK\x06\x06") + offset, value)


def _bomb(folder: Path, _canary: Canary) -> None:
    """A storage of 64 MB in 64 kB."""
    held = records(folder / _FILE)
    held[root_of(held) + "/data/0"] = bytes(64 << 20)
    (folder / _FILE).write_bytes(zipped(held, zipfile.ZIP_DEFLATED))


def _pickle_bomb(folder: Path, _canary: Canary) -> None:
    held = records(folder / _FILE)
    held[root_of(held) + "/data.pkl"] = b"\x80\x02" + b"N0" * (32 << 20) + b"N."
    (folder / _FILE).write_bytes(zipped(held, zipfile.ZIP_DEFLATED))


def _overlapping(data: bytearray) -> None:
    """Two entries of the directory point to one record."""
    first = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    second = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/1"))
    data[second + 42 : second + 46] = data[first + 42 : first + 46]


def _two_roots(held: dict[str, bytes], _root: str) -> None:
    held.update({f"other/{name.partition('/')[2]}": content for name, content in list(held.items())})


def _twice(data: bytearray) -> None:
    """One name twice: which of the two is read is a matter of the reader."""
    while (at := data.find(b"/data/1")) >= 0:
        data[at : at + 7] = b"/data/0"


def _local_name(data: bytearray) -> None:
    """The local header has another name than the directory."""
    at = data.index(b"/data/0")
    data[at : at + 7] = b"/data/9"


def _many(folder: Path, _canary: Canary) -> None:
    """A directory of 400 MB, all of it one hole."""
    path = folder / _FILE
    data = bytearray(path.read_bytes())
    size = 400 << 20
    start = len(data)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, size, start, 0)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(start + size)
        file.seek(start + size)
        file.write(end)


_ATTACKS: Final[tuple[tuple[str, str, str, Callable[[Path, Canary], object]], ...]] = (
    ("bomb", "a storage that unpacks to a thousand times its size", _ODD, _bomb),
    ("pickle-bomb", "data.pkl that unpacks to 64 MB", _ODD, _pickle_bomb),
    ("method-99", "a method of compression that nobody has", _ODD, _raw(_put("<H", 10, 99))),
    ("encrypted", "the flag of an encrypted record", _ODD, _raw(_put("<H", 8, 1))),
    ("strong-encryption", "the flag of a masked directory", _ODD, _raw(_put("<H", 8, 0x2001))),
    ("overlap", "two records in the same bytes", "records that overlap", _raw(_overlapping)),
    ("name-twice", "two records of one name", "two records of one name", _raw(_twice)),
    ("local-name", "another name in the local header than in the directory", "a broken local header",
     _raw(_local_name)),
    ("local-extra", "a local header that moves its data into the next record", "records that overlap",
     _raw(lambda data: struct.pack_into("<H", data, data.index(b"/data/0") - len(b"archive") - 2, 0xFFFF))),
    ("size-2-32", "a record of 4 GiB in a small file", "records that overlap",
     _raw(lambda data: (_put("<L", 20, 0xFFFFFFFE)(data), _put("<L", 24, 0xFFFFFFFE)(data)))),
    ("size-64-missing", "a size that is said to be elsewhere, and is nowhere", "a record of wrong size",
     _raw(lambda data: (_put("<L", 20, 0xFFFFFFFF)(data), _put("<L", 24, 0xFFFFFFFF)(data)))),
    ("header-past-end", "a record behind the end", "records that overlap", _raw(_put("<L", 42, 0xFFFFFFF0))),
    ("packed-differs", "two sizes that differ in a record that is not packed", "a record of wrong size",
     _raw(_put("<L", 20, 7))),
    ("count-65534", "65,534 records announced", _DIRECTORY,
     _raw(lambda data: (_end("<H", 8, 65534)(data), _end("<H", 10, 65534)(data)))),
    ("count-2-64", "2^64 - 1 records announced", _DIRECTORY,
     _raw(lambda data: (_end64("<Q", 24, (1 << 64) - 1)(data), _end64("<Q", 32, (1 << 64) - 1)(data)))),
    ("directory-2-63", "a directory of 2^63 bytes", _DIRECTORY, _raw(_end64("<Q", 40, 1 << 63))),
    ("directory-start", "a directory that begins elsewhere", _DIRECTORY, _raw(_end64("<Q", 48, 8))),
    ("directory-hole", "a directory of 400 MB that takes no room", _DIRECTORY, _many),
    ("second-disk", "an archive of two disks", _DIRECTORY, _raw(_end64("<L", 16, 1))),
    ("no-end", "no end record", "a truncated file", _raw(lambda data: bytes(data[:-22]))),
    ("comment", "a comment that holds another end record", _DIRECTORY, _raw(
        lambda data: bytes(data[:-2]) + struct.pack("<H", 22) + b"PK\x05\x06" + bytes(18))),
    ("member-dots", "records named ../../ran, for who unpacks them", "a name that leaves its archive",
     _held(lambda held, root: held.update({f"{root}/../../ran": b"x"}))),
    ("member-absolute", "a record named by an absolute path", "a name that leaves its archive",
     _held(lambda held, _root: held.update({"/tmp/ran": b"x"}))),  # noqa: S108
    ("two-roots", "two checkpoints in one zip", _NOT_TORCH, _held(_two_roots)),
    ("no-pickle", "no data.pkl", _NOT_TORCH, _held(lambda held, root: held.pop(f"{root}/data.pkl"))),
    ("checksum", "a data.pkl that is not what its checksum says", "a record with a wrong checksum", _raw(
        lambda data: data.__setitem__(data.index(b"\x80\x02}") + 12, data[data.index(b"\x80\x02}") + 12] ^ 1))),
)  # fmt: skip

ATTACKS: Final = tuple(Attack(f"zips/{name}", idea, says, "bin", spoil) for name, idea, says, spoil in _ATTACKS)
