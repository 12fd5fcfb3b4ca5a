"""FP8 as released models store it: which scale belongs to which weight, and the weights that both make.

A weight ``X`` in e4m3 (or e5m2) has its scales under ``X_scale_inv``, one for each block, edges included: the weight is
code × scale. Sources: ``FP8Linear`` in transformers' ``integrations/finegrained_fp8.py``; DeepSeek-V3's
``inference/kernel.py``, ``weight_dequant``. GPTQModel's FP8 (``nn_modules/qlinear/fp8.py`` of 7.7) has the reciprocal
under the same name, for a row as a rule; ``weight_scale_method`` tells it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Final

from dconv.codec import fp8
from dconv.codec.minifloat import E4M3, E5M2
from dconv.coded.decoded import Decoded, dense
from dconv.coded.pairs import pairs_of
from dconv.errors import Damaged, Refused
from dconv.sharding.derived import Read
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.parsed import is_list, mapping_or_empty
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUFFIX: Final = "_scale_inv"
FP8: Final = "f8_e4m3"
_FORMATS: Final = {FP8: E4M3, "f8_e5m2": E5M2}
_BLOCK: Final = (128, 128)
#: What transformers calls the weights' own scale of activations; a dense weight has no use for it.
_ACTIVATIONS: Final = (".activation_scale", ".input_scale", "_activation_scale")
#: GPTQModel's key for what a scale is of.
_METHOD: Final = "weight_scale_method"
#: E8M0 under the name of ``weight_scale_inv`` is MXFP8: one scale for so many columns of a row.
_MX: Final = 32


def said_in(config: Mapping[str, object] | None) -> Mapping[str, object]:
    """``quantization_config`` of a config.json."""
    return mapping_or_empty(config.get("quantization_config") if config else None)


def block_of(config: Mapping[str, object] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the config says that all of a tensor do.

    Raises:
        Damaged: ``weight_block_size`` is no pair of positive whole numbers.
    """
    said = said_in(config)
    if said.get(_METHOD) in ("row", "tensor"):
        return None
    if "weight_block_size" not in said:
        return _BLOCK
    size = said["weight_block_size"]
    if size is None:
        return None
    if not is_list(size) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise Damaged(
            "weight_block_size is no pair of positive whole numbers",
            where="config.json: quantization_config.weight_block_size",
            found=f"{size!r:.80}",
        )
    return size[0], size[1]


def decode(found: Decoded, config: Mapping[str, object], dtype: str) -> None:
    """Decode every FP8 weight of a source, each proved to have its scales, and every scale its weight.

    Raises:
        Damaged: a weight without its scale, a scale without its weight, or one of another shape than the blocks make.
        Refused: a meaning of the scales that is not known.
    """
    tensors, block, reciprocal = found.tensors, block_of(config), _divides(config)
    for name in pairs_of(tensors, ("", SUFFIX), "FP8", _FORMATS):
        weight, scale = tensors[name], tensors[name + SUFFIX]
        size = _block(weight, scale, block)
        recipe = Decode(size, weight.spec.dtype, reciprocal)
        meaning = "its block's reciprocal scale" if reciprocal else "the scale"
        words = f"{weight.spec.dtype} code {'/' if reciprocal else 'x'} {meaning} of {_words(size, weight.spec.shape)}"
        bits = 8 if size == weight.spec.shape[-2:] else 8 + 8 * ITEMSIZE[scale.spec.dtype] / prod(size)
        parts = {name: weight, name + SUFFIX: as_grid(scale, len(weight.spec.shape))}
        found.put(name, dtype, parts, dense(weight.spec.shape, parts, recipe, words, bits), words)
    for name in [name for name in tensors if name.endswith(_ACTIVATIONS)]:
        del tensors[name]
        found.left_out[name] = "a scale of activations, which dense weights have no use for"


@dataclass(frozen=True, slots=True)
class Decode:
    """code × scale (`dconv.codec.fp8.decode`); inputs: codes, scales."""

    block: tuple[int, int]
    dtype: str
    reciprocal: bool = False

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """Decode the codes of the box, with the scales of the blocks that it touches."""
        (row0, rows), (col0, columns) = zip(box.start[-2:], box.shape[-2:], strict=True)
        m, n = self.block
        touched = Region(
            (*box.start[:-2], row0 // m, col0 // n),
            (*box.shape[:-2], -(-(row0 + rows) // m) - row0 // m, -(-(col0 + columns) // n) - col0 // n),
        )
        return fp8.decode(
            read(0, box, "").view("u1"),
            read(1, touched, ""),
            self.block,
            dtype,
            fmt=_FORMATS[self.dtype],
            factor=factor,
            row0=row0 % m,
            col0=col0 % n,
            reciprocal=self.reciprocal,
        )


def _divides(config: Mapping[str, object]) -> bool:
    """Whether scales are stored as reciprocals: 448 / absmax, GPTQModel's only meaning."""
    said = said_in(config)
    meaning = said.get("weight_scale_semantics")
    if meaning is None:
        return _METHOD in said
    if meaning == "inverse":
        return True
    raise Refused(
        "the config gives the FP8 scales a meaning that is not known, nothing was written",
        where="config.json: quantization_config.weight_scale_semantics",
        found=f"{meaning!r:.80}",
        expected="inverse (GPTQModel's), or no such key",
    )


def _block(weight: Stored, scale: Stored, said: tuple[int, int] | None) -> tuple[int, int]:
    """The block of a weight, which the shape of its scales must bear out.

    Raises:
        Damaged: it does not.
    """
    shape, have = weight.spec.shape, scale.spec.shape
    if len(shape) >= 2 and scale.spec.dtype in ("f32", "bf16", "f16", "f8_e8m0", "u8"):
        if said is None and have in ((), (1,)):
            return shape[-2], shape[-1]
        if said is None and have in (shape[:-1], (*shape[:-1], 1)):
            return 1, shape[-1]
        bytes_of_exponents = scale.spec.dtype in ("f8_e8m0", "u8")
        for block in (said, (1, _MX) if bytes_of_exponents else None, (1, shape[-1])):
            if block and have == scales_shape(shape, block):
                return block
    expected = str(scales_shape(shape, said)) if said and len(shape) >= 2 else "one scale"
    raise Damaged(
        "scales of another shape than their weight's blocks make",
        where=f"{weight.spec.name}{SUFFIX} in {scale.extents[0].file}",
        expected=f"{expected} for a weight of {shape}",
        found=f"{scale.spec.dtype}{list(have)}",
        do="weight_block_size in config.json belongs to another model",
    )


def as_grid(scale: Stored, axes: int = 2) -> Stored:
    """Scales of rows, or the only one of a tensor, with as many axes as the weight has: one for each block."""
    shape, (extent,) = scale.spec.shape, scale.extents
    if len(shape) == axes:
        return scale
    grid = (*shape, 1) if len(shape) == axes - 1 else (1,) * axes
    strides = (*extent.strides, 0) if len(shape) == axes - 1 else (0,) * axes
    return Stored(replace(scale.spec, shape=grid), (replace(extent, region=Region.whole(grid), strides=strides),))


def scales_shape(shape: Index, block: tuple[int, int]) -> Index:
    """The shape of the scales of a weight [..., out, in]: one for each block, those at the edges among them."""
    return (*shape[:-2], *(-(-n // step) for n, step in zip(shape[-2:], block, strict=True)))


def _words(block: tuple[int, int], shape: Index) -> str:
    if block == tuple(shape[-2:]):
        return "its tensor"
    return "its row" if block == (1, shape[-1]) else f"its {block[0]} x {block[1]} block"
