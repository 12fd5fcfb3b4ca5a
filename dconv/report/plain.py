"""The weights of a plain model that could be in codes: as rows whose neighbours would share a scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dconv.coded.encode import linears, stacked
from dconv.coded.places import place_of
from dconv.describe import Described
from dconv.report.sample import Weight
from dconv.sharding.boxes import Plain
from dconv.sharding.derived import Array, Read
from dconv.sharding.region import Region

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def weights_of(model: Described) -> Iterator[Weight]:
    """Linear layers inside the decoder; of a family whose experts are one tensor for all, as FORMAT mx, these alone.

    Raises:
        Refused: there are none.
    """
    of = model.family, model.facts, model.logical
    experts = stacked(*of)
    wanted = experts or linears(*of)
    for name, spec in model.logical.specs.items():
        if name not in wanted:
            continue
        kind, array = place_of(name, spec.file_shape).kind, Array(spec.shape, spec.dtype, model.logical.pieces[name])
        if not experts:
            yield Weight(name, kind, spec.shape, (array,), Plain())
            continue
        # [experts, in, out], or [experts, in, ffn, 2]: of each expert rows of in
        rows = array.in_order((0, *range(2, len(spec.shape)), 1))
        paired = len(spec.shape) == 4
        shape = (spec.shape[0], spec.file_shape[2], spec.shape[1])
        yield Weight(name, kind, shape, (rows,), Paired() if paired else Plain())


@dataclass(frozen=True, slots=True)
class Paired:
    """Rows [..., out, in] of which two neighbours are a pair; input: [..., out / 2, 2, in]."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The box's rows, pairs apart; a row is read together with its neighbour."""
        del factor
        (*lead, top, left), (*count, rows, columns) = box.start, box.shape
        first, last = top // 2, -(-(top + rows) // 2)
        pairs = read(0, Region((*lead, first, 0, left), (*count, last - first, 2, columns)), dtype)
        found = pairs.reshape(*count, 2 * (last - first), columns)
        return found[..., top - 2 * first : top - 2 * first + rows, :]
