"""``inspect --explain``: what a model's scales mean and what its encoding costs, or would cost, in its own numbers.

A few boxes of weights are read (`dconv.report.sample`); what they are told by is in `dconv.report.meanings`, what other
encodings would lose of them in `dconv.report.cost`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec import fp8
from dconv.codec.minifloat import E4M3, values
from dconv.codec.mx import Rule
from dconv.coded.decode import method_of
from dconv.coded.places import place_of
from dconv.describe import Described
from dconv.errors import Refused, UsageError, group_names
from dconv.report import example, plain
from dconv.report.cost import Cost, Encoding, Part, encodings
from dconv.report.meanings import Meaning, meaning_of
from dconv.report.sample import BOX, SEED, Looking, Sample, Weight, draw
from dconv.report.schemes import Scheme, schemes_of
from dconv.report.usage import Usage
from dconv.report.whole import Parts, Whole, followed, parts_of
from dconv.sharding.boxes import HOW
from dconv.sharding.derived import Derived
from dconv.sharding.region import Region

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Scales of one tensor that are read to find its largest weight.
_SCALES: Final = 1 << 16
#: Weights of a block that are.
_AT_ONCE: Final = 1 << 18


@dataclass(frozen=True)
class Explanation:
    """See the module.

    Attributes:
        asked: the scheme that the source is in, or the encoding that was asked about.
        coded: whether the source is in codes; else ``costs`` are what it would be to put it into some.
        tensors: weights in codes, or that would be; ``weights`` is their number of elements.
        kept: the encoding that would keep the source's codes as they are, so that it costs nothing.
        focus: names of the encodings that ``asked`` is about.
        rule: the one that was asked for all MX formats; "" is each one's own.
        sample: what was looked at.
    """

    asked: str
    coded: bool
    tensors: int
    weights: int
    schemes: tuple[Scheme, ...] = ()
    example: example.Example | example.Made | Whole | None = None
    usage: tuple[Usage, ...] = ()
    costs: tuple[Cost, ...] = ()
    kept: str = ""
    focus: tuple[str, ...] = ()
    rule: str = ""
    sample: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "asked": self.asked,
            "coded": self.coded,
            "tensors": self.tensors,
            "weights": self.weights,
            "schemes": [scheme.to_dict() for scheme in self.schemes],
            "example": self.example.to_dict() if self.example else None,
            "usage": [each.to_dict() for each in self.usage],
            "kept": self.kept,
            "scale_rule": self.rule,
            "costs": [cost.to_dict() for cost in self.costs],
            "sample": dict(self.sample),
        }


@dataclass(frozen=True)
class _Codes:
    """Codes of a box, and what multiplies each."""

    meaning: Meaning
    codes: NDArray[np.uint8]
    scales: NDArray[np.float64]


@dataclass(frozen=True)
class _Looked:
    """What was read of a box: its values, and the codes that make them where these have a known meaning."""

    weight: Weight
    region: Region
    values: NDArray[np.float64]
    coded: _Codes | None = None


def explain(model: Described, asked: str, rule: Rule | None = None) -> Explanation:
    """Explain the scheme that a source is in, or what encodings would cost a plain one.

    Args:
        model: the source, described.
        asked: ``quant_method`` of the source or a name of what its codes are; of a plain source, an encoding or what
            some begin with (``fp8``); "" is whatever the source is in.
        rule: of MX scales; None as each format has it by default.

    Raises:
        UsageError: ``asked`` is not what the source is in, or no encoding.
        Refused: the source's weights are none that could be in codes.
        Damaged, StorageFault: weights cannot be read.
    """
    found = _of_codes(model, asked, rule) if model.source.coded else _of_plain(model, asked, rule)
    return replace(found, rule=rule or "")


def _of_plain(model: Described, asked: str, rule: Rule | None) -> Explanation:
    known = [each for each in encodings(rule) if not each.of_codes]
    focus = [each for each in known if asked and (each.also == asked or each.name.startswith(asked))]
    if not focus:
        names = dict.fromkeys(name for each in known for name in (each.name.split()[0], each.also) if name)
        raise UsageError(
            "the weights are in no codes that could be explained" if not asked else f"there is no encoding {asked!r}",
            where="--explain" if not asked else f"--explain {asked:.80}",
            expected=f"what they would be encoded to: fp8, {', '.join(names)}",
        )
    weights = list(plain.weights_of(model))
    looking = Looking(model.logical)
    try:
        sample = draw(weights)
        looked = [_Looked(w, region, _matrix(looking.values(w, region, "f64"))) for w, region in sample.boxes]
    finally:
        looking.close()
    parts = list(_parts(looked, _largest(looked)))
    shown = example.made(parts[0], looked[0].region.start) if parts and focus[0].name.startswith("fp8") else None
    return Explanation(
        asked=asked,
        coded=False,
        tensors=len(weights),
        weights=sum(prod(weight.shape) for weight in weights),
        example=shown,
        costs=_costs(parts, known),
        focus=tuple(each.name for each in focus),
        sample=_said(sample, looking),
    )


def _of_codes(model: Described, asked: str, rule: Rule | None) -> Explanation:
    coded = _coded(model)
    method = method_of(model.source.config or {})
    meanings = {weight.name: meaning_of(derived, model.source.format) for weight, derived in coded}
    wholes = {weight.name: parts_of(derived, model.logical.derived) for weight, derived in coded}
    schemed = {name: known.scheme for name in meanings if (known := meanings[name] or wholes[name])}
    known = [method] * bool(method) + list(schemed.values())
    schemes = list(dict.fromkeys(known))
    if asked and asked not in schemes:
        raise UsageError(
            f"the source's codes are none of {asked!r:.80}",
            where=f"--explain {asked:.80}",
            expected=" or ".join([*(f"--explain {scheme}" for scheme in schemes), "--explain alone"]),
            found="\n".join(dict.fromkeys(model.source.coded.values())),
            do="any of them says what it would lose in other encodings",
        )
    if asked and asked != method:
        coded = [one for one in coded if schemed.get(one[0].name) == asked]
    weights = [weight for weight, _ in coded]
    looking = Looking(model.logical)
    try:
        sample = draw(weights)
        looked = [_look(looking, weight, region, meanings[weight.name]) for weight, region in sample.boxes]
        shown = _example(looking, looked, wholes)
        largest = _largest(looked)
        if not sample.whole:
            for weight in {one.weight.name: one.weight for one in looked}.values():
                if meaning := meanings[weight.name]:
                    largest[weight.name] = max(largest[weight.name], _by_scales(looking, weight, meaning))
    finally:
        looking.close()
    usage = _usage(weights, looked, meanings)
    kept = {meaning.kept if (meaning := meanings[weight.name]) else "" for weight in weights}
    kept_as = kept.pop() if len(kept) == 1 else ""
    others = [each for each in encodings(rule) if each.name != kept_as]
    if not any(one.coded and one.coded.meaning.fmt is E4M3 for one in looked):
        others = [each for each in others if not each.of_codes]
    return Explanation(
        asked=asked or (schemes[0] if schemes else "codes"),
        coded=True,
        tensors=len(weights),
        weights=sum(prod(weight.shape) for weight in weights),
        schemes=tuple(schemes_of(model.source.coded, coded, meanings, wholes)),
        example=shown,
        usage=usage,
        costs=_costs(list(_parts(looked, largest)), others),
        kept=kept_as,
        sample=_said(sample, looking),
    )


def _coded(model: Described) -> list[tuple[Weight, Derived]]:
    """The weights in codes, in the order and under the names of the model; each computed tensor once."""
    found: dict[str, tuple[Weight, Derived]] = {}
    for name in model.logical.specs:
        if name not in model.source.coded:
            continue
        for piece in model.logical.pieces[name]:
            derived = model.logical.derived.get(piece.file)
            if derived is None or piece.file in found:
                continue
            kind, meaning = place_of(name, derived.shape).kind, meaning_of(derived, model.source.format)
            block = meaning.block if meaning else (1, 1)
            found[piece.file] = Weight(name, kind, derived.shape, derived.inputs, derived.recipe, block), derived
    if not found:
        raise Refused("the weights in codes are none of the model's own", where=group_names(model.source.coded))
    return list(found.values())


def _matrix(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1, array.shape[-1])


def _look(looking: Looking, weight: Weight, region: Region, meaning: Meaning | None) -> _Looked:
    if meaning is None:
        return _Looked(weight, region, _matrix(looking.values(weight, region, "f64")))
    codes = _matrix(looking.values(weight, region, "u8", meaning.codes))
    scales = _matrix(looking.values(weight, region, "f64", meaning.scales))
    with np.errstate(all="ignore"):  # infinity and NaN as IEEE says
        return _Looked(weight, region, values(meaning.fmt)[codes] * scales, _Codes(meaning, codes, scales))


def _largest(looked: Iterable[_Looked]) -> dict[str, float]:
    """The largest finite magnitude in each tensor's boxes."""
    found: dict[str, float] = {}
    for one in looked:
        most = _most(one.values)
        found[one.weight.name] = max(found.get(one.weight.name, 0.0), most)
    return found


