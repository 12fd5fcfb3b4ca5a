"""The matrices of ONNX graphs in codes: what the graphs take then, and what a plan computes them from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dconv.arch.mlx import Held
from dconv.checkpoint.mlx import as_held
from dconv.coded.encode import Coded
from dconv.coded.nbits_encode import Blocks, code
from dconv.export.onnx_weights import Weight, in_codes, in_order
from dconv.sharding.derived import Array, real_files
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Slot


class Coding:
    """A model's matrices in codes.

    Args:
        logical: the model's tensors as they lie in the source.
        how: bits of a code, and numbers of a block.
        wanted: whether a weight that something is multiplied by is to be in codes.

    Attributes:
        done: those that are, by name.
    """

    def __init__(self, logical: Logical, how: Blocks, wanted: Callable[[Weight], bool]) -> None:
        self._logical, self._how, self._wanted = logical, how, wanted
        self.done: dict[str, Coded] = {}
        self._behind: set[str] = set()

    def of(self, graph: Any, weights: list[Weight]) -> list[Weight]:
        """Put the codes into a graph in place of its matrices.

        Args:
            graph: an ``onnx_ir.Model``.
            weights: those that it takes.

        Returns:
            What it takes then: codes and scales, and of ``weights`` those that it still uses.
        """
        pairs = in_codes(graph, weights, self._wanted, self._how.bits, self._how.size)
        found: list[Weight] = []
        for weight in weights:
            if weight.value.uses():
                found.append(weight)
            if weight.name not in pairs:
                continue
            codes = pairs[weight.name]
            if weight.name not in self.done:
                dense = self._matrix(weight, codes.turned)
                self.done[weight.name] = code(weight.name, dense, self._how, weight.spec.dtype)
                self._behind |= {slot.tensor for slot in weight.slots}
            for value, (spec, _) in zip(codes.values, self.done[weight.name].parts, strict=True):
                axes = tuple(range(len(spec.shape)))
                found.append(Weight(value, spec, (Slot(spec.name, Region.whole(spec.shape), (0,) * len(axes), axes),)))
        return found

    def logical(self, taken: Mapping[str, list[Weight]]) -> Logical:
        """The model's tensors, those in codes instead of what they are made of."""
        logical = self._logical
        written = {slot.tensor for weights in taken.values() for weight in weights for slot in weight.slots}
        gone = self._behind - written
        specs = {name: spec for name, spec in logical.specs.items() if name not in gone}
        pieces = {name: where for name, where in logical.pieces.items() if name not in gone}
        derived = dict(logical.derived)
        for made in self.done.values():
            derived |= made.derived
            for spec, where in made.parts:
                specs[spec.name], pieces[spec.name] = spec, where
        replicas = {name: where for name, where in logical.replicas.items() if name not in gone}
        used = {piece.file for where in (*pieces.values(), *replicas.values()) for piece in where}
        behind = real_files(used, derived)
        files = {name: stamp for name, stamp in logical.files.items() if name in behind}
        return replace(logical, specs=specs, pieces=pieces, replicas=replicas, files=files, derived=derived)

    def _matrix(self, weight: Weight, turned: bool) -> Array:
        """Where a weight lies, as [out, in]."""
        shape, slots = weight.spec.shape, weight.slots
        if not turned:
            shape, slots = shape[::-1], tuple(in_order(slot, (1, 0)) for slot in slots)
        held = as_held([Held(weight.name, shape, slots)], self._logical)
        twins = held.replicas.get(weight.name, ())
        return Array(shape, held.specs[weight.name].dtype, held.pieces[weight.name], twins)
