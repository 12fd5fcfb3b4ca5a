"""Calibration samples in fixed blocks, and their hidden states between two layers, on disk.

A block is a few samples, the same for any number of ranks; a rank has every world-th of them. What lies on disk is
both what does not fit into memory and what a killed run goes on from.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from dconv.errors import Damaged, StorageFault
from dconv.sharding.finish import write_synced

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Tokens of a block, about: large products are efficient, small blocks are spread evenly over ranks. It decides what is
#: summed in float32, so another number gives other last bits.
_TOKENS: Final = 4096
_DIGEST: Final = 8


@dataclass(frozen=True)
class Blocks:
    """Samples in blocks.

    Attributes:
        tokens: int32 [samples, length].
        folder: where hidden states are kept.
    """

    tokens: NDArray[np.int32]
    folder: Path

    @property
    def _each(self) -> int:
        return max(1, _TOKENS // self.tokens.shape[1])

    def __len__(self) -> int:
        return -(-len(self.tokens) // self._each)

    def mine(self, rank: int, world: int) -> list[int]:
        """The numbers of a rank's blocks, dealt out in turn."""
        return list(range(rank, len(self), world))

    def samples(self, block: int) -> NDArray[np.int32]:
        """Tokens of a block, [samples, length]."""
        return self.tokens[block * self._each : (block + 1) * self._each]

    def write(self, layer: int, block: int, hidden: NDArray[np.float32]) -> None:
        """Keep what comes to a layer, float32 [samples, length, hidden], durably and with a digest.

        Raises:
            StorageFault: it cannot be written.
        """
        path = self._path(layer, block)
        fresh = path.with_suffix(".new")
        data = np.ascontiguousarray(hidden).reshape(-1).view(np.uint8).data
        try:
            write_synced(fresh, data, xxhash.xxh3_64_digest(data))
            os.replace(fresh, path)
        except OSError as fault:
            raise StorageFault(f"cannot keep hidden states: {fault.strerror}", where=str(path)) from fault

    def read(self, layer: int, block: int) -> NDArray[np.float32]:
        """What comes to a layer, float32 [samples, length, hidden].

        Raises:
            Damaged: the bytes are not those that were written.
            StorageFault: they cannot be read.
        """
        path = self._path(layer, block)
        try:
            data = path.read_bytes()
        except OSError as fault:
            raise StorageFault(f"cannot read hidden states: {fault.strerror}", where=str(path)) from fault
        if xxhash.xxh3_64_digest(memoryview(data)[:-_DIGEST]) != data[-_DIGEST:]:
            raise Damaged(
                "hidden states between two layers changed on disk",
                where=str(path),
                do=f"remove {self.folder.parent.parent} and start over",
            )
        samples, length = self.samples(block).shape
        return np.frombuffer(data[:-_DIGEST], np.float32).reshape(samples, length, -1).copy()

    def forget(self, layer: int) -> None:
        """Remove what came to a layer; none need be there."""
        shutil.rmtree(self.folder / str(layer), ignore_errors=True)

    def _path(self, layer: int, block: int) -> Path:
        return self.folder / str(layer) / f"{block}.f32"