def _most(array: NDArray[np.float64]) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


def _by_scales(looking: Looking, weight: Weight, meaning: Meaning) -> float:
    """The largest magnitude in the block that has the largest scale; 0 where that is too much to read.

    It is the tensor's largest wherever scales are made of the largest weights of their blocks.
    """
    if meaning.grid is None or not 1 < prod(meaning.blocks) <= _SCALES:
        return 0.0
    grid = Derived(meaning.blocks, weight.inputs, meaning.grid, HOW)
    scales = looking.made(grid, Region.whole(meaning.blocks), "f64")
    at = np.unravel_index(int(np.argmax(np.where(np.isfinite(scales), np.abs(scales), 0))), meaning.blocks)
    sides = (*(1,) * (len(weight.shape) - 2), *meaning.block)
    start = [int(i) * side for i, side in zip(at, sides, strict=True)]
    stop = [min(a + side, n) for a, side, n in zip(start, sides, weight.shape, strict=True)]
    start[-1] -= start[-1] % BOX[1]  # with its neighbours: a short run of each row takes no less reading
    stop[-1] = min(max(stop[-1], start[-1] + BOX[1]), weight.shape[-1])
    shape = tuple(b - a for a, b in zip(start, stop, strict=True))
    if prod(shape) > _AT_ONCE:
        return 0.0
    return _most(_look(looking, weight, Region(tuple(start), shape), meaning).values)


