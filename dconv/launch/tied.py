"""A module run as a program that ends when the thread that started it does, however that comes to its end.

``python -m dconv.launch.tied PARENT MODULE WORDS…``: a rank whose keeper was killed would go on writing, and another
one is started in its place. The kernel sends the signal when the *thread* ends that started this process, so that one
has to stay until then.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

#: ``PR_SET_PDEATHSIG`` of ``linux/prctl.h``. Only Linux has it: elsewhere a rank outlives its keeper by its share.
_SIGNAL_OF_A_PARENT_THAT_ENDS: Final = 1


def tie(parent: int) -> None:
    """Let the kernel kill this process once the thread that started it ends; at once if ``parent`` is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_A_PARENT_THAT_ENDS, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    module = sys.argv[2]
    sys.argv[1:3] = []
    runpy.run_module(module, run_name="__main__", alter_sys=True)
