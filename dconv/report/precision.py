"""The precision report: in which dtype each class of modules is, which have scales, and whether the config agrees.

A model's tensors are gathered in cells, one for a layer and a class of modules: the experts of a layer are one, so that
a report of 90 000 tensors has a thousand of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dconv.checkpoint.source import Source
from dconv.coded import compressed_config, modelopt_config, quark
from dconv.coded.fp8 import FP8, SUFFIX
from dconv.coded.listing import Listing, listing_of, right_list
from dconv.coded.places import Place, place_of
from dconv.errors import group_names
from dconv.report import statistics
from dconv.report.blocks import Blocks, blocks_of
from dconv.report.faults import Facts, Fault, faults_of, values
from dconv.report.statistics import Statistics
from dconv.sharding.parsed import mapping_or_empty
from dconv.sharding.tensor import Logical, Stored, TensorSpec

#: Ends the name of a code in a scheme's words: ``int4 code x the scale of its 128 columns``.
_CODE: Final = re.compile(r" codes?\b")
#: ``quant_method`` of those whose scale of ``X.weight`` is ``X.weight_scale``.
_OTHERS: Final = (compressed_config.METHOD, *modelopt_config.METHODS, quark.METHOD)
SCALED: Final = " with scales"
UNSCALED: Final = " without scales"


@dataclass
class Cell:
    """The tensors of one class in one layer.

    Attributes:
        states: number of tensors by dtype; for FP8, whether they have scales is said behind it.
        shapes: number of tensors by shape.
        scales: counted over all of them; None where there are none.
    """

    stack: str
    layer: int
    kind: str
    role: str
    count: int = 0
    nbytes: int = 0
    states: Counter[str] = field(default_factory=Counter[str])
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter[tuple[int, ...]])
    scales: Statistics | None = None

    @property
    def name(self) -> str:
        """The tensors' name, without ``.weight``."""
        return f"{self.stack}.{self.layer}.{self.kind}" if self.layer >= 0 else self.kind

    def to_dict(self) -> dict[str, Any]:
        """For ``--json`` and the page."""
        scales = self.scales.to_dict() if self.scales else None
        if scales:
            del scales["bins"]
        said = {key: getattr(self, key) for key in ("stack", "layer", "kind", "role", "name", "count")}
        shapes = [[list(shape), n] for shape, n in self.shapes.most_common(4)]
        return {**said, "bytes": self.nbytes, "states": dict(self.states), "shapes": shapes, "scales": scales}


@dataclass(frozen=True)
class Class:
    """All tensors of one class; ``layers`` has the numbers of the layers by state."""

    kind: str
    role: str
    count: int
    nbytes: int
    states: Mapping[str, int]
    layers: Mapping[str, tuple[int, ...]]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        layers = {state: list(numbers) for state, numbers in self.layers.items() if numbers}
        said = {"class": self.kind, "role": self.role, "count": self.count, "bytes": self.nbytes}
        return {**said, "states": dict(self.states), "layers": layers}


@dataclass(frozen=True)
class Precision:
    """See the module.

    Attributes:
        method: ``quant_method`` of config.json; "" where it has none.
        with_scales: stored modules with FP8 weights and their scales; ``without_scales``, linear modules without codes.
        blocks, listing, right: None where nothing is in FP8, nor said to be, and in schemes that say neither so.
        scales: over the whole model.
    """

    cells: tuple[Cell, ...]
    classes: tuple[Class, ...]
    method: str = ""
    with_scales: tuple[str, ...] = ()
    without_scales: tuple[str, ...] = ()
    blocks: Blocks | None = None
    listing: Listing | None = None
    right: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    scales: Statistics | None = None

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        entries = self.listing.entries if self.listing else None
        return {
            "method": self.method,
            "classes": [each.to_dict() for each in self.classes],
            "with_scales": list(self.with_scales),
            "without_scales": list(self.without_scales),
            "block": self.blocks.to_dict() if self.blocks else None,
            "not_converted": {
                "key": self.listing.key if self.listing else "",
                "listed": None if entries is None else [entry.text for entry in entries],
                "right": list(self.right),
            },
            "faults": [fault.to_dict() for fault in self.faults],
            "scales": self.scales.to_dict() if self.scales else None,
            "cells": [cell.to_dict() for cell in self.cells],
        }


