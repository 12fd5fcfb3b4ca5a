"""Tensors that several shards hold whole must be the same in all of them.

Norms lie on every tensor-parallel rank and a tied embedding also on the last stage. Training keeps them equal; where it
did not (a gradient that was not reduced), there is no one model in the checkpoint, and taking the first copy would
choose for the user without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import Damaged
from dconv.sharding.dtypes import ITEMSIZE, carrier
from dconv.sharding.ops import MOVE
from dconv.sharding.plan import Copy
from dconv.sharding.reader import BoxReader, Reader
from dconv.sharding.tensor import Logical

_TILE_BYTES: Final = 1 << 20


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


def torn(logical: Logical) -> list[str]:
    """Tensors of a checkpoint whose replicas differ; reads all that have any."""
    reader = Reader(logical.root, logical.files, _TILE_BYTES)
    try:
        return [name for name in logical.replicas if not all(_agree(reader, *pair) for pair in _pairs(logical, name))]
    finally:
        reader.close()


def _pairs(logical: Logical, name: str) -> Iterator[tuple[Copy, Copy]]:
    by_region = {p.region: Copy(p.region, p.file, p.offset, p.strides, p.dtype, MOVE) for p in logical.pieces[name]}
    for p in logical.replicas[name]:
        yield by_region[p.region], Copy(p.region, p.file, p.offset, p.strides, p.dtype, MOVE)


def _agree(reader: Reader, copy: Copy, twin: Copy) -> bool:
    for tile in copy.region.bands(_TILE_BYTES // ITEMSIZE[copy.dtype]):
        mine, theirs = copy.clip(tile), twin.clip(tile)
        if mine is None or theirs is None or (reader.is_hole(mine) and reader.is_hole(theirs)):
            continue
        read = np.empty(tile.shape, carrier(copy.dtype))
        reader.read_box(mine, read)
        if not equal(reader, read, theirs):
            return False
    return True
