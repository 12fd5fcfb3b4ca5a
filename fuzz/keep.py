"""Take into the corpus that git keeps what a run has found of use:  python fuzz/keep.py [TARGET…]

Of ``fuzz/corpus/TARGET/`` and ``work/fuzz/TARGET/corpus/`` together the smallest inputs are kept that go every way
between two lines of dconv which any of them goes. What is named ``found-…`` was once survived by no parser, and stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from types import FrameType
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT)]
os.environ["DCONV_HISTORY"] = "off"

from fuzz.targets import TARGETS, Target

#: Of one input, and of all that are kept of a target.
_MOST_BYTES, _MOST_OF_ALL = 16_000, 20_000
_OURS = str(_ROOT / "dconv")
_Ways = set[tuple[str, int, int]]


def ways(target: Target, data: bytes) -> _Ways:
    """From which line to which line of dconv an input leads; its outcome is no concern here."""
    found: _Ways = set()

    def enter(frame: FrameType, _event: str, _arg: object) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(_OURS):
            return None
        before = frame.f_lineno

        def step(inner: FrameType, event: str, _arg: object) -> Any:
            nonlocal before
            if event == "line":
                found.add((file, before, inner.f_lineno))
                before = inner.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        target.run(data)
    except BaseException as fault:
        if isinstance(fault, KeyboardInterrupt):
            raise
    finally:
        sys.settrace(None)
    return found


def keep(target: Target) -> tuple[int, int]:
    """How many inputs were there, and are kept."""
    folder, more = _ROOT / "fuzz" / "corpus" / target.name, _ROOT / "work" / "fuzz" / target.name / "corpus"
    paths = [path for place in (folder, more) if place.is_dir() for path in place.iterdir()]
    small = {path.read_bytes() for path in paths if path.stat().st_size <= _MOST_BYTES}
    inputs = sorted(small, key=lambda data: (len(data), data))
    found = {path.name: path.read_bytes() for path in folder.glob("found-*")}
    for data in inputs[:1]:
        ways(target, data)  # what is imported on the way is no way of an input's
    seen: _Ways = set().union(*(ways(target, data) for data in found.values()))
    kept: dict[str, bytes] = dict(found)
    room = _MOST_OF_ALL
    for data in inputs:
        new = ways(target, data) - seen
        if new and len(data) <= room:
            seen |= new
            room -= len(data)
            kept[hashlib.sha256(data).hexdigest()[:16]] = data
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    return len(inputs), len(kept)


def main() -> None:
    for name in sys.argv[1:] or TARGETS:
        there, kept = keep(TARGETS[name])
        print(f"{name:<22} {kept:>4} of {there:>6} inputs")


if __name__ == "__main__":
    main()
