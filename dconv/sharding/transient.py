"""Storage that fails for a moment: what is tried again, and how often.

A network file system whose server fails over, or whose client was evicted, answers with an error for some seconds and
then goes on. A full disk or a lack of rights does not pass, and is told at once.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Final

from dconv.errors import DconvError, StorageFault

_PASSING: Final = {
    errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOBUFS,
    errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET,
}  # fmt: skip
#: Tries that may fail one after the other, and seconds before the second, which double: some 16 s in all.
_TRIES: Final = 6
_BACK_OFF: Final = 0.5


def passes(fault: DconvError) -> bool:
    """Whether an error is one of storage that may be gone at the next try."""
    return isinstance(fault, StorageFault) and getattr(fault.__cause__, "errno", None) in _PASSING


class Tries:
    """Counts the failures that come one after the other.

    Args:
        told: called with a line for a person before each new try.
        stop: ends a wait.
    """

    def __init__(self, told: Callable[[str], None], stop: threading.Event | None) -> None:
        self._told, self._stop = told, stop or threading.Event()
        self._failed = 0

    def failed(self, fault: DconvError, progress: bool) -> None:
        """Wait before a new try, and return.

        Args:
            fault: what went wrong.
            progress: something went well since the last failure.

        Raises:
            DconvError: ``fault``, where it does not pass or has not passed.
        """
        self._failed = 1 if progress else self._failed + 1
        if not passes(fault):
            raise fault
        if self._failed >= _TRIES:
            fault.do = fault.do or "what is finished is kept: run again with --resume when the storage is well"
            fault.found = fault.found or f"the same after {_TRIES} tries"
            raise fault
        seconds = _BACK_OFF * 2 ** (self._failed - 1)
        what = f"{fault.what}: {fault.where}" if fault.where else fault.what
        self._told(f"{what}; once more in {seconds:g} s")
        self._stop.wait(seconds)
