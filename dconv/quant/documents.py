"""Files and folders that calibration samples are drawn from, read into documents: texts, conversations, token ids.

A path is one of: plain text · ``.jsonl``, or ``.json`` with a list, of records with ``text``, ``messages`` or
``input_ids`` (or of lists of ids) · ``.npy`` or ``.safetensors`` with ids · ``.parquet``, ``.arrow`` or a folder of
them, as ``datasets.Dataset.save_to_disk`` and the hub have them. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from dconv.checkpoint import safetensors
from dconv.checkpoint.files import check_plain_name, read_json
from dconv.errors import Damaged, Refused, StorageFault, ToolMissing, UsageError
from dconv.sharding.parsed import is_list, is_mapping

DEFAULT_TEXT: Final = Path(__file__).parent / "default_text.txt.xz"
#: All files of a source together. Calibration reads a few megabytes of them.
_MAX_BYTES: Final = 1 << 30
#: In this order a record is searched for what it holds.
FIELDS: Final = ("input_ids", "text", "messages")
_TABLES: Final = (".arrow", ".parquet")
_FIRST: Final = "head -n 10000 FILE makes a smaller one"

Ids = NDArray[np.int64]
#: A text, a conversation ([{"role": …, "content": …}, …]), or token ids.
Document = str | list[Any] | Ids


@dataclass(frozen=True)
class Documents:
    """What a source holds.

    Attributes:
        path: as it was named; "" for the text that ships.
        kind: ``text``, ``messages`` or ``input_ids``, the same for all.
        documents: in the files' order.
        files: name, bytes and sha256 of each.
    """

    path: str
    kind: str
    documents: Sequence[Document]
    files: tuple[dict[str, object], ...]


def read(data: str | None) -> Documents:
    """The documents of a path; None is the text that ships.

    Raises:
        UsageError: no such path, or a folder of several data sets.
        Refused: nothing in it that is known, or too much.
        Damaged: a file that is not what its name says.
        StorageFault: it cannot be read.
        ToolMissing: a table, and no pyarrow.
    """
    if data is None:
        text = lzma.decompress(_bytes(DEFAULT_TEXT))
        return Documents("", "text", (text.decode(),), (_record(DEFAULT_TEXT.stem, text),))
    path = Path(data)
    if path.is_dir():
        paths = _tables(path)
    elif path.is_file():
        paths = [path]
    else:
        raise UsageError("the calibration data names no file and no folder", where=data)
    size = sum(each.stat().st_size for each in paths)
    if size > _MAX_BYTES:
        raise Refused(
            "more calibration data than is read", where=data, expected=f"at most {_MAX_BYTES >> 20} MiB",
            found=f"{size >> 20} MiB", do=_FIRST,
        )  # fmt: skip
    read_one = _READERS.get(paths[0].suffix, _plain)
    records: list[Any] = []
    files: list[dict[str, object]] = []
    for each in paths:
        body = _bytes(each)
        records += read_one(each, body)
        files.append(_record(each.relative_to(path).as_posix() if path.is_dir() else each.name, body))
    kind, documents = _of_one_kind(records, data)
    return Documents(data, kind, documents, tuple(files))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise StorageFault(f"cannot read calibration data: {fault.strerror}", where=str(path)) from fault


def _record(name: str, body: bytes) -> dict[str, object]:
    return {"name": name, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}


def _tables(folder: Path) -> list[Path]:
    """The tables of a data set on disk, in the order in which it counts its rows.

    Raises:
        UsageError: there are several splits, or none.
        Damaged: its list names files outside of it.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json", what="dataset_dict.json").get("splits")
        names = [str(name) for name in splits] if is_list(splits) else []
        names = [check_plain_name(name, said_by=folder / "dataset_dict.json") for name in names]
        if len(names) != 1 or not (folder / names[0]).is_dir():
            raise UsageError(
                "a folder of several data sets", where=str(folder), expected="one of them",
                do=" or ".join(str(folder / name) for name in names),
            )  # fmt: skip
        folder = folder / names[0]
    if (folder / "state.json").is_file():  # what an earlier save left beside them is not theirs
        listed = read_json(folder / "state.json", what="state.json").get("_data_files")
        entries: list[Any] = listed if is_list(listed) else []
        names = [entry.get("filename") if is_mapping(entry) else None for entry in entries]
        found = [folder / check_plain_name(name, said_by=folder / "state.json") for name in names]
        if not found or not all(path.is_file() for path in found):
            raise Damaged("state.json lists files that are not there", where=str(folder), found=f"{names!r:.200}")
        return found
    for suffix in _TABLES:
        if found := sorted(folder.rglob(f"*{suffix}")):
            parts = sorted({(path.parent / path.name.partition("-")[0]).as_posix() for path in found})
            if len(parts) > 1:  # train-00000-of-00002.parquet beside test-…
                raise UsageError(
                    "a folder of several data sets", where=str(folder), expected="one of them",
                    found=", ".join(parts)[:300], do="name a file, or a folder with one of them",
                )  # fmt: skip
            return found
    raise UsageError("a folder without a data set", where=str(folder), expected=f"files *{' or *'.join(_TABLES)}")


