"""``manifest.json``: what a folder of a hand-off holds, so that anyone can tell whether it still does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dconv import __version__
from dconv.checkpoint.files import parse_json, read_small
from dconv.errors import Damaged
from dconv.sharding.parsed import is_dict
from dconv.sharding.receipt import OWN, is_unchanged, with_own

NAME: Final = "manifest.json"
#: The same digests, for ``sha256sum --check``.
SUMS: Final = "SHA256SUMS"
_ALGORITHM: Final = "sha256"
_CHUNK: Final = 1 << 22


def files_of(folder: Path) -> Iterator[Path]:
    """All files below a folder, but for those that list them, in order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in (NAME, SUMS):
            yield path


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal; it is read in parts of 4 MiB."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def write(folder: Path, said: Mapping[str, Any]) -> None:
    """List a folder's files with their digests, and say what they are; all of it is on the disk afterwards."""
    files: dict[str, dict[str, Any]] = {}
    for path in files_of(folder):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _sync(path)
    (folder / SUMS).write_bytes(_sums(files))
    (folder / NAME).write_bytes(with_own({"dconv": __version__, **said, "files": files}, _ALGORITHM, indent=2))
    for path in (folder / SUMS, folder / NAME, folder):
        _sync(path)


def _sums(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    return "".join(f"{one['sha256']}  {name}\n" for name, one in files.items()).encode("utf-8", "surrogateescape")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_here(folder: Path) -> bool:
    """Whether a folder is of a hand-off, by the file that lists it."""
    return (folder / NAME).is_file()


def read(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says, its files not looked at.

    Raises:
        Damaged: it is none of dconv's, or not as it was written.
    """
    path = folder / NAME
    data = read_small(path, what=NAME)
    said: dict[str, Any] = parse_json(data, where=str(path), what=NAME)
    if not is_unchanged(data, said, _ALGORITHM, last="files"):
        raise Damaged(
            f"{NAME} changed since it was written",
            where=str(path),
            expected=f"bytes of the digest in its {OWN}",
            do="copy the folder again from where it was whole",
        )
    said.pop(OWN, None)
    wanted = {"kind": str, "target": str, "platform": str, "settings": dict, "files": dict}
    if any(not isinstance(said.get(key), of) for key, of in wanted.items()) or not all(
        is_dict(one) and isinstance(one.get("sha256"), str) and type(one.get("bytes")) is int
        for one in said["files"].values()
    ):
        raise Damaged(f"{NAME} is none of a hand-off", where=str(folder / NAME))
    return said


def checked(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says, and all its files are.

    Raises:
        Damaged: a file is missing, changed, or not listed.
    """
    said = read(folder)
    there = {path.relative_to(folder).as_posix(): path for path in files_of(folder)}
    listed: dict[str, dict[str, Any]] = said["files"]
    wrong = [f"{name}: missing" for name in listed if name not in there]
    wrong += [f"{name}: not of it" for name in there if name not in listed]
    for name, one in listed.items():
        if name in there and (there[name].stat().st_size, sha256(there[name])) != (one["bytes"], one["sha256"]):
            wrong.append(f"{name}: {there[name].stat().st_size} bytes, not the {one['bytes']} that were written")
    if not (folder / SUMS).is_file() or (folder / SUMS).read_bytes() != _sums(listed):
        wrong.append(f"{SUMS}: not the digests of these files")
    if wrong:
        raise Damaged("this hand-off is not as it was written", where=str(folder), found="\n".join(wrong[:8]))
    return said
