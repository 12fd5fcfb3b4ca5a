"""What a scheme makes of a source's stored tensors: dense ones under the names of those that they replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dconv.sharding.derived import Array, Derived, Recipe, steps
from dconv.sharding.ops import How
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Extent, Piece, Stored, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: No file of a checkpoint can be called so: names of files have no empty part.
_PREFIX = "decoded//"


@dataclass
class Decoded:
    """The stored tensors of a source, those in codes decoded.

    Attributes:
        tensors: name and the dense tensor, or the stored one where it is not coded.
        derived: what computes the dense ones, by the file that their extents name.
        coded: names of the dense ones that are decoded, with the scheme in words.
        left_out: stored tensors that a dense weight has no place for, with the reason.
        values: reads a small one: the few numbers that shapes alone do not tell.
    """

    tensors: dict[str, Stored]
    values: Callable[[Stored], NDArray[np.generic]]
    derived: dict[str, Derived] = field(default_factory=dict[str, Derived])
    coded: dict[str, str] = field(default_factory=dict[str, str])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def put(
        self,
        name: str,
        dtype: str,
        parts: Mapping[str, Stored],
        dense: Derived,
        scheme: str,
        order: Index | None = None,
    ) -> None:
        """Replace stored tensors by the dense one that they make.

        Args:
            name: of the dense tensor.
            dtype: what the dense tensor is decoded to where nothing else is asked for.
            parts: by their names; they are not seen any more.
            dense: what computes it.
            scheme: in words, the same for all tensors that are alike.
            order: for each axis of the tensor that of ``dense`` which it is; None where they are the same.
        """
        first = next(iter(parts.values())).extents[0].file
        file = f"{_PREFIX}{first}//{name}"  # ranks may each have a part of one name
        axes = range(len(dense.shape)) if order is None else order
        shape, strides = (tuple(sizes[axis] for axis in axes) for sizes in (dense.shape, steps(dense.shape)))
        whole = Extent(Region.whole(shape), file, 0, strides)
        for part in parts:
            del self.tensors[part]
        self.tensors[name] = Stored(TensorSpec(name, shape, dtype), (whole,))
        self.derived[file] = dense
        self.coded[name] = scheme

    def help(self, of: Stored, name: str, derived: Derived, dtype: str) -> Array:
        """A tensor that dense ones are computed from and that is none itself; ``of`` is what it is made of."""
        file = f"{_PREFIX}{of.extents[0].file}//{name}"
        self.derived[file] = derived
        return Array(derived.shape, dtype, (derived.piece(name, file, dtype),))


def array_of(stored: Stored) -> Array:
    """A stored tensor as an input of a derived one."""
    spec = stored.spec
    pieces = tuple(Piece(spec.name, e.region, e.file, e.offset, e.strides, spec.dtype) for e in stored.extents)
    return Array(spec.shape, spec.dtype, pieces)


def dense(shape: tuple[int, ...], parts: Mapping[str, Stored], recipe: Recipe, words: str, bits: float) -> Derived:
    """A weight decoded from stored tensors, in any floating dtype.

    Args:
        shape: of the weight.
        parts: its inputs, in the order that ``recipe`` takes them.
        recipe: computes a box of it.
        words: how it is computed, for a person.
        bits: read for each of its elements.
    """
    return Derived(shape, tuple(map(array_of, parts.values())), recipe, How(words, exact=False, bits=bits, floats=True))