def _of_one_kind(records: Sequence[Any], where: str) -> tuple[str, list[Document]]:
    """Records as documents, all of the kind of the first.

    Raises:
        Refused: there are none, or a record has another kind, or none that is known.
    """
    if not records:
        raise Refused("there is no calibration data in it", where=where)
    kind = _kind(records[0])
    documents: list[Document] = []
    for number, record in enumerate(records):
        value = record.get(kind) if is_mapping(record) else record
        made: Document | None = None
        if kind == "input_ids":
            made = _ids(value)
        elif kind == "text":
            made = value if isinstance(value, str) else None
        elif is_list(value) and all(map(_is_turn, value)):
            made = value
        if made is None:
            has = ", ".join(sorted(map(str, record))) if is_mapping(record) else f"{record!r:.80}"
            raise Refused(
                "a record that is no calibration data",
                where=f"record {number:,} of {where}",
                expected=f"{kind} as in the first" if kind else f"{' or '.join(FIELDS)}, or a list of token ids",
                found=has[:200],
            )
        documents.append(made)
    return kind, documents


def _is_turn(said: Any) -> bool:
    return isinstance(said, dict)


def _kind(record: Any) -> str:
    if isinstance(record, str):
        return "text"
    if is_mapping(record):
        return next((name for name in FIELDS if record.get(name) is not None), "")
    return "input_ids" if isinstance(record, list | np.ndarray) else ""


def _is_array(value: object) -> TypeGuard[NDArray[Any]]:
    return isinstance(value, np.ndarray)


def _ids(value: Any) -> Ids | None:
    """Whole numbers as they are; None for anything else."""
    if _is_array(value):
        return value.astype(np.int64) if value.ndim == 1 and value.dtype.kind in "iu" else None
    if not is_list(value) or not all(type(number) is int and abs(number) < 1 << 62 for number in value):
        return None
    return np.array(value, np.int64)


def _plain(path: Path, body: bytes) -> list[Any]:
    try:
        return [body.decode("utf-8-sig")]
    except UnicodeDecodeError as fault:
        raise Damaged(
            "calibration data that is no text", where=str(path), expected="UTF-8", found=str(fault)[:200],
            do="names of other files end in .jsonl .json .npy .safetensors .parquet or .arrow",
        ) from fault  # fmt: skip


def _lines(path: Path, body: bytes) -> list[Any]:
    found: list[Any] = []
    for number, line in enumerate(body.splitlines(), 1):
        if line.strip():
            found.append(_parsed(line, f"line {number:,} of {path}"))
    return found


def _parsed(body: bytes, where: str) -> Any:
    try:
        value = json.loads(body)
        if b"\\ud" in body.lower():  # half of a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as fault:
        raise Damaged("calibration data that is no JSON", where=where, found=str(fault)[:200]) from fault


def _json(path: Path, body: bytes) -> list[Any]:
    made = _parsed(body, str(path))
    if not is_list(made):
        raise Damaged("calibration data that is no list", where=str(path), expected="[…] of records or of token ids")
    return [made] if made and all(type(number) is int for number in made) else made


def _rows(array: NDArray[Any], where: str) -> list[Any]:
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise Damaged(
            "calibration data that is no token ids", where=where, expected="whole numbers of one axis or two",
            found=f"{array.dtype} {list(array.shape)}",
        )  # fmt: skip
    return list(np.atleast_2d(array))


def _npy(path: Path, body: bytes) -> list[Any]:
    try:
        array = np.load(BytesIO(body), allow_pickle=False)
    except Exception as fault:  # its header is parsed as Python's source is, and may fail in as many ways
        raise Damaged("no .npy file", where=str(path), found=str(fault)[:200]) from fault
    if not _is_array(array):
        raise Damaged("no .npy file", where=str(path), found="an archive of several")
    return _rows(array, str(path))


def _safetensors(path: Path, body: bytes) -> list[Any]:
    stored = safetensors.read_header(path)
    tensor = stored.get("input_ids") or (next(iter(stored.values())) if len(stored) == 1 else None)
    dtypes = {"i64": "<i8", "i32": "<i4", "i16": "<i2", "u32": "<u4", "u16": "<u2", "u8": "u1"}
    if tensor is None or tensor.spec.dtype not in dtypes:
        raise Damaged(
            "calibration data that is no token ids", where=str(path), expected="whole numbers under input_ids",
            found=", ".join(f"{name} {found.spec.dtype}" for name, found in list(stored.items())[:8]),
        )  # fmt: skip
    count = int(np.prod(tensor.spec.shape, dtype=np.int64))
    flat = np.frombuffer(body, dtypes[tensor.spec.dtype], count, tensor.extents[0].offset)
    return _rows(flat.reshape(tensor.spec.shape), str(path))


def _table(path: Path, body: bytes) -> list[Any]:
    try:
        pa, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as fault:
        raise ToolMissing("a data set on disk needs pyarrow", where=str(path), do="pip install pyarrow") from fault
    try:
        if path.suffix == ".parquet":
            found = parquet.read_table(BytesIO(body))
        elif body.startswith(b"ARROW1"):
            found = pa.ipc.open_file(pa.BufferReader(body)).read_all()
        else:
            found = pa.ipc.open_stream(pa.BufferReader(body)).read_all()
        column = next((name for name in FIELDS if name in found.column_names), None)
        values: list[Any] = found.column(column).to_pylist() if column is not None else []
    except (pa.ArrowException, ValueError, OSError) as fault:
        raise Damaged("a table that cannot be read", where=str(path), found=str(fault)[:200]) from fault
    if column is None:
        raise Refused(
            "a data set without a column that calibration reads", where=str(path), expected=" or ".join(FIELDS),
            found=", ".join(found.column_names)[:200],
        )  # fmt: skip
    return [{column: value} for value in values]


_READERS: Final[dict[str, Callable[[Path, bytes], Iterable[Any]]]] = {
    ".jsonl": _lines, ".json": _json, ".npy": _npy, ".safetensors": _safetensors, ".parquet": _table, ".arrow": _table,
}  # fmt: skip
