"""GGUF's tensors as a source: rows of blocks (`dconv.codec.gguf`), and norms that are stored one higher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.codec import gguf
from dconv.codec.cast import cast
from dconv.coded.decoded import Decoded, array_of
from dconv.sharding.derived import Derived, Read
from dconv.sharding.ops import How
from dconv.sharding.region import Region
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Types whose elements are stored as they are -> dconv's name.
PLAIN: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


@dataclass(frozen=True, slots=True)
class Blocks:
    """The values of blocks [..., in]; input: their bytes [..., bytes of a row]."""

    kind: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
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
class LessOne:
    """A norm's weight as HuggingFace's class has it, which adds 1 itself; input: the stored one, 1 higher."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        stored = read(0, box, "f32").view("<f4").astype("f8")
        return cast((stored - 1) * factor, "f64", dtype)


def decode(found: Decoded, name: str, kind: str, shape: tuple[int, ...], dtype: str) -> None:
    """Replace the bytes stored under ``name`` by the weight [..., in] that they are."""
    raw = found.tensors[name]
    weights, size = gguf.BLOCKS[kind]
    how = How(f"the values of {kind} blocks of {weights}", exact=False, bits=8 * size / weights, floats=True)
    found.put(name, dtype, {name: raw}, Derived(shape, (array_of(raw),), Blocks(kind), how), f"GGUF {kind}")


def lower(found: Decoded, name: str) -> None:
    """Replace a norm that is stored one higher; where it was rounded to fp32 then, it is no more than near."""
    raw: Stored = found.tensors[name]
    how = How("the stored norm less 1, which its class adds", exact=False, bits=32, floats=True)
    found.put(name, "f32", {name: raw}, Derived(raw.spec.shape, (array_of(raw),), LessOne(), how), "GGUF norm + 1")
