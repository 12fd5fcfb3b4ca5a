"""Numbers that calibration chooses, as parts of a source that is not there yet.

To the plan a weight that will be calibrated is decoded from codes, scales and zero points like that of any quantised
source; only their files are in this process's memory, and only while their layer is written. So containers, packings,
journal and receipt know nothing of calibration.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from numpy.lib.stride_tricks import as_strided

from dconv.codec.cast import cast
from dconv.coded.integers import Grid, Product
from dconv.errors import Damaged
from dconv.quant.gptq import Chosen, Recipe
from dconv.sharding.derived import Array, Derived, Read, real_files
from dconv.sharding.dtypes import FROM_TORCH, ITEMSIZE
from dconv.sharding.ops import How
from dconv.sharding.region import Index, Region, row_major
from dconv.sharding.tensor import Logical, Piece

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from dconv.sharding.plan import Copy, Plan
    from dconv.sharding.reader import BoxReader

PREFIX: Final = "chosen//"


def parts_of(name: str) -> tuple[str, str, str, str]:
    """The virtual files of a weight: codes, scales, zero points, groups."""
    return (f"{PREFIX}{name}//codes", f"{PREFIX}{name}//scales", f"{PREFIX}{name}//zeros", f"{PREFIX}{name}//groups")


def folded_file(name: str) -> str:
    """The virtual file of a tensor that changes without being quantised, float32."""
    return f"{PREFIX}{name}//folded"


@dataclass(frozen=True, slots=True)
class Folded:
    """A tensor with scales folded in, rounded once; input: the tensor, float32."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """A box of the tensor times ``factor``, in ``dtype``.

        Args:
            box: in the tensor's own coordinates.
            dtype: dconv's name of the one that is asked for.
            factor: 1.0 leaves the number as it is.
            read: reads a box of the input in a dtype.
        """
        if factor == 1.0:
            return read(0, box, dtype)
        return cast(read(0, box, "f64") * factor, "f64", dtype)


def to_choose(logical: Logical, wanted: Mapping[str, Recipe], identity: str, folded: Collection[str] = ()) -> Logical:
    """The checkpoint with the weights ``wanted`` made of numbers that are yet to be chosen.

    Args:
        logical: the checkpoint.
        wanted: how each of these weights is quantised, by name.
        folded: tensors that change with them.
        identity: of what chooses them: settings and samples, a part of the plan's identity.
    """
    pieces, derived, held = dict(logical.pieces), dict(logical.derived), set(logical.held)
    for name, recipe in wanted.items():
        spec = logical.specs[name]
        rows, columns = spec.shape
        grid = Grid(recipe.numbers.bits, recipe.group, recipe.numbers.symmetric, recipe.listed)
        groups = grid.groups(columns)
        scale = FROM_TORCH[recipe.numbers.stored]
        codes, scales, zeros, order = parts_of(name)
        numbers = recipe.numbers
        inputs = [_array(codes, (rows, columns), "u8"), _array(scales, (rows, groups), scale)]
        if not numbers.symmetric:
            inputs.append(_array(zeros, (rows, groups), "u8"))
        if recipe.listed:
            inputs.append(_array(order, (columns,), "i32"))
        how = How(f"calibrated int{grid.bits}", exact=False, bits=0, floats=True)
        file = f"{PREFIX}{name}"
        middle = 1 << (numbers.bits - 1) if numbers.symmetric else None
        product = Product(grid, columns, scale, recipe.listed, middle, numbers.least_zero)
        derived[file] = Derived(spec.shape, tuple(inputs), product, how)
        pieces[name] = (derived[file].piece(name, file, spec.dtype),)
        held |= {piece.file for array in inputs for piece in array.pieces}
    for name in folded:
        spec, file = logical.specs[name], f"{PREFIX}{name}"
        how = How("scales of the layer's weights folded in", exact=False, bits=0, floats=True)
        derived[file] = Derived(spec.shape, (_array(folded_file(name), spec.shape, "f32"),), Folded(), how)
        pieces[name] = (derived[file].piece(name, file, spec.dtype),)
        held.add(folded_file(name))
    replicas = {name: found for name, found in logical.replicas.items() if name not in wanted and name not in folded}
    return replace(
        logical,
        pieces=pieces,
        derived=derived,
        replicas=replicas,
        held=frozenset(held),
        made=f"{logical.made}\ncalibrated {identity}",
    )


def _array(file: str, shape: Index, dtype: str) -> Array:
    strides = row_major(shape, ITEMSIZE[dtype])
    return Array(shape, dtype, (Piece(file, Region.whole(shape), file, 0, strides, dtype),))


def tasks_of(plan: Plan) -> dict[str, list[int]]:
    """For each tensor that calibration changes, the tasks that need it."""
    needs: list[set[str]] = []
    for copies in plan.copies:
        behind = real_files({copy.file for copy in copies}, plan.source.derived) & plan.source.held
        needs.append({file.removeprefix(PREFIX).rpartition("//")[0] for file in behind})
    found: dict[str, list[int]] = {}
    for task in plan.tasks:
        for name in needs[task.tensor] if task.tensor >= 0 else ():
            found.setdefault(name, []).append(task.index)
    return found


def numbers_of(name: str, chosen: Chosen, recipe: Recipe) -> dict[str, NDArray[np.generic]]:
    """The virtual files of a weight that has been quantised; scales as stored, which they were rounded to before."""
    codes, scales, zeros, groups = parts_of(name)
    found: dict[str, NDArray[np.generic]] = {
        codes: chosen.codes.cpu().numpy(),
        scales: _bits(chosen.scales, recipe.numbers.stored),
    }
    if not recipe.numbers.symmetric:
        found[zeros] = chosen.zeros.cpu().numpy()
    if recipe.listed:
        found[groups] = chosen.groups.cpu().numpy()
    return found


def _bits(values: torch.Tensor, stored: str) -> NDArray[np.generic]:
    """Values in a dtype (torch's name), as numpy holds it: as whole numbers where it has no such dtype."""
    import torch

    made = values.cpu().to(getattr(torch, stored))
    return made.view(torch.int16).numpy() if stored == "bfloat16" else made.numpy()


@dataclass
class Held:
    """What has been chosen and not yet been written, by virtual file."""

    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict[str, Any])

    def reader(self, reader: BoxReader) -> BoxReader:
        """Reads what is held here, and all else with ``reader``."""
        return _HeldReader(self.arrays, reader)


@dataclass
class _HeldReader:
    arrays: dict[str, NDArray[np.generic]]
    reader: BoxReader

    def close(self) -> None:
        self.reader.close()

    def has(self, file: str) -> bool:
        return file in self.arrays or (not file.startswith(PREFIX) and self.reader.has(file))

    def is_sparse(self, file: str) -> bool:
        return not file.startswith(PREFIX) and self.reader.is_sparse(file)

    def is_hole(self, copy: Copy) -> bool:
        return not copy.file.startswith(PREFIX) and self.reader.is_hole(copy)

    def read_box(self, copy: Copy, out: NDArray[np.generic]) -> None:
        if not copy.file.startswith(PREFIX):
            self.reader.read_box(copy, out)
            return
        if (array := self.arrays.get(copy.file)) is None:
            raise Damaged(
                "a quantised weight changed on disk after it was written",
                where=copy.file.removeprefix(PREFIX),
                do="remove the partial output and start over",
            )
        flat = array.reshape(-1).view(out.dtype)[copy.offset // out.dtype.itemsize :]
        out[...] = as_strided(flat, copy.region.shape, copy.strides)
