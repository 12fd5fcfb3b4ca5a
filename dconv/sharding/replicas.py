"""Tensors that several shards hold whole must be the same in all of them.

Norms lie on every tensor-parallel rank and a tied embedding also on the last stage. Training keeps them equal; where it
did not (a gradient that was not reduced), there is no one model in the checkpoint, and taking the first copy would
choose for the user without a word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dconv.errors import Damaged
from dconv.sharding.plan import Copy
from dconv.sharding.reader import BoxReader


def equal(reader: BoxReader, read: NDArray[np.generic], twin: Copy) -> bool:
    """Whether ``twin`` has, byte by byte, what was ``read`` from the box that it repeats."""
    other = np.empty(read.shape, read.dtype)
    reader.read_box(twin, other)
    bits = f"<u{read.itemsize}"
    return bool(np.array_equal(read.view(bits), other.view(bits)))


def disagreement(name: str, copy: Copy, twin: Copy) -> Damaged:
    """What to say of two boxes that are not equal."""
    return Damaged(
        f"two shards of the source disagree on {name}, which both hold",
        where=f"{copy.file}, byte {copy.offset}\n{twin.file}, byte {twin.offset}",
        expected="the same bytes in both",
        do="dconv check names all such tensors;  --replicas first  takes the first shard's",
    )
