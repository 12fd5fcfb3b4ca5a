"""Tensors that a model has once and a checkpoint may store twice (tied embeddings): one of them is read, when equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dconv.errors import Refused
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import MOVE
from dconv.sharding.plan import Copy
from dconv.sharding.reader import Reader
from dconv.sharding.region import Region
from dconv.sharding.tensor import FileStamp, Stored

#: Bytes compared at a time.
_COMPARED: Final = 1 << 20


def alone(
    folder: Path,
    files: Mapping[str, FileStamp],
    shards: Sequence[Mapping[str, Mapping[str, Stored]]],
    copies: Mapping[str, str],
) -> dict[str, str]:
    """Copies of tensors that are not stored under their own names: one of each.

    transformers 5 takes either copy of an embedding, and ties two of them only when they are equal (``tie_weights``).

    Raises:
        Refused: two copies that differ.
    """
    found: dict[str, str] = {}
    for shard in shards:
        tensors = {name: tensor for part in shard.values() for name, tensor in part.items()}
        for copy, original in copies.items():
            first = next((name for name, its in found.items() if its == original), original)
            if copy not in tensors or first == copy:
                continue
            if first not in tensors:
                found[copy] = original
            elif not equal(folder, files, tensors[first], tensors[copy]):
                raise differ(copy, first, folder)
    return found


def differ(head: str, embedding: str, folder: Path) -> Refused:
    """The refusal of an output layer and an embedding that should be one tensor and are not."""
    return Refused(
        "the config ties the output to the embedding, but the two are stored and differ, nothing was written",
        where=f"{head} and {embedding} in {folder}",
        do='"tie_word_embeddings": false in config.json, or in that of --hf-config DIR, keeps both',
    )


def equal(root: Path, files: Mapping[str, FileStamp], one: Stored, other: Stored) -> bool:
    """Whether two stored tensors, each in one extent, are equal bit by bit. Reads up to the first difference."""
    if (one.spec.shape, one.spec.dtype) != (other.spec.shape, other.spec.dtype):
        return False
    if not {one.extents[0].file, other.extents[0].file} <= files.keys():  # one is decoded, and rounded before
        return False
    whole, itemsize = Region.whole(one.spec.shape), ITEMSIZE[one.spec.dtype]
    a, b = (
        Copy(whole, extent.file, extent.offset, extent.strides, one.spec.dtype, MOVE)
        for extent in (one.extents[0], other.extents[0])
    )
    if a == b:
        return True
    reader = Reader(root, dict(files), _COMPARED)

    def read(copy: Copy, band: Region) -> NDArray[np.generic]:
        values = np.empty(band.shape, f"<u{itemsize}")
        if part := copy.clip(band):
            reader.read_box(part, values)
        return values

    try:
        return all(np.array_equal(read(a, band), read(b, band)) for band in whole.bands(_COMPARED // itemsize))
    finally:
        reader.close()
