"""glibc's allocator, told what to do with memory that is freed.

Buffers of a MiB come and go with every tile of a numeric op. Left alone it maps each anew, and the kernel's zeroing of
their pages takes about as long as encoding to FP8. Matrices of a model that is run are another matter: what it kept of
them, in pieces that the next ones do not fit into, would be several times what they take.
"""

from __future__ import annotations

from functools import cache
from typing import Final

#: Of glibc's ``malloc.h``, each with what it is set to: allocations below it come from the heap (32 MiB is the most
#: that glibc takes), and so much of the heap's free end is kept.
_MMAP, _TRIM = -3, -1
_KEPT: Final = {_MMAP: 32 << 20, _TRIM: 64 << 20}
_RETURNED: Final = {_MMAP: 1 << 20, _TRIM: 1 << 20}


@cache
def keep_freed_memory() -> None:
    """Once in a process; nothing where the C library has no such knob."""
    _turn(_KEPT)


def return_freed_memory() -> None:
    """Large pieces go back to the system at once, for the rest of this process."""
    keep_freed_memory()  # so that it does not come after this
    _turn(_RETURNED)


def _turn(knobs: dict[int, int]) -> None:
    import ctypes  # only numeric plans pay for it

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for knob, value in knobs.items():
            mallopt(knob, value)
