"""Which tensors of a checkpoint its shards disagree on, found by reading all that several of them hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from dconv.sharding.derived import open_reader
from dconv.sharding.dtypes import ITEMSIZE, carrier
from dconv.sharding.ops import MOVE, Kernel
from dconv.sharding.plan import Copy
from dconv.sharding.reader import BoxReader
from dconv.sharding.replicas import equal
from dconv.sharding.tensor import Logical

_TILE_BYTES: Final = 1 << 20


def torn(logical: Logical, kernel: Kernel) -> list[str]:
    """Tensors of a checkpoint whose replicas differ; reads all that have any."""
    reader = open_reader(logical, _TILE_BYTES, kernel)
    try:
        return [name for name in logical.replicas if not all(_agree(reader, *pair) for pair in _pairs(logical, name))]
    finally:
        reader.close()


def _pairs(logical: Logical, name: str) -> Iterator[tuple[Copy, Copy]]:
    by_region = {p.region: Copy(p.region, p.file, p.offset, p.strides, p.dtype, MOVE) for p in logical.pieces[name]}
    for p in logical.replicas[name]:
        yield by_region[p.region], Copy(p.region, p.file, p.offset, p.strides, p.dtype, MOVE)


def _agree(reader: BoxReader, copy: Copy, twin: Copy) -> bool:
    for tile in copy.region.bands(_TILE_BYTES // ITEMSIZE[copy.dtype]):
        mine, theirs = copy.clip(tile), twin.clip(tile)
        if mine is None or theirs is None or (reader.is_hole(mine) and reader.is_hole(theirs)):
            continue
        read = np.empty(tile.shape, carrier(copy.dtype))
        reader.read_box(mine, read)
        if not equal(reader, read, theirs):
            return False
    return True
