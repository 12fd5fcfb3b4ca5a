"""What it costs to encode weights, measured: each format's own codec there and back over the boxes of a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import fp8, mx, neuron, nvfp4
from dconv.codec.minifloat import E2M1, E2M3, E3M2, E4M3, E4M3_IEEE, Minifloat, values
from dconv.report import grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK: Final = (128, 128)
#: Tensors that are named as the worst.
_WORST: Final = 5


@dataclass(frozen=True)
class Part:
    """A box of a weight.

    Attributes:
        values: [rows, columns], what it is worth.
        largest: the largest magnitude of its tensor, as far as known.
        columns: of the whole tensor.
        codes, scales: of a weight in e4m3, and what multiplies each; None of all others.
    """

    name: str
    kind: str
    values: NDArray[np.float64]
    largest: float
    columns: int
    codes: NDArray[np.uint8] | None = None
    scales: NDArray[np.float64] | None = None


Again = Callable[[Part], "NDArray[np.float64]"]


@dataclass(frozen=True)
class Encoding:
    """A way to store weights.

    Attributes:
        again: what a part is worth after it.
        group: columns that share a scale, of which a weight has to have whole ones.
        of_codes: whether it is made of e4m3 codes, not of weights.
        by_tensor: whether a scale is the whole tensor's, whose largest magnitude a sample may not have.
        also: the FORMAT that stores such codes, where its name is another.
    """

    name: str
    words: str
    again: Again
    group: int = 1
    of_codes: bool = False
    by_tensor: bool = False
    also: str = ""

    def takes(self, part: Part) -> bool:
        """Whether it can store this part's weight."""
        return not part.columns % self.group and (not self.of_codes or part.codes is not None)


def _fp8(part: Part, *, power_of_two: bool) -> NDArray[np.float64]:
    codes, scale = fp8.encode(part.values.astype(np.float32), _BLOCK, power_of_two=power_of_two)
    return fp8.decode(codes, scale, _BLOCK, "f64").astype(np.float64)


def _fp8_tensor(part: Part) -> NDArray[np.float64]:
    whole, largest = part.values.shape, np.full((1, 1), part.largest, np.float32)
    codes, scale = fp8.encode(part.values.astype(np.float32), (whole[0], whole[1]), largest=largest)
    return fp8.decode(codes, scale, (whole[0], whole[1]), "f64").astype(np.float64)


def _mx(part: Part, *, fmt: Minifloat, rule: mx.Rule) -> NDArray[np.float64]:
    packed, scale = mx.encode(part.values.astype(np.float32), fmt, rule)
    return mx.decode(packed, scale, fmt, "f64").astype(np.float64)


def _nvfp4(part: Part) -> NDArray[np.float64]:
    divisor = nvfp4.global_scale(part.largest)
    packed, scale = nvfp4.encode(part.values.astype(np.float32), divisor)
    return nvfp4.decode(packed, scale, float(divisor), "f64", divides=True).astype(np.float64)


def _neuron(part: Part, *, by: Fraction) -> NDArray[np.float64]:
    if part.codes is None or part.scales is None:
        raise ValueError("weights that are in no codes cannot be recoded")
    made = np.take(values(E4M3_IEEE), neuron.recode(part.codes, by))
    return made * by.numerator / by.denominator * part.scales


def _whole(part: Part, *, symmetric: bool) -> NDArray[np.float64]:
    return grid.nearest(part.values, BITS, GROUP, symmetric=symmetric)


#: Whole numbers as most releases have them.
BITS, GROUP = 4, 128
#: MX formats, and the rule that `dconv.quantise.VARIANTS` have for each where none is asked for.
MICRO: Final[Mapping[str, tuple[Minifloat, mx.Rule]]] = {
    "mxfp8": (E4M3, "even"),
    "mxfp6_e2m3": (E2M3, "floor"),
    "mxfp6_e3m2": (E3M2, "floor"),
    "mxfp4": (E2M1, "floor"),
}


