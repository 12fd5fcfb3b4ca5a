"""What the parts of a weight in codes mean: which number is which code, what scales it, and how a person is told.

A scheme's recipe (`dconv.coded`) is one case of `meaning_of`. A weight whose recipe is none of them is still explained
by its parts and by what it decodes to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import e8m0, nvfp4
from dconv.codec import mx as micro
from dconv.codec.minifloat import E2M1, E4M3, E4M3_IEEE, E5M2, Minifloat, nearest, values
from dconv.codec.pack import pack
from dconv.coded import compressed_floats, fp8, mx
from dconv.sharding.derived import Derived, Read, Recipe
from dconv.sharding.region import Index, Region

if TYPE_CHECKING:
    from numpy.typing import NDArray


Units = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Meaning:
    """What a weight's codes mean.

    Attributes:
        scheme: what ``--explain`` calls it; every quantised source has its ``quant_method`` for a name as well.
        fmt: what a code is worth.
        block: rows and columns that share a scale.
        divides: the stored scale divides; else it multiplies.
        codes: computes the codes of a box, one a byte, from the weight's own inputs.
        scales: computes what multiplies each of them, in fp64.
        grid: computes what multiplies, for a box of the stored scales, of shape ``blocks``; None where they are many.
        block_of: an element's place in the stored scales.
        parts: for each input, what it is.
        sentences: what must not be got wrong.
        kept: the encoding (`dconv.report.cost.encodings`) in which dconv would write these very codes; "" if none.
    """

    scheme: str
    fmt: Minifloat
    block: tuple[int, int]
    divides: bool
    codes: Recipe
    scales: Recipe
    grid: Recipe | None
    blocks: Index
    block_of: Callable[[Index], Index]
    parts: tuple[str, ...]
    sentences: tuple[str, ...]
    kept: str = ""


def meaning_of(derived: Derived, container: str) -> Meaning | None:
    """The meaning of a decoded weight's inputs; None where only its values are known.

    Args:
        derived: the weight, and what it is decoded from.
        container: what the source is (`dconv.checkpoint.source.Source.format`).
    """
    match derived.recipe:
        case fp8.Decode() as recipe:
            found = _fp8(recipe, derived)
            return _neuron(found) if container == "neuron" else found
        case mx.Decode(fmt=fmt) as recipe:
            return _micro(recipe, fmt, derived)
        case compressed_floats.Mx(bits=bits) as recipe:
            return _micro(recipe, compressed_floats.FORMATS[bits], derived)
        case compressed_floats.Nv() as recipe:
            return _nvfp4(recipe, derived, recipe.divides)
        case _:
            return None


def of_block(block: tuple[int, int], shape: Index) -> str:
    """What shares a scale: ``tensor``, ``row`` or ``128 x 128 block``."""
    if block == tuple(shape[-2:]):
        return "tensor"
    return "row" if block == (1, shape[-1]) else f"{block[0]} x {block[1]} block"


@dataclass(frozen=True, slots=True)
class Codes:
    """The stored codes as bytes; inputs: codes, one a byte."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The box's codes as they are stored, a byte each."""
        del dtype, factor
        return read(0, box, "").view("u1")


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The codes that several share bytes: what a recipe makes of them with scales that are all 1.

    Attributes:
        units: for each input after the codes, how it is held and the bytes of 1.
    """

    recipe: Recipe
    fmt: Minifloat
    units: Units

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The box's codes, one a byte, found by what each is worth where all scales are 1."""
        del dtype

        def units(number: int, region: Region, wanted: str) -> NDArray[Any]:
            if not number:
                return read(number, region, wanted)
            kind, one = self.units[number - 1]
            return _full(region, one, kind)

        return nearest(self.fmt, self.recipe(box, "f32", factor, units).view(np.float32), saturate=False)


@dataclass(frozen=True, slots=True)
class OfOnes:
    """What a recipe makes of codes that are all 1: what multiplies each.

    Attributes:
        ones: the bytes of one or several codes of 1.
    """

    recipe: Recipe
    ones: bytes

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """What multiplies each code's value, of the box's shape."""

        def ones(number: int, region: Region, wanted: str) -> NDArray[Any]:
            return read(number, region, wanted) if number else _full(region, self.ones)

        return self.recipe(box, dtype, factor, ones)


def _full(region: Region, pattern: bytes, kind: str = "u1") -> NDArray[Any]:
    """Values of a region, repeated along its last axis."""
    values = np.resize(np.frombuffer(pattern, kind), region.shape[-1:])
    return np.array(np.broadcast_to(values, region.shape))


@dataclass(frozen=True, slots=True)
class Grid:
    """What multiplies, a scale of FP8 at a time; inputs: codes, scales."""

    recipe: fp8.Decode
    ones: bytes

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """What multiplies each code's value, of the box's shape."""
        each = fp8.Decode((1, 1), self.recipe.dtype, self.recipe.reciprocal)
        return OfOnes(each, self.ones)(box, dtype, factor, read)


