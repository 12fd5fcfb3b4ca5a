"""The receipt of a finished output: what was made, by which plan, with a digest for everything on disk.

A directory without a valid receipt is not a result; one with a receipt of the same plan is this very output.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from dconv.errors import UsageError
from dconv.sharding.digest import ALGORITHMS, Hasher, tree
from dconv.sharding.parsed import is_dict
from dconv.sharding.plan import Plan

RECEIPT: Final = "dconv.json"
#: The receipt's last key: the digest of all its other bytes. Receipts of before it end with their tensors.
OWN: Final = "own_digest"
_READ: Final = 1 << 20
#: What follows the own digest.
_END: Final = b'"\n}\n'


def partial_folder(out: Path, plan: Plan) -> Path:
    """Where an output grows.

    Raises:
        UsageError: ``out`` has no name of its own (``.``, ``/``).
    """
    if out.name in ("", ".."):
        raise UsageError(
            "the output needs a name of its own, nothing was written", where=f"-o {out}", do="-o DIRECTORY/NAME"
        )
    return out.with_name(f"{out.name}.partial-{plan.id}")


def read_receipt(folder: Path) -> dict[str, object] | None:
    """The receipt of a finished output, or None when there is none that parses."""
    try:
        receipt = json.loads((folder / RECEIPT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return receipt if is_dict(receipt) and "plan" in receipt else None


def check_output(plan: Plan, out: Path, *, overwrite: bool, resume: bool, launched: float) -> bool:
    """True when the output is already there and complete: by an earlier run if ``resume``, else by a faster rank.

    Raises:
        UsageError: something else is there and may not be replaced, or ``out`` is no place for an output.
    """
    partial_folder(out, plan)
    real = os.path.realpath(out)
    sources = [plan.source.root, *((plan.source.root / name for name in plan.source.files) if overwrite else ())]
    if any(Path(os.path.realpath(source)).is_relative_to(real) for source in sources):
        raise UsageError(
            "the output would replace its own source, nothing was written", where=str(out), do="name another -o"
        )
    if not os.path.lexists(out):
        return False
    receipt = read_receipt(out)
    if receipt is not None and receipt["plan"] == plan.id and is_whole(plan, out):
        finished = receipt.get("finished")
        if resume or (isinstance(finished, float) and finished >= launched):
            return True
    if overwrite and _is_ours(out):
        return False
    if overwrite:
        raise UsageError(
            "--overwrite replaces outputs of dconv only, nothing was written",
            where=str(out),
            found=f"something without a {RECEIPT}",
            do="remove it yourself if it is not needed, or name another -o",
        )
    what = "a finished dconv output" if receipt is not None else "something without a dconv receipt"
    raise UsageError(
        "the output exists, nothing was written",
        where=str(out),
        found=what,
        do="name another -o" + (", or --overwrite replaces it once the new one is whole" if _is_ours(out) else ""),
    )


def _is_ours(out: Path) -> bool:
    """Whether nothing of anyone else's would be lost: an output of dconv, an empty directory, a link, or nothing.

    What another conversion takes away or puts there while it is looked at is looked at again.
    """
    seen = None
    while True:
        with suppress(FileNotFoundError):
            if out.is_symlink() or (out.is_dir() and ((out / RECEIPT).is_file() or next(out.iterdir(), None) is None)):
                return True
        now = _identity(out)
        if now is None:
            return True
        if now == seen:
            return False
        seen = now


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def is_whole(plan: Plan, out: Path) -> bool:
    """Whether every weight file of a finished output is still there with its size."""
    try:
        return all(os.stat(out / file.path).st_size == file.size for file in plan.target.files)
    except OSError:
        return False


def is_result(plan: Plan, out: Path) -> bool:
    """Whether a finished output of this very plan is at ``out``; its weights are not looked at."""
    receipt = read_receipt(out)
    return receipt is not None and receipt["plan"] == plan.id


def make_receipt(
    plan: Plan, done: Mapping[int, str], closing: Mapping[str, str], algorithm: str, about: Mapping[str, object]
) -> dict[str, object]:
    """What was made, by which plan, with a digest for every tensor, every file's framing and every closing file."""
    leaves: dict[int, list[str]] = {}
    frames: dict[str, str] = {}
    for task in plan.tasks:
        if task.tensor < 0:
            frames[plan.target.files[task.file].path] = done[task.index]
        else:
            leaves.setdefault(task.tensor, []).append(done[task.index])
    tensors = {
        tensor.key: {
            "file": tensor.file,
            "offset": tensor.offset,
            "dtype": tensor.spec.dtype,
            "shape": list(tensor.spec.shape),
            "digest": tree(algorithm, leaves.get(i, [])),
        }
        for i, tensor in enumerate(plan.target.tensors)
    }
    read = {} if plan.source.made else plan.source.files
    sources = {name: stamp.size for name, stamp in sorted(read.items())}
    return {
        "plan": plan.id,
        **about,
        "finished": time.time(),
        "digest": algorithm,
        "left_out": plan.target.left_out or {},
        "source_files": sources,
        "frames": frames,
        "closing": dict(closing),
        "tensors": tensors,
    }


def to_json(receipt: Mapping[str, object]) -> bytes:
    """The bytes of ``dconv.json``: the receipt with its own digest, by the algorithm that it names."""
    return with_own(receipt, str(receipt["digest"]))


def with_own(said: Mapping[str, object], algorithm: str, indent: int = 1) -> bytes:
    """JSON with its own digest as the last key: that of the file without these digits."""
    rest = {key: value for key, value in said.items() if key != OWN}
    data = json.dumps({**rest, OWN: ""}, indent=indent).encode() + b"\n"
    return data[: -len(_END)] + hash_bytes(data, algorithm).encode() + _END


def is_unchanged(data: bytes, said: dict[str, object], algorithm: object, last: str = "tensors") -> bool:
    """Whether a file of `with_own` is as it was written, bit by bit; of an older one, without a digest, nobody knows.

    Args:
        data: the file's bytes.
        said: what ``data`` says, its keys in order.
        algorithm: what it says that its digest was taken by, of whatever type.
        last: the last key of an older one.
    """
    if next(reversed(said), "") == last and OWN not in said:
        return True
    own = said.get(OWN)
    if not isinstance(own, str) or not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        return False
    end = own.encode("utf-8", "surrogatepass") + _END
    return data.endswith(end) and hash_bytes(data[: -len(end)] + _END, algorithm) == own


def hash_stretch(fd: int, offset: int, nbytes: int, algorithm: str) -> str:
    """The digest of a stretch of an open file; shorter files give another digest than the whole would."""
    hasher = ALGORITHMS[algorithm]()
    update_from_file(hasher, fd, offset, nbytes)
    return hasher.hexdigest()


def hash_bytes(data: bytes, algorithm: str) -> str:
    """The digest of bytes in hexadecimal digits, by a key of `dconv.sharding.digest.ALGORITHMS`."""
    hasher = ALGORITHMS[algorithm]()
    hasher.update(data)
    return hasher.hexdigest()


def update_from_file(hasher: Hasher, fd: int, offset: int, nbytes: int) -> None:
    """Feed a stretch of an open file to ``hasher``; what lies past the file's end is left out."""
    end = offset + nbytes
    while offset < end:
        data = os.pread(fd, min(_READ, end - offset), offset)
        if not data:
            break
        hasher.update(data)
        offset += len(data)