def precision_of(
    source: Source, logical: Logical | None, config: Mapping[str, object] | None, head: str = ""
) -> Precision | None:
    """The report on a source; scales are read, weights are not. None where the container's own names are all there is.

    Args:
        source: the checkpoint.
        logical: its tensors under HuggingFace's names; None where it could not be described.
        config: as settled.
        head: the output layer's module where it is tied to the embedding.

    Raises:
        Damaged, StorageFault: scales cannot be read.
    """
    specs = logical.specs if logical else {name: stored.spec for name, stored in source.tensors.items()}
    if not specs:
        return None
    specs = specs | {name: source.tensors[name].spec for name in source.coded if name in source.tensors}
    said = mapping_or_empty((config or {}).get("quantization_config"))
    method = str(said.get("quant_method", ""))[:80]
    scale, end = ("_scale", ".weight_scale") if method in _OTHERS else (SUFFIX, SUFFIX)
    scales = {name: name.removesuffix(scale) for name in source.tensors if name.endswith(end)}
    weights = {name: spec for name, spec in specs.items() if name not in scales}
    pairs = {name: source.tensors[scale] for scale, name in scales.items() if name in weights}
    places = {name: place_of(name, spec.file_shape) for name, spec in weights.items()}
    made = {name: _CODE.split(words)[0] for name, words in source.coded.items() if name not in source.tensors}
    cells = _cells(weights, places, pairs, made)
    counted, bad = _counted(source, weights, places, scales, pairs, cells)
    plain = Precision(tuple(cells.values()), _classes(cells.values()), method, scales=counted)
    fp8 = [name for name, spec in weights.items() if spec.dtype == FP8]
    if method in _OTHERS:
        idle = [n for n, of in scales.items() if not {of, f"{of}_packed"} & source.tensors.keys()]
        return _with_scales(plain, fp8, places, pairs, idle, bad, weights.keys() - source.coded.keys())
    idle = [n for n, of in scales.items() if of not in specs or specs[of].dtype != FP8]
    if method != "fp8" and not idle and not fp8:
        return plain
    return _with_claims(plain, config, said, weights, places, pairs, idle, bad, head)


def _with_scales(
    plain: Precision,
    fp8: list[str],
    places: Mapping[str, Place],
    pairs: Mapping[str, Stored],
    idle: list[str],
    bad: list[str],
    rest: Collection[str],
) -> Precision:
    """The report where each weight has its scale, and the config is held against all of them as they are decoded.

    Args:
        plain: the report so far.
        fp8: weights in FP8.
        places: of each weight in the model.
        pairs: the scales of each weight.
        idle: scales without a weight.
        bad: scales that no scale can be.
        rest: weights that are in no codes.
    """
    linear = [place.module for name, place in places.items() if name in rest and place.role in ("linear", "head")]
    return replace(
        plain,
        with_scales=tuple(places[name].module for name in fp8 if name in pairs),
        without_scales=tuple(linear) if fp8 else (),
        faults=tuple(values([name for name in fp8 if name not in pairs], idle, bad)),
    )