def encodings(rule: mx.Rule | None = None) -> tuple[Encoding, ...]:
    """What weights could be stored as.

    Args:
        rule: of all MX formats; None is each one's own.
    """
    return (
        Encoding("fp8_block", "e4m3, scale by 128 x 128", partial(_fp8, power_of_two=False)),
        Encoding("fp8_block ue8m0", "its scale a power of two", partial(_fp8, power_of_two=True)),
        Encoding("fp8_tensor", "e4m3, scale by tensor", _fp8_tensor, by_tensor=True),
        *(
            Encoding(name, f"{fmt.name}, power of two by 32", partial(_mx, fmt=fmt, rule=rule or own), mx.BLOCK)
            for name, (fmt, own) in MICRO.items()
        ),
        Encoding("nvfp4", "e2m1, e4m3 scale by 16", _nvfp4, nvfp4.BLOCK, by_tensor=True),
        Encoding("int4", f"symmetric, scale by {GROUP}", partial(_whole, symmetric=True), GROUP, also="gptq"),
        Encoding("int4 zeros", f"zero points, scale by {GROUP}", partial(_whole, symmetric=False), GROUP, also="awq"),
        Encoding("neuron / 2", "codes / 2, scales x 2", partial(_neuron, by=neuron.HALVED), of_codes=True),
        Encoding("neuron / (448/240)", "codes / 1.867, rounded", partial(_neuron, by=neuron.FITTED), of_codes=True),
    )


@dataclass
class Loss:
    """What an encoding lost of some weights.

    Attributes:
        weights: finite ones that were measured; ``zeroed`` of them that were not zero and became it; ``changed`` at
            all; ``broken`` ones that became infinite or no number.
        squares, errors: sums of squares of the weights, and of how far each moved.
        largest: how far one moved at most, and ``where``: of which tensor.
    """

    weights: int = 0
    zeroed: int = 0
    changed: int = 0
    broken: int = 0
    squares: float = 0.0
    errors: float = 0.0
    largest: float = 0.0
    where: str = ""

    @property
    def relative(self) -> float:
        """The Frobenius norm of the error by that of the weights."""
        return sqrt(self.errors / self.squares) if self.squares else 0.0

    def take(self, name: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> None:
        """Count these weights, too."""
        finite = np.isfinite(before)
        good = finite & np.isfinite(after)
        before, after = before[good], after[good]
        moved = np.abs(after - before)
        self.weights += before.size
        self.broken += int(finite.sum()) - before.size
        self.zeroed += int(((after == 0) & (before != 0)).sum())
        self.changed += int(np.count_nonzero(moved))
        self.squares += float(np.vdot(before, before))
        self.errors += float(np.vdot(moved, moved))
        most = float(moved.max(initial=0))
        if most > self.largest:
            self.largest, self.where = most, name

    def add(self, other: Loss) -> None:
        """Count what another has counted."""
        for key in ("weights", "zeroed", "changed", "broken", "squares", "errors"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        if other.largest > self.largest:
            self.largest, self.where = other.largest, other.where

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        counts = {key: getattr(self, key) for key in ("weights", "changed", "zeroed", "broken")}
        return {"relative_error": self.relative, "largest_error": self.largest, "where": self.where, **counts}


@dataclass
class Cost:
    """What an encoding costs a sample, together, by class of modules and by tensor.

    Attributes:
        left_out: tensors whose columns are no whole groups.
    """

    encoding: Encoding
    total: Loss = field(default_factory=Loss)
    classes: dict[str, Loss] = field(default_factory=dict[str, Loss])
    tensors: dict[str, Loss] = field(default_factory=dict[str, Loss])
    left_out: set[str] = field(default_factory=set[str])

    def take(self, part: Part) -> None:
        """Encode a part, decode it, and count what was lost."""
        if not self.encoding.takes(part):
            self.left_out.add(part.name)
            return
        with np.errstate(all="ignore"):  # infinity and NaN are counted
            after = self.encoding.again(part)
        found = Loss()
        found.take(part.name, part.values, after)
        kind, tensor = self.classes.setdefault(part.kind, Loss()), self.tensors.setdefault(part.name, Loss())
        for loss in (self.total, kind, tensor):
            loss.add(found)

    def worst(self) -> list[tuple[str, Loss]]:
        """The tensors that lose most of themselves."""
        return sorted(self.tensors.items(), key=lambda one: -one[1].relative)[:_WORST]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "encoding": self.encoding.name,
            "words": self.encoding.words,
            **self.total.to_dict(),
            "classes": {name: loss.to_dict() for name, loss in self.classes.items()},
            "worst": [{"tensor": name, **loss.to_dict()} for name, loss in self.worst()],
            "left_out": len(self.left_out),
        }
