"""File systems of a test's own: small, read-only, with few inodes; a directory seen a second time."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def _at(name: str, *words: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *words, place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("may not mount a file system here")
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)


def mounted(size: int, *, read_only: bool = False, files: int = 0) -> contextlib.AbstractContextManager[Path]:
    """A file system of ``size`` bytes; skips the test where none may be mounted.

    Args:
        files: that it may hold, directories among them; 0 is as many as there is memory for.
    """
    options = f"size={size},mode=755" + (",ro" if read_only else "") + (f",nr_inodes={files}" if files else "")
    return _at("mounted", "-t", "tmpfs", "-o", options, "tmpfs")


def read_only(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """A directory once more, by its name, where nothing can be written to it."""
    return _at(folder.name, "-o", "bind,ro", str(folder))
