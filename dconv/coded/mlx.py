"""MLX's affine codes, decoded: ``weight`` (words of 32 bits), ``scales`` and ``biases`` of one module.

How many bits a code and columns a group has follows from the shapes of the three and of the weight, as mlx-lm has it
(``infer_quant_config``). Codes are packed along the columns, the first in a word's lowest bits, those
of 3, 5 and 6 bits across words. Source: MLX 0.32.4, ``mlx/ops.cpp``; mlx-lm 0.32.2, ``utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dconv.codec import affine, bitpack
from dconv.coded.decoded import Decoded, dense
from dconv.errors import Damaged, Refused
from dconv.sharding.derived import Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.parsed import is_mapping, mapping_or_empty
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEY: Final = "quantization"
_MODE: Final = "affine"


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes of so many bits, of which ``group`` columns share a scale and a bias."""

    bits: int
    group: int

    @property
    def words(self) -> str:
        """How reports call it."""
        return f"MLX int{self.bits} code x the scale of its {self.group} columns + their bias"


@dataclass(frozen=True, slots=True)
class Decode:
    """Weights [..., columns]; inputs: words, scales, biases."""

    grid: Grid
    stored: str

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the whole groups that the box touches, and cut it out."""
        bits, group = self.grid.bits, self.grid.group
        first = box.start[-1] // group
        count = -(-(box.start[-1] + box.shape[-1]) // group) - first
        each = group * bits // 32

        def part(number: int, at: int, width: int) -> NDArray[np.generic]:
            return read(number, Region((*box.start[:-1], at), (*box.shape[:-1], width)), "")

        codes = bitpack.unpack(part(0, first * each, count * each), bits, count * group)
        scales, biases = part(1, first, count), part(2, first, count)
        found = affine.decode(codes, scales, biases, source=self.stored, target=dtype, factor=factor)
        begin = box.start[-1] - first * group
        return found[..., begin : begin + box.shape[-1]]


def decode(found: Decoded, config: Mapping[str, Any], shapes: Mapping[str, Index]) -> None:
    """Replace what is in MLX's codes by the weights that they make.

    Args:
        found: the stored tensors; weights take the place of their parts.
        config: config.json, whose ``quantization`` may name modules.
        shapes: of the weights, by name: the shapes of the parts alone do not tell bits from columns.

    Raises:
        Refused: another mode than affine.
        Damaged: parts that are missing or do not fit each other or the config.
    """
    said = mapping_or_empty(config.get(KEY))
    for name in [name for name in found.tensors if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        stored = {f"{module}.{part}": found.tensors.get(f"{module}.{part}") for part in ("weight", "scales", "biases")}
        there = {part: tensor for part, tensor in stored.items() if tensor is not None}
        own = said.get(module)
        mode = (own if is_mapping(own) else said).get("mode", _MODE)
        if mode != _MODE or there[name].spec.dtype == "u8":
            raise Refused(
                "MLX codes of a mode that this version does not decode, nothing was written",
                where=module,
                expected=_MODE,
                found=str(mode) if mode != _MODE else "scales of a byte",
                do="mlx_lm.convert --dequantize makes plain weights of them",
            )
        if len(there) < len(stored):
            raise Damaged(
                "a part of a weight in MLX's codes is missing",
                where=module,
                expected=", ".join(stored),
                found=", ".join(there),
                do="fetch the files again",
            )
        shape = shapes.get(f"{module}.weight", ())
        grid = _grid(module, there, shape, own)
        dtype = there[name].spec.dtype
        bits = grid.bits + 16 * ITEMSIZE[dtype] / grid.group
        found.put(
            f"{module}.weight", dtype, there, dense(shape, there, Decode(grid, dtype), grid.words, bits), grid.words
        )


def _grid(module: str, parts: Mapping[str, Stored], shape: Index, own: object) -> Grid:
    """The grid of a module whose weight has this shape.

    Raises:
        Damaged: parts that do not make such a weight, or not by the grid that the config gives.
    """
    words, scales, biases = (tensor.spec for tensor in parts.values())
    columns = shape[-1] if shape else 0
    group = columns // scales.shape[-1] if scales.shape and scales.shape[-1] else 0
    grid = Grid(32 * words.shape[-1] // columns if columns and words.shape else 0, group)
    lead = shape[:-1]
    fits = grid.bits in affine.BITS and grid.group in affine.GROUPS
    fits = fits and words.shape == (*lead, columns * grid.bits // 32) and words.dtype == "u32"
    fits = fits and scales.shape == biases.shape == (*lead, columns // grid.group)
    fits = fits and scales.dtype == biases.dtype and scales.dtype in ("f32", "f16", "bf16")
    if is_mapping(own):
        fits = fits and (grid.bits, grid.group) == (own.get("bits"), own.get("group_size"))
    if not fits:
        raise Damaged(
            "the parts of a weight in MLX's codes do not make it",
            where=module,
            expected=f"{list(shape) or 'a matrix'} in u32 words of 2, 3, 4, 5, 6 or 8 bits, scales and biases in one "
            f"dtype for groups of 32, 64 or 128 columns{f', {own!r:.80} by the config' if own else ''}",
            found=", ".join(f"{spec.dtype}{list(spec.shape)}" for spec in (words, scales, biases)),
            do="the config belongs to other files, or fetch them again",
        )
    return grid
