"""Weights → GGUF's block types whose scales are searched for: by ggml's own search, in a library that is installed.

What that search finds is part of no specification, and llama.cpp changes it: so its code is run, not rewritten. Any
build of llama.cpp has it (``ggml_quantize_chunk`` of ``ggml.h``), and it is a pure function of a block. Which build
it was is told, since another one may round otherwise.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec.gguf import BLOCKS, in_blocks
from dconv.errors import Refused, ToolMissing

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Type -> its number in ``enum ggml_type``.
KINDS: Final = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23}
#: The largest weight: what is not larger has scales that fp16 has, and sums of squares that fp32 has.
_LARGEST: Final = 65504.0
#: Packages of Python that bring it along, with the files that may have it.
_PACKAGES: Final = (
    ("llama_cpp", "llama-cpp-python", ("lib/libggml-base.*", "lib/libggml.*", "lib/libllama.*", "libllama.*")),
    ("xllamacpp", "xllamacpp", ("xllamacpp*.so",)),
)
#: The path of a library of one's own.
VARIABLE: Final = "DCONV_GGML"
#: What a library has whose ``ggml_quantize_chunk`` takes rows and an importance matrix, as since the beginning of 2024.
_SINCE_ROWS: Final = ("ggml_quantize_init", "ggml_quantize_requires_imatrix", "ggml_type_size", "ggml_blck_size")


@dataclass(frozen=True)
class Library:
    """A build of ggml.

    Attributes:
        said: what it is, in words.
        calls: its functions.
    """

    said: str
    calls: Any


@lru_cache(maxsize=1)
def library() -> Library:
    """The first one that is found: of ``DCONV_GGML``, of a package of Python, of the system.

    Raises:
        ToolMissing: there is none.
    """
    tried: list[str] = []
    for path, said in _candidates():
        try:
            calls = ctypes.CDLL(str(path))
            for name in _SINCE_ROWS:
                getattr(calls, name)
            calls.ggml_type_size.restype = ctypes.c_size_t
            calls.ggml_blck_size.restype = ctypes.c_int64
            calls.ggml_quantize_chunk.restype = ctypes.c_size_t
        except (OSError, AttributeError) as fault:
            tried.append(f"{path}: {fault}"[:160])
            continue
        sizes = {kind: (calls.ggml_blck_size(at), calls.ggml_type_size(at)) for kind, at in KINDS.items()}
        if odd := [kind for kind, size in sizes.items() if size != BLOCKS[kind]]:
            tried.append(f"{path}: other blocks of {', '.join(odd)}")
            continue
        return Library(said, calls)
    raise ToolMissing(
        "types that are searched for are encoded by llama.cpp's library ggml, nothing was written",
        where="\n".join(tried),
        expected=f"the package xllamacpp or llama-cpp-python, or the path of libggml-base.so in {VARIABLE}",
        found="none",
        do="pip install 'dconv[kquants]'",
    )


def _candidates() -> Iterator[tuple[Path | str, str]]:
    if own := os.environ.get(VARIABLE):
        yield own, f"ggml of {own}"
    for module, package, patterns in _PACKAGES:
        spec = find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for pattern in patterns:
                for path in sorted(Path(folder).glob(pattern)):
                    yield path, f"{package} {metadata.version(package)}"
    if system := find_library("ggml-base"):
        yield system, f"the system's {system}"


def encode(weights: NDArray[np.generic], kind: str) -> NDArray[np.uint8]:
    """fp32 weights [..., in] → bytes [..., in / block × bytes], one of `KINDS`.

    Raises:
        Refused: a row that is not whole blocks; NaN, infinity or weights past the range of fp16 scales.
        ToolMissing: see `library`.
    """
    size, stored = BLOCKS[kind]
    blocks = in_blocks(weights, kind)
    largest = max(blocks.max(initial=0), -blocks.min(initial=0))
    if not np.isfinite(largest):
        raise Refused(f"NaN or infinity has no form in {kind}")
    if largest > _LARGEST:
        raise Refused(f"weights are too large for the fp16 scales of {kind}", found=f"{largest:g}")
    found = np.empty((len(blocks), stored), np.uint8)
    calls = library().calls
    source, target = (ctypes.c_void_p(array.ctypes.data) for array in (blocks, found))
    count, wide, none = ctypes.c_int64(len(blocks)), ctypes.c_int64(size), ctypes.c_void_p(None)
    made = (
        calls.ggml_quantize_chunk(KINDS[kind], source, target, ctypes.c_int64(0), count, wide, none)
        if len(blocks)
        else 0
    )
    if made != found.nbytes:
        raise ToolMissing(
            f"ggml made another size of {kind}", where=library().said, expected=f"{found.nbytes} bytes", found=str(made)
        )
    return found.reshape(*weights.shape[:-1], weights.shape[-1] // size * stored)
