"""glibc's allocator, told to keep what is freed: buffers of a MiB come and go with every tile of a numeric op.

Left alone it maps each anew, and the kernel's zeroing of their pages takes about as long as encoding to FP8.
"""

from __future__ import annotations

from functools import cache
from typing import Final

#: Of glibc's ``malloc.h``, each with what it is set to: allocations below it come from the heap (32 MiB is the most
#: that glibc takes), and so much of the heap's free end is kept.
_KNOBS: Final = {-3: 32 << 20, -1: 64 << 20}


@cache
def keep_freed_memory() -> None:
    """Once in a process; nothing where the C library has no such knob."""
    import ctypes  # only numeric plans pay for it

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for knob, value in _KNOBS.items():
            mallopt(knob, value)
