"""What the text of an option means: sizes, counts, layouts."""

from __future__ import annotations

import argparse
import math
import re
from typing import Final

from dconv.sharding.dtypes import OPTION
from dconv.sharding.tuning import AUTO

_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
                 "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

#: Bytes that no file system's offset reaches.
_LARGEST: Final = 2.0**63


def byte_count(text: str | int) -> int:
    """``256MiB``, ``5GB``, ``1048576`` → bytes.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256MiB or 5GB")
    count = float(match[1]) * unit
    if not 1 <= count < _LARGEST:
        raise argparse.ArgumentTypeError(f"{str(text)[:80]!r} is no size such as 256MiB or 5GB")
    return int(count)


def dtype(text: str) -> str:
    """``bf16``, ``bfloat16`` … → the dtype's one name.

    Raises:
        argparse.ArgumentTypeError: there is none of that name.
    """
    if text not in OPTION:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(OPTION)}")
    return OPTION[text]


def pp_layout(text: str) -> tuple[int, ...]:
    """Layer counts of the pipeline's chunks in the order the model runs through them.

    Chunks are parted by ``|``; each is a number (``3|4|4|2``) or in Megatron's letters with its repetitions
    (``Ettt|(tttt|)*2ttL``). Source of the letters: ``megatron/core/transformer/pipeline_parallel_layer_layout.py``.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    spelled = str(text).replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"([EtL|])\*(\d+)"):
        spelled = re.sub(pattern, lambda found: found[1] * min(int(found[2]), 10_000), spelled)
    chunks = spelled.split("|")
    if all(chunk.isdecimal() for chunk in chunks):
        return tuple(int(chunk) for chunk in chunks)
    letters = "".join(chunks)
    if letters[:1] != "E" or letters[-1:] != "L" or set(letters[1:-1]) - {"t"}:
        raise argparse.ArgumentTypeError(f"{text!r} is no pipeline layout such as 3|4|4|2 or Ettt|tttt|ttL")
    return tuple(chunk.count("t") for chunk in chunks)


def seconds(text: str | float) -> float:
    """A time that is more than none.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    found = _float(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{str(text)[:80]!r} is no number of seconds")
    return found


def block_size(text: str) -> tuple[int, int]:
    """``128x128`` → rows and columns.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    if not re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}", str(text), re.ASCII):
        raise argparse.ArgumentTypeError(f"{str(text)[:80]!r} is no block such as 128x128")
    rows, columns = map(int, text.split("x"))
    return rows, columns


def lengths(text: str | int) -> tuple[int, int]:
    """``128`` or ``1+1024`` → tokens of a text, and tokens in the cache.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    found = re.fullmatch(r"([1-9]\d{0,8})(?:\+(0|[1-9]\d{0,8}))?", str(text), re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{str(text)[:80]!r} are no lengths such as 128 or 1+1024")
    return int(found[1]), int(found[2] or 0)


def whole(text: str | int) -> int:
    """A whole number; `Parallel` refuses those that are no size.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    if not re.fullmatch(r"[+-]?\d{1,18}", str(text), re.ASCII):  # more digits are no size of anything
        raise argparse.ArgumentTypeError(f"{str(text)[:80]!r} is no whole number")
    return int(text)


def positive(text: str | int) -> int:
    """A count of 1 or more.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    if not re.fullmatch(r"0*[1-9]\d{0,17}", str(text), re.ASCII):  # more digits are no count of anything
        raise argparse.ArgumentTypeError(f"{str(text)[:80]!r} is no count of 1 or more")
    return int(text)


def number(text: str | float) -> float:
    """A number of 0 or more, such as the half of a GPU.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    found = _float(text)
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{str(text)[:80]!r} is no number of 0 or more")
    return found


def _float(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def threads(text: str | int) -> int:
    """A number of threads, or ``auto``.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    return AUTO if text == "auto" else positive(text)