_FP8: Final = {"f8_e4m3": E4M3, "f8_e5m2": E5M2}
#: dtype of the scales -> the encoding.
_KEPT: Final = {"f32": "fp8_block", "f8_e8m0": "fp8_block ue8m0"}
_MULTIPLIES: Final = "The scale multiplies: weight = code x scale."
_INVERSE: Final = (
    "The scale multiplies: weight = code x scale. weight_scale_inv is the inverse of what the weight was multiplied by "
    "when it was encoded, and no reciprocal to divide by. GPTQModel's FP8 has that under the same name."
)
_NEURON: Final = (
    "The scale multiplies: weight = code x scale. These are the names that Neuron's are read as; its own are .weight "
    "and .scale, and a layer's experts are one tensor."
)
_POWERS: Final = "The scale multiplies, weight = code x scale, and is a power of two: 2^(byte - 127), 255 for NaN."
_TWO_SCALES: Final = (
    "weight = code x scale / global scale: the scale of a group multiplies, weight_global_scale divides. A scale shown "
    "below is the quotient of both."
)
_BOTH_MULTIPLY: Final = (
    "weight = code x scale x weight_scale_2: both multiply. ModelOpt's weight_scale_2 is the reciprocal of "
    "compressed-tensors' weight_global_scale. A scale shown below is the product of both."
)
_DIVIDES: Final = (
    "The scale divides: weight = code / scale. config.json says that GPTQModel wrote it, whose weight_scale_inv is the "
    "reciprocal of everyone else's; a reader that multiplies makes noise of this model."
)


def _fp8(recipe: fp8.Decode, derived: Derived) -> Meaning:
    m, n = recipe.block
    scale = derived.inputs[1]
    fmt, kind, name = _FP8[recipe.dtype], scale.dtype, scale.pieces[0].tensor
    ones = _one(fmt)
    powers = " as a power of two, a byte of exponent (E8M0)" if kind in ("f8_e8m0", "u8") else ""
    own = of_block(recipe.block, derived.shape)
    sentence = _DIVIDES if recipe.reciprocal else _INVERSE if name.endswith(fp8.SUFFIX) else _MULTIPLIES
    return Meaning(
        scheme="mxfp8" if powers and recipe.block == (1, micro.BLOCK) else "fp8",
        fmt=fmt,
        block=recipe.block,
        divides=recipe.reciprocal,
        codes=Codes(),
        scales=OfOnes(recipe, ones),
        grid=Grid(recipe, ones),
        blocks=scale.shape,
        block_of=lambda at: (*at[:-2], at[-2] // m, at[-1] // n),
        parts=(f"codes in {fmt.name}, one for each weight", f"scales, one for each {own}{powers}"),
        sentences=(sentence,),
        kept=_KEPT.get(kind, "") if recipe == fp8.Decode((128, 128), fp8.FP8) else "",
    )


def _one(fmt: Minifloat, count: int = 1) -> bytes:
    """The bytes of codes that are 1."""
    code = np.flatnonzero(values(fmt) == 1)[:1].astype(np.uint8)
    return code.tobytes() if fmt.bits == 8 else pack(np.repeat(code, count), fmt.bits).tobytes()


def _groups(scheme: str, recipe: Recipe, fmt: Minifloat, derived: Derived, size: int, units: Units) -> Meaning:
    """Codes that may share bytes, with a scale for so many neighbours along the last axis."""
    return Meaning(
        scheme=scheme,
        fmt=fmt,
        block=(1, size),
        divides=False,
        codes=Unpacked(recipe, fmt, units),
        scales=OfOnes(recipe, _one(fmt, size)),
        grid=None,
        blocks=derived.inputs[1].shape,
        block_of=lambda at: (*at[:-1], at[-1] // size),
        parts=(),
        sentences=(),
    )


def _micro(recipe: Recipe, fmt: Minifloat, derived: Derived) -> Meaning:
    scheme = {4: "mxfp4", 6: f"mxfp6_{fmt.name}", 8: "mxfp8"}[fmt.bits]
    exponents = f"scales, a byte of exponent (E8M0) for each {micro.BLOCK} neighbours"
    return replace(
        _groups(scheme, recipe, fmt, derived, micro.BLOCK, (("u1", bytes([e8m0.BIAS])),)),
        parts=(_packed(fmt), exponents),
        sentences=(_POWERS,),
    )


def _nvfp4(recipe: Recipe, derived: Derived, divides: bool) -> Meaning:
    units = (("u1", _one(E4M3)), ("<f4", np.float32(1).tobytes()))
    return replace(
        _groups("nvfp4", recipe, E2M1, derived, nvfp4.BLOCK, units),
        parts=(
            _packed(E2M1),
            f"scales in {E4M3.name}, one for each {nvfp4.BLOCK} neighbours",
            f"what {'divides' if divides else 'multiplies'} all of them",
        ),
        sentences=(_TWO_SCALES if divides else _BOTH_MULTIPLY,),
    )


def _packed(fmt: Minifloat) -> str:
    return f"codes in {fmt.name}, of {fmt.bits} bits, packed into bytes"


def _neuron(as_read: Meaning) -> Meaning:
    """The same for a directory of Neuron's names, which is read as HuggingFace's: below 240 its codes are the same."""
    codes, *scales = as_read.parts
    return replace(
        as_read,
        scheme="neuron",
        fmt=E4M3_IEEE,
        parts=(codes.replace(E4M3.name, f"Neuron's e4m3, which ends at {E4M3_IEEE.largest:g}"), *scales),
        sentences=(_NEURON,),
        kept="",
    )
