"""From a whole partial folder to a result: everything durable, then one rename.

A kill at any moment is made good by the next run: an old output that was set aside is put away, a receipt in a partial
folder is carried to its end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Final

from dconv.errors import StorageFault, UsageError
from dconv.sharding.journal import sync_folder
from dconv.sharding.receipt import RECEIPT, to_json

#: Working state inside a partial folder, and never in a result.
STATE: Final = ".dconv"
#: A process notes its progress a few times a second, so that the second try finds the folder quiet.
_TRIES: Final = 20
#: What a rename says where something is already.
_TAKEN: Final = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def cannot(what: str, where: Path, fault: OSError) -> StorageFault:
    """The error of an output that cannot be written; where the disk is full it says that a resumed run goes on."""
    full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
    do = "free space and run again with --resume: what is finished is kept" if full else ""
    return StorageFault(f"cannot {what}: {fault.strerror}", where=str(fault.filename or where), do=do)


def require_parent(out: Path) -> None:
    """Raise where there is no directory for an output to be in.

    Raises:
        StorageFault: there is none.
    """
    folder = out.absolute().parent
    if not folder.is_dir():
        raise StorageFault("the output's parent directory is not there", where=str(folder), do=f"mkdir -p {folder}")


def finish_earlier(out: Path, partial: Path, overwrite: bool, receipt: dict[str, object]) -> None:
    """Finish what a killed run began; finished *now*, by which the other ranks of this run know it for their own."""
    fresh = partial / f"{RECEIPT}.new"
    try:
        write_synced(fresh, to_json(receipt | {"finished": time.time()}))
        os.replace(fresh, partial / RECEIPT)
    except OSError as fault:
        raise cannot("commit", partial, fault) from fault
    finish(out, partial, overwrite)


def sync_folders(partial: Path) -> None:
    """Flush to disk the names in a folder and in all below it; the files themselves are flushed before."""
    for folder, _, _ in os.walk(partial):
        sync_folder(Path(folder))


def finish(out: Path, partial: Path, overwrite: bool) -> None:
    """From a receipt to a result. A kill on the way is made good by the next run."""
    try:
        sync_folders(partial)
        # The journal goes after the receipt is safe and before the rename, so that OUT never holds working state.
        _remove_state(partial / STATE)
        sync_folder(partial)  # else a power cut may keep the rename and lose the removal
        _rename(out, partial, overwrite)
    except OSError as fault:
        raise cannot("commit", partial, fault) from fault


def _remove_state(state: Path) -> None:
    """Another process of the plan may put a note there meanwhile; once the folder is gone it cannot."""
    for _ in range(_TRIES):
        shutil.rmtree(state, ignore_errors=True)
        if not os.path.lexists(state):
            return
    shutil.rmtree(state)


def write_synced(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of some bytes after the other, and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(out: Path, partial: Path, overwrite: bool) -> None:
    """Put the new output in its place, and an old one that may be replaced out of it.

    Raises:
        UsageError: something came to ``out`` meanwhile that may not be replaced.
    """
    aside = aside_of(out, partial)
    for tries in range(_TRIES, 0, -1):  # the run of another plan may put its own output there at the same time
        if overwrite and os.path.lexists(out):
            remove(aside)
            with contextlib.suppress(FileNotFoundError):
                os.rename(out, aside)
        try:
            os.rename(partial, out)
            break
        except OSError as fault:
            if fault.errno not in _TAKEN or not os.path.lexists(out):
                raise
            if not overwrite:
                raise UsageError(
                    "the output came to be while this run was at work; nothing of it was changed",
                    where=str(out),
                    do=f"what is finished is kept in {partial.name}: move the other away and run again with --resume",
                ) from fault
            if tries == 1:
                raise
    sync_folder(out.parent)
    remove(aside)


def aside_of(out: Path, partial: Path) -> Path:
    """Where an old output waits until the new one is in its place."""
    return out.with_name(f"{out.name}.replaced-{partial.name.rpartition('-')[2]}")


def remove(aside: Path) -> None:
    """Remove an old output, a directory, a file or a link; what cannot be removed of a directory stays."""
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
