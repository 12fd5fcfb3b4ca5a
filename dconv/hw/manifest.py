"""``manifest.json``: what a folder of a hand-off holds, so that anyone can tell whether it still does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dconv import __version__
from dconv.checkpoint.files import read_json
from dconv.errors import Damaged

NAME: Final = "manifest.json"
#: The same digests, for ``sha256sum --check``.
SUMS: Final = "SHA256SUMS"
_CHUNK: Final = 1 << 22


def files_of(folder: Path) -> Iterator[Path]:
    """All files below a folder, but for those that list them, in order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in (NAME, SUMS):
            yield path


def sha256(path: Path) -> str:
    """Of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def write(folder: Path, said: Mapping[str, Any]) -> None:
    """List a folder's files with their digests, and say what they are; all of it is on the disk afterwards."""
    files = {}
    for path in files_of(folder):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        _sync(path)
    sums = "".join(f"{one['sha256']}  {name}\n" for name, one in files.items())
    (folder / SUMS).write_text(sums)
    text = json.dumps({"dconv": __version__, **said, "files": files}, indent=2, ensure_ascii=False)
    (folder / NAME).write_text(f"{text}\n")
    for path in (folder / SUMS, folder / NAME, folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_here(folder: Path) -> bool:
    """Whether a folder is of a hand-off."""
    return (folder / NAME).is_file()


def read(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says, its files not looked at.

    Raises:
        Damaged: it is none of dconv's.
    """
    said: dict[str, Any] = read_json(folder / NAME, what=NAME)
    wanted = {"kind": str, "target": str, "platform": str, "settings": dict, "files": dict}
    if any(not isinstance(said.get(key), of) for key, of in wanted.items()) or not all(
        isinstance(one, dict) and isinstance(one.get("sha256"), str) and type(one.get("bytes")) is int
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
    if wrong:
        raise Damaged("this hand-off is not as it was written", where=str(folder), found="\n".join(wrong[:8]))
    return said