def _usage(
    weights: Sequence[Weight], looked: Sequence[_Looked], meanings: Mapping[str, Meaning | None]
) -> tuple[Usage, ...]:
    """The codes by class of modules, each format by itself."""
    found: dict[tuple[str, str], Usage] = {}
    for weight in weights:
        if meaning := meanings[weight.name]:
            key = weight.kind, meaning.fmt.name
            found.setdefault(key, Usage(weight.kind, meaning.fmt)).tensors += 1
    for one in looked:
        if one.coded:
            meaning = one.coded.meaning
            largest = fp8.amax(values(meaning.fmt)[one.coded.codes].astype(np.float32), meaning.block)
            found[one.weight.kind, meaning.fmt.name].take(one.weight.name, one.coded.codes, one.coded.scales, largest)
    return tuple(found.values())


def _example(
    looking: Looking, looked: Sequence[_Looked], wholes: Mapping[str, Parts | None]
) -> example.Example | Whole | None:
    for one in looked:
        found, whole = None, wholes[one.weight.name]
        if one.coded:
            names = tuple(array.pieces[0].tensor for array in one.weight.inputs)
            found = example.stored(one.coded.meaning, names, one.region, one.coded.codes, one.coded.scales)
        elif whole:
            found = followed(looking, one.weight.name, whole, one.region, one.values)
        if found:
            return found
    return None


def _parts(looked: Iterable[_Looked], largest: Mapping[str, float]) -> Iterable[Part]:
    for one in looked:
        name, columns = one.weight.name, one.weight.shape[-1]
        known = one.coded if one.coded and one.coded.meaning.fmt is E4M3 else None
        codes, scales = (known.codes, known.scales) if known else (None, None)
        yield Part(name, one.weight.kind, one.values, largest[name], columns, codes, scales)


def _costs(parts: Sequence[Part], encodings: Iterable[Encoding]) -> tuple[Cost, ...]:
    costs = tuple(Cost(each) for each in encodings)
    for part in parts:
        for cost in costs:
            cost.take(part)
    return costs


def _said(sample: Sample, looking: Looking) -> dict[str, Any]:
    """What was looked at, for whoever wants to judge the numbers."""
    return {
        "whole": sample.whole,
        "weights": sum(region.volume for _, region in sample.boxes),
        "boxes": len(sample.boxes),
        "tensors": len({weight.name for weight, _ in sample.boxes}),
        "classes": len({weight.kind for weight, _ in sample.boxes}),
        "seed": SEED,
        "bytes_read": looking.read.bytes,
        "reads": looking.read.requests,
    }
