"""What an attack is, the good checkpoints that attacks are made of, and how their containers are taken apart."""

from __future__ import annotations

import io
import json
import shlex
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

#: The file that payloads make, and the one that they remove.
RAN, ALIVE = "ran", "alive"
#: What lies outside of every checkpoint and must not be read.
SECRET: Final = "the contents of a file that no checkpoint has"  # noqa: S105


@dataclass(frozen=True, slots=True)
class Canary:
    """A directory outside of every checkpoint, which payloads aim at.

    Files: ``alive``, which payloads remove; ``ran``, which they make; ``secret``; ``outside``, a good checkpoint.
    """

    folder: Path

    @property
    def command(self) -> str:
        """For a shell."""
        ran, alive = (shlex.quote(str(self.folder / name)) for name in (RAN, ALIVE))
        return f"touch {ran}; rm -f {alive}"

    @property
    def code(self) -> str:
        """The same as an expression of Python."""
        return f"__import__('os').system({self.command!r})"

    @property
    def secret(self) -> Path:
        return self.folder / "secret"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"


@dataclass(frozen=True, slots=True)
class Attack:
    """One hostile checkpoint.

    Attributes:
        name: its directory in the corpus, ``kind/what``.
        idea: what it tries.
        says: of dconv's answer.
        twin: the good checkpoint that it is made of, one of `attacks.twins.TWINS`.
        spoil: changes a copy of that.
        runs: Python's own ``pickle`` would run its payload.
        only: the command line that meets it is ``convert``'s; to ``inspect`` and ``check`` it is a good checkpoint.
    """

    name: str
    idea: str
    says: str
    twin: str
    spoil: Callable[[Path, Canary], object]
    runs: bool = False
    only: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


# ------------------------------------------------------------------------------------------------ safetensors, JSON


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: bytes | Mapping[str, Any], body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """``change`` edits the object in place, or returns another value."""
    value = json.loads(path.read_text())
    made = change(value)
    path.write_text(json.dumps(value if made is None else made))


# ------------------------------------------------------------------------------------------------------ torch's zip


def records(path: Path) -> dict[str, bytes]:
    """The records of a zip, in order, their checksums left aside: dconv writes none."""
    data, found = path.read_bytes(), dict[str, bytes]()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            names = data[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + sum(struct.unpack("<2H", names))
            found[info.filename] = data[start : start + info.file_size]
    return found


def zipped(held: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip, the same bytes every time."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in held.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return stream.getvalue()


def edit_zip(path: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    held = records(path)
    change(held)
    path.write_bytes(zipped(held))


def root_of(held: Mapping[str, bytes]) -> str:
    return next(name for name in held if name.endswith("/data.pkl")).partition("/")[0]


def edit_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """The pickle in a torch file, of either form, or a file that is one."""
    data = path.read_bytes()
    if data[:2] == b"PK":
        held = records(path)
        name = root_of(held) + "/data.pkl"
        held[name] = change(held[name])
        path.write_bytes(zipped(held))
        return
    start, end = tree_of(data)
    path.write_bytes(data[:start] + change(data[start:end]) + data[end:])


def tree_of(data: bytes) -> tuple[int, int]:
    """Where the tree's pickle begins and ends: the fourth of the old form, else the only one."""
    from dconv.checkpoint import inert

    at, start = 0, 0
    for _ in range(4 if data.startswith(MAGIC) else 1):
        machine = inert.Machine(data, at, "the undamaged file")
        machine.run()
        start, at = at, machine.pos
    return start, at


#: The old form's first pickle.
MAGIC: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