def _with_claims(
    plain: Precision,
    config: Mapping[str, object] | None,
    said: Mapping[str, object],
    weights: Mapping[str, TensorSpec],
    places: Mapping[str, Place],
    pairs: Mapping[str, Stored],
    idle: list[str],
    bad: list[str],
    head: str,
) -> Precision:
    """The report with what config.json claims of FP8, held against what is stored."""
    fp8 = [name for name, spec in weights.items() if spec.dtype == FP8]
    shapes = {name: (weights[name].file_shape, pairs[name].spec.shape) for name in fp8 if name in pairs}
    blocks, listing = blocks_of(config, shapes), listing_of(said)
    quantised = [places[name].module for name in shapes]
    others: dict[str, list[Place]] = {"head": [], "router": [], "linear": []}
    for name, place in places.items():
        if place.role in others and weights[name].dtype != FP8 and (place.role != "head" or place.layer < 0):
            others[place.role].append(place)
    heads = list(dict.fromkeys([place.module for place in others["head"]] + [head] * bool(head)))
    linear = [place.module for place in others["linear"]]
    by_class: dict[str, list[str]] = {module: [module] for module in heads}
    for place in (*others["router"], *others["linear"]):
        by_class.setdefault(place.kind, []).append(place.module)
    right = tuple(right_list(by_class, [places[name].module for name in fp8]))
    facts = Facts(
        quantised=quantised,
        linear=heads + linear,
        heads=heads,
        unscaled=[name for name in fp8 if name not in pairs],
        idle=idle,
        bad=bad,
        names=weights.keys(),
        listing=listing,
        blocks=blocks,
        right=right,
        said=plain.method == "fp8",
    )
    stored = [place.module for place in others["head"]] + linear
    return replace(
        plain,
        with_scales=tuple(quantised),
        without_scales=tuple(stored),
        blocks=blocks,
        listing=listing,
        right=right,
        faults=faults_of(facts),
    )


def _cells(
    weights: Mapping[str, TensorSpec],
    places: Mapping[str, Place],
    pairs: Mapping[str, Stored],
    made: Mapping[str, str],
) -> dict[tuple[str, int, str], Cell]:
    """The cells; ``made`` are codes that are stored under other names than their weights', in a word."""
    cells: dict[tuple[str, int, str], Cell] = {}
    for name, spec in weights.items():
        place = places[name]
        key = (place.stack, place.layer, place.kind)
        cell = cells.setdefault(key, Cell(*key, place.role))
        cell.count += 1
        cell.nbytes += spec.nbytes
        state = (SCALED if name in pairs else UNSCALED) if spec.dtype == FP8 else ""
        cell.states[f"{made[name]} codes" if name in made else spec.dtype + state] += 1
        cell.shapes[spec.file_shape] += 1
    return cells


def _counted(
    source: Source,
    weights: Mapping[str, TensorSpec],
    places: Mapping[str, Place],
    scales: Mapping[str, str],
    pairs: Mapping[str, Stored],
    cells: Mapping[tuple[str, int, str], Cell],
) -> tuple[Statistics | None, list[str]]:
    """Statistics of all ``scales`` (each with its weight), put into the cells as well, and those no scale can be."""
    wanted = {
        scale: pairs[name]
        for scale, name in scales.items()
        if name in pairs and weights[name].dtype == FP8 and pairs[name].spec.dtype in statistics.READABLE
    }
    if not wanted:
        return None, []
    total = Statistics()
    bad: list[str] = []
    for name, found in statistics.read(source, wanted):
        place = places[scales[name]]
        cell = cells[place.stack, place.layer, place.kind]
        cell.scales = cell.scales or Statistics()
        cell.scales.add(found)
        total.add(found)
        if found.bad:
            bad.append(name)
    return total, bad


def _classes(cells: Iterable[Cell]) -> tuple[Class, ...]:
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.kind, []).append(cell)
    return tuple(
        Class(
            kind,
            members[0].role,
            sum(cell.count for cell in members),
            sum(cell.nbytes for cell in members),
            dict(sum((cell.states for cell in members), Counter[str]()).most_common()),
            _layers(members),
        )
        for kind, members in grouped.items()
    )


def _layers(members: Iterable[Cell]) -> dict[str, tuple[int, ...]]:
    layers: dict[str, list[int]] = {}
    for cell in members:
        for state in cell.states:
            layers.setdefault(state, []).extend([cell.layer] if cell.layer >= 0 else [])
    return {state: tuple(sorted(set(numbers))) for state, numbers in layers.items()}


def ranges(numbers: Iterable[int]) -> str:
    """``0..3,7``."""
    return group_names(f"{n}" for n in numbers).strip("{}")
