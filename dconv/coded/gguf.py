"""GGUF's tensors as a source: rows of blocks (`dconv.codec.gguf`), and norms that are stored one higher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dconv.codec import gguf
from dconv.codec.cast import cast
from dconv.coded.decoded import Decoded, array_of
from dconv.sharding.derived import Derived, Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Region

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Blocks:
    """The values of blocks [..., in]; input: their bytes [..., bytes of a row]."""

    kind: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the whole blocks that the box touches, and cut it out."""
        weights, size = gguf.BLOCKS[self.kind]
        first, last = box.start[-1] // weights, -(-box.stop[-1] // weights)
        place = Region((*box.start[:-1], first * size), (*box.shape[:-1], (last - first) * size))
        codes = read(0, place, "").view("u1")
        at = box.start[-1] - first * weights
        if factor == 1:
            return gguf.decode(codes, self.kind, dtype)[..., at : at + box.shape[-1]]
        values = gguf.decode(codes, self.kind, "f32")[..., at : at + box.shape[-1]].view("<f4").astype("f8")
        return cast(values * factor, "f64", dtype)


@dataclass(frozen=True, slots=True)
class Less:
    """The stored value less a number; input: the stored tensor, of a floating dtype."""

    number: int

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Taken in fp64 and rounded once."""
        stored = read(0, box, "f64").view("<f8")
        return cast((stored - self.number) * factor, "f64", dtype)


def decode(found: Decoded, name: str, kind: str, shape: tuple[int, ...], dtype: str) -> None:
    """Replace the bytes stored under ``name`` by the weight [..., in] that they are."""
    raw = found.tensors[name]
    weights, size = gguf.BLOCKS[kind]
    how = How(f"the values of {kind} blocks of {weights}", exact=False, bits=8 * size / weights, floats=True)
    found.put(name, dtype, {name: raw}, Derived(shape, (array_of(raw),), Blocks(kind), how), f"GGUF {kind}")


def lower(found: Decoded, name: str) -> None:
    """Replace a norm that is stored 1 higher by the weight that its class adds 1 to.

    What was rounded to fp32 when 1 was added stays so: of a bf16 weight that is 0 or at least 2 ** -16, nothing.
    """
    _replace(found, name, "f32", Less(1), "the stored norm less 1, which its class adds")


def alike(found: Decoded, name: str, dtype: str) -> None:
    """Replace a plain tensor by itself in another dtype: what it makes a weight with is decoded to that."""
    _replace(found, name, dtype, Less(0), "the stored value in the dtype of the rest of its weight")


def _replace(found: Decoded, name: str, dtype: str, recipe: Less, words: str) -> None:
    raw = found.tensors[name]
    how = How(words, exact=False, bits=8 * ITEMSIZE[raw.spec.dtype], floats=True)
    found.put(name, dtype, {name: raw}, Derived(raw.spec.shape, (array_of(raw),), recipe, how), words)
    del found.coded[name]  # no code
