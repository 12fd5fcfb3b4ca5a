"""Weights in whole numbers: where in the stored words a code, its zero point and its scale are, and one by hand.

Codes of GPTQ, AWQ and compressed-tensors mean the same, (code - zero) x scale, but lie otherwise (`dconv.coded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import awq as nibbles
from dconv.codec import bitpack
from dconv.coded import awq, compressed_bytes, compressed_packed, gptq, integers
from dconv.report.sample import Looking
from dconv.sharding.derived import Array, Derived
from dconv.sharding.region import Index, Region

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Weights of a box that are tried: of 3 bits every third code or so straddles two words.
_TRIED: Final = 64
_PRODUCT: Final = "weight = (code - zero) x scale: from a code to the next it is one scale."
_SCALED: Final = "weight = code x scale: from a code to the next it is one scale. There are no zero points."
_LESS_ONE: Final = (
    "A zero point is stored less one, zero = stored + 1: GPTQ's first format (gptq). The second (gptq_v2) stores it as "
    "it is, and a reader that takes one for the other moves every weight by a scale."
)
_AS_IT_IS: Final = (
    "A zero point is stored as it is: GPTQ's second format (gptq_v2). The first (gptq) stores it less one, and a "
    "reader that takes one for the other moves every weight by a scale."
)
_GEMM: Final = (
    "A zero point is stored as it is. From its lowest bits on a word holds outputs "
    f"{', '.join(map(str, nibbles.ORDER))} of its eight, of codes and of zeros."
)
_CHOSEN: Final = (
    "How far the weights were moved is not told by what is stored: calibration does not take the nearest codes, but "
    "those that change least of what a layer computes."
)


@dataclass(frozen=True)
class Numbers:
    """Codes or zero points as they are stored.

    Attributes:
        word: for [row, column or group] the word that holds it and its lowest bit there; None where two words do.
        added: what the stored number is less than what it stands for.
        signed: a byte of its own, with a sign.
    """

    array: Array
    words: str
    word: Callable[[int, int], tuple[Index, int] | None]
    added: int = 0
    signed: bool = False


@dataclass(frozen=True)
class Parts:
    """What a weight [out, in] in whole numbers is made of.

    Attributes:
        zeros: None where there are no zero points: weight = code x scale.
        scale: for [row, group] its place in ``scales``.
        size: columns that share a scale; ``order`` has the group of each where they are in none.
    """

    bits: int
    codes: Numbers
    zeros: Numbers | None
    scales: Array
    scale: Callable[[int, int], Index]
    size: int
    order: Array | None
    sentences: tuple[str, ...]

    @property
    def scheme(self) -> str:
        """What ``--explain`` calls it."""
        return f"int{self.bits}"

    def stored(self) -> Iterable[tuple[Array, str]]:
        """The stored tensors, and what each is."""
        yield self.codes.array, self.codes.words
        yield self.scales, f"scales, one for {self.size} inputs of an output"
        if self.zeros:
            yield self.zeros.array, self.zeros.words
        if self.order:
            yield self.order, "the group of each input, which shares a scale and a zero point"


@dataclass(frozen=True)
class Field:
    """A number among the others of a word.

    Attributes:
        at: of the word; ``low`` is the number's lowest bit in it.
        stored, value: as the bits have it, and what it stands for.
    """

    tensor: str
    at: Index
    word: int
    low: int
    stored: int
    value: int


@dataclass(frozen=True)
class Whole:
    """A weight as it is stored.

    Attributes:
        zero: None where there is none.
        group: that shares the scale; ``listed`` in this tensor where columns are in the order of activations or may be.
        scale_at: in the stored tensor.
        weight: (code - zero) x scale; ``lowest`` and ``highest`` are those of the other codes.
    """

    tensor: str
    index: Index
    bits: int
    code: Field
    zero: Field | None
    group: int
    listed: str
    scale_tensor: str
    scale_at: Index
    scale: float
    weight: float
    lowest: float
    highest: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def parts_of(derived: Derived, made: Mapping[str, Derived]) -> Parts | None:
    """What a weight is made of; None where it is in no whole numbers, or its container is not known.

    Args:
        derived: the weight, and what it is decoded from.
        made: all derived tensors of the source.
    """
    match derived.recipe:
        case integers.Product() as recipe:
            return _product(recipe, derived, made)
        case compressed_bytes.Int8() as recipe:
            return _bytes(recipe, derived)
        case _:
            return None


def followed(looking: Looking, name: str, parts: Parts, region: Region, values: NDArray[np.float64]) -> Whole | None:
    """The first weight of a box that is not zero, and whose code and zero point each lie in one word.

    Args:
        looking: reads boxes of inputs.
        name: the weight's.
        parts: what it is made of.
        region: the box.
        values: what the box is decoded to, which the product has to give.
    """
    for row, column in np.argwhere(np.isfinite(values) & (values != 0))[:_TRIED]:
        at = region.start[-2] + int(row), region.start[-1] + int(column)
        group = at[1] // parts.size if parts.order is None else int(looking.number(parts.order, (at[1],), "i32"))
        code = _field(looking, parts.codes, parts.bits, at[0], at[1])
        zero = _field(looking, parts.zeros, parts.bits, at[0], group) if parts.zeros else None
        if code is None or (parts.zeros and zero is None):
            continue
        place = parts.scale(at[0], group)
        scale = float(looking.number(parts.scales, place, "f64"))
        less = zero.value if zero else 0
        if (code.value - less) * scale != values[row, column]:  # a carry from a neighbour: true, but no example
            continue
        least = parts.codes.added - (1 << (parts.bits - 1)) * parts.codes.signed
        return Whole(
            tensor=name,
            index=at,
            bits=parts.bits,
            code=code,
            zero=zero,
            group=group,
            listed=_name(parts.order) if parts.order else "",
            scale_tensor=_name(parts.scales),
            scale_at=place,
            scale=scale,
            weight=(code.value - less) * scale,
            lowest=(least - less) * scale,
            highest=(least + (1 << parts.bits) - 1 - less) * scale,
        )
    return None


def _field(looking: Looking, numbers: Numbers, bits: int, row: int, column: int) -> Field | None:
    place = numbers.word(row, column)
    if place is None:
        return None
    at, low = place
    word = int(looking.number(numbers.array, at, numbers.array.dtype))
    stored = word >> low & ((1 << bits) - 1)
    if numbers.signed:
        stored = int(np.uint8(word).view(np.int8))
    return Field(_name(numbers.array), at, word, low, stored, stored + numbers.added)


def _name(array: Array) -> str:
    return array.pieces[0].tensor


def _in_word(bits: int, layout: bitpack.Layout, at: int) -> tuple[int, int] | None:
    """The word and the lowest bit of a packed number; None where two words have it, or planes of bits."""
    if 32 % bits and layout == "planar":
        return None
    per = 32 // bits
    word, low = divmod(at * bits, 32) if layout == "stream" else (at // per, at % per * bits)
    return (word, low) if low + bits <= 32 else None


def _along(bits: int, layout: bitpack.Layout, *, first: bool, packed: int) -> Callable[[int, int], Any]:
    """`Numbers.word` of numbers packed along rows (``packed`` 0) or columns (1), words being the ``first`` axis."""

    def word(row: int, column: int) -> tuple[Index, int] | None:
        found = _in_word(bits, layout, (row, column)[packed])
        other = (column, row)[packed]
        return found and ((found[0], other) if first else (other, found[0]), found[1])

    return word


def _counted(bits: int, layout: bitpack.Layout) -> str:
    codes, words = bitpack.period(bits, layout)
    return f"{codes} in {'a word' if words == 1 else f'{words} words'}"


def _product(recipe: integers.Product, derived: Derived, made: Mapping[str, Derived]) -> Parts | None:
    codes, scales, *more = derived.inputs
    packed = made[codes.pieces[0].file]
    zeros = made[more.pop(0).pieces[0].file] if recipe.zero is None else None
    match packed.recipe, zeros and zeros.recipe:
        case gptq.Codes(bits=bits, layout=layout), gptq.Zeros(version=version) if zeros:
            less = version == "v1"
            counted = _counted(bits, layout)
            of = Numbers(
                packed.inputs[0],
                f"codes of {bits} bits, {counted} along the inputs",
                _along(bits, layout, first=True, packed=1),
            )
            points = Numbers(
                zeros.inputs[0],
                f"zero points of {bits} bits, {counted} along the outputs{', each stored less one' * less}",
                _along(bits, layout, first=False, packed=0),
                added=int(less),
            )
            told = _LESS_ONE if less else _AS_IT_IS
        case awq.Numbers(), awq.Numbers() if zeros:
            bits = awq.BITS
            counted = f"of {bits} bits, {awq.PER_WORD} in a word along the outputs"
            of = Numbers(packed.inputs[0], f"codes {counted}", _interleaved)
            points = Numbers(zeros.inputs[0], f"zero points {counted}", _interleaved)
            told = _GEMM
        case compressed_packed.Codes(bits=bits, layout=layout), None | compressed_packed.Zeros():
            of, points, told = _signed(bits, layout, packed.inputs[0], zeros and zeros.inputs[0])
        case _:
            return None
    every = made.get(scales.pieces[0].file)
    turned = isinstance(packed.recipe, gptq.Codes | awq.Numbers)
    return Parts(
        bits=bits,
        codes=of,
        zeros=points,
        scales=every.inputs[0] if every else scales.in_order((1, 0)) if turned else scales,
        scale=lambda row, group: (0, 0) if every else (group, row) if turned else (row, group),
        size=recipe.grid.size(recipe.columns),
        order=made[more[0].pieces[0].file].inputs[0] if recipe.listed else None,
        sentences=(_PRODUCT if points else _SCALED, told, _CHOSEN),
    )


def _signed(
    bits: int, layout: bitpack.Layout, codes: Array, zeros: Array | None
) -> tuple[Numbers, Numbers | None, str]:
    """Codes and zero points of pack-quantized, and what is to be said of them."""
    counted, middle = _counted(bits, layout), 1 << (bits - 1)
    of = Numbers(
        codes,
        f"codes of {bits} bits, {counted} along the inputs",
        _along(bits, layout, first=False, packed=1),
        added=-middle,
    )
    points = Numbers(
        zeros,
        f"zero points of {bits} bits, {counted} along the outputs",
        _along(bits, layout, first=True, packed=0),
        added=-middle,
    ) if zeros else None  # fmt: skip
    raised = f"A code is signed, {-middle} to {middle - 1}, and stored raised by {middle}"
    return of, points, raised + ("; so is a zero point." if zeros else ".")


def _interleaved(row: int, column: int) -> tuple[Index, int]:
    return (column, row // awq.PER_WORD), awq.BITS * nibbles.ORDER.index(row % awq.PER_WORD)


def _bytes(recipe: compressed_bytes.Int8, derived: Derived) -> Parts:
    m, n = recipe.block
    codes, scales, *zeros = derived.inputs
    signed = "a byte with a sign for each"
    return Parts(
        bits=8,
        codes=Numbers(codes, f"codes, {signed}", lambda row, column: ((row, column), 0), signed=True),
        zeros=Numbers(zeros[0], f"zero points, {signed}", lambda row, group: ((row // m, group), 0), signed=True)
        if zeros
        else None,
        scales=scales,
        scale=lambda row, group: (row // m, group),
        size=n,
        order=None,
        sentences=(_PRODUCT if zeros else _SCALED, _CHOSEN),
    )
