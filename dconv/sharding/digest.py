"""Digests of tensors: a tree of fast hashes over fixed leaves, taken while the bytes are in the buffer.

A leaf is one task's stretch (`dconv.sharding.plan.LEAF_BYTES` at most), so the tree does not depend on how tasks were
dealt to ranks, on threads, or on the memory budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final, Protocol

import xxhash

DEFAULT: Final = "xxh3"


class Hasher(Protocol):
    """A digest under way, with the two methods of `hashlib` that are used."""

    def update(self, data: memoryview | bytes, /) -> None:
        """Take these bytes behind those before."""
        ...

    def hexdigest(self) -> str:
        """The digest of all bytes so far, in hexadecimal digits."""
        ...


def _sha256() -> Hasher:
    import hashlib  # brings OpenSSL along, which the default does not need

    return hashlib.sha256()


#: ``--digest`` -> constructor. xxh3 (128 bit) finds damage at memory speed; sha256 also withstands an adversary.
ALGORITHMS: Final[dict[str, Callable[[], Hasher]]] = {"xxh3": xxhash.xxh3_128, "sha256": _sha256}

_ZEROS: Final = memoryview(bytes(1 << 20))


def tree(algorithm: str, leaves: Iterable[str]) -> str:
    """The digest of a tensor from the digests of its leaves, in order."""
    hasher = ALGORITHMS[algorithm]()
    for leaf in leaves:
        hasher.update(bytes.fromhex(leaf))
    return hasher.hexdigest()


@lru_cache(maxsize=256)
def of_zeros(algorithm: str, nbytes: int) -> str:
    """The leaf digest of ``nbytes`` zero bytes; tensors made of holes share few lengths."""
    hasher = ALGORITHMS[algorithm]()
    update_zeros(hasher, nbytes)
    return hasher.hexdigest()


def update_zeros(hasher: Hasher, nbytes: int) -> None:
    """Feed ``nbytes`` zero bytes to ``hasher``, of which no more than 1 MiB is in memory."""
    while nbytes > 0:
        step = min(nbytes, len(_ZEROS))
        hasher.update(_ZEROS[:step])
        nbytes -= step
