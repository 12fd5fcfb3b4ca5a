"""``--mup2llama``: the same tensors read as a model without muP scalars, each piece with the factor that it carries.

No value is touched here. The plan gets the factors with the pieces, so that a fold needs no pass of its own and goes
with every container, layout and number of ranks; the family's declaration (`dconv.arch.mup`) says what carries what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from dconv.arch import mup, registry
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.arch.mup import Factor, Mup
from dconv.arch.translate import CONFIG
from dconv.errors import Refused, group_names
from dconv.sharding.region import Index
from dconv.sharding.tensor import Logical, Piece, TensorSpec


@dataclass(frozen=True)
class Folded:
    """A model without muP scalars, and what was done to make it one.

    Attributes:
        notes: the same for a person, one line each.
        record: the same for the receipt: scalars, and each factor with its formula and its tensors' names.
    """

    family: Family
    config: dict[str, object]
    facts: Facts
    logical: Logical
    notes: tuple[str, ...]
    record: Mapping[str, Any]


def nothing_to_fold(family: Family, config: Mapping[str, object]) -> str:
    """Why a model needs no fold, in one line; empty where it needs one.

    Raises:
        Refused: scalars in the config.json of a family that computes nothing with them, or whose fold is not known.
    """
    there = mup.scalars(config)
    if family.mup is None and there:
        aspects = family.config.aspects if isinstance(family.config, DecoderConfig) else ()
        known = any(key in aspect.compared for key in there for aspect in aspects)
        raise Refused(
            f"{CONFIG} has muP scalars that cannot be folded into a {family.name}, nothing was written",
            where=", ".join(f"{key} {value!r:.40}" for key, value in there.items()),
            found=f"no fold of {family.name} is known"
            if known
            else f"{family.name} computes nothing with them: folded already, or named as what it is not",
            do="" if known else "take the keys out if they are folded already; if they are not, --model-type minicpm",
        )
    if family.mup is None:
        return f"nothing to fold: {CONFIG} has no muP scalars, and a {family.name} none by itself"
    values = _factors(family.mup, _said(family, config), family.facts(config))
    if not family.mup.to and set(values.values()) == {1.0}:
        return "nothing to fold: all muP scalars multiply by 1"
    return ""


def fold(family: Family, config: Mapping[str, object], logical: Logical, stored: Mapping[str, Index]) -> Folded:
    """The model that computes the same without muP scalars.

    Args:
        family: one whose ``mup`` is set.
        config: config.json, with the scalars.
        logical: the source.
        stored: shapes of the source's tensors, as for `dconv.arch.family.Family.facts`.

    Raises:
        Damaged: a scalar that is no number above 0.
        Refused: the target has no place for a tensor, or a factor is too large or too small for a number.
    """
    declared = family.mup
    if declared is None:
        raise ValueError(f"{family.name} has no muP scalars: see nothing_to_fold")
    said, facts = _said(family, config), family.facts(config, stored)
    factors = _factors(declared, said, facts)
    to = registry.by_name(declared.to) if declared.to else family
    plain = declared.config(said if declared.to else config, facts)
    new_facts = to.facts(plain, stored)
    names = _renamed(family, facts, to, new_facts, logical)
    pieces: dict[str, tuple[Piece, ...]] = {}
    specs: dict[str, TensorSpec] = {}
    carriers: dict[str, list[str]] = {part: [] for part in factors}
    for name, (old, spec) in names.items():
        part = _part(declared.factors, name if name == to.head else old)
        if part:
            carriers[part].append(name)
        factor = factors[part] if part else 1.0
        pieces[name] = tuple(replace(piece, tensor=name, factor=factor) for piece in logical.pieces[old])
        specs[name] = replace(spec, dtype=logical.specs[old].dtype)
    replicas = {
        name: tuple(replace(piece, tensor=name) for piece in logical.replicas[old])
        for name, (old, _) in names.items()
        if old in logical.replicas and not (facts["tied"] and name == to.head)  # once is enough
    }
    left_out = {name: reason for name, reason in logical.left_out.items() if name not in specs}
    left_out |= {f"{key} of {CONFIG}": words for key, words in declared.dropped.items() if config.get(key) is not None}
    folded = replace(logical, specs=specs, pieces=pieces, replicas=replicas, left_out=left_out)
    notes, record = _told(family, to, declared, said, factors, carriers, untied=bool(facts["tied"]))
    return Folded(to, plain, new_facts, folded, notes, record)


def _said(family: Family, config: Mapping[str, object]) -> dict[str, object]:
    """config.json with what the family's class takes for keys that it omits."""
    return {**family.config.defaults, **config} if isinstance(family.config, DecoderConfig) else {**config}


def _factors(declared: Mup, said: Mapping[str, object], facts: Facts) -> dict[str, float]:
    found = {part: factor.value(said, facts) for part, factor in declared.factors.items()}
    for part, value in found.items():
        if not math.isfinite(value) or value <= 0:
            raise Refused(
                f"the factor of the {part} weights cannot be computed, nothing was written",
                where=f"{CONFIG}: {declared.factors[part].words}",
                found=repr(value),
                expected="a finite number above 0",
            )
    return found


def meaning_of(family: Family, config: Mapping[str, object], stored: Mapping[str, Index]) -> dict[str, dict[str, Any]]:
    """What each muP factor of a model is: formula, value and the tensors (patterns) that `fold` would multiply by it.

    Args:
        family: one whose ``mup`` is set.
        config: config.json, with the scalars.
        stored: as for `fold`.

    Raises:
        Damaged, Refused: a scalar that is no number above 0.
    """
    if family.mup is None:
        return {}
    values = _factors(family.mup, _said(family, config), family.facts(config, stored))
    return {
        part: {"formula": factor.words, "factor": values[part], "tensors": list(factor.tensors)}
        for part, factor in family.mup.factors.items()
    }


def _part(factors: Mapping[str, Factor], name: str) -> str:
    return next((part for part, f in factors.items() if any(fnmatchcase(name, pattern) for pattern in f.tensors)), "")


def _renamed(
    family: Family, facts: Facts, to: Family, new_facts: Facts, logical: Logical
) -> dict[str, tuple[str, TensorSpec]]:
    """For each tensor of the folded model that of the source, found by the name that both have in Megatron.

    Raises:
        Refused: a tensor of one side that the other has not, or has in another shape.
    """
    theirs = {entry.fused.name: entry.fused.specs for entry in family.entries(facts)}
    names: dict[str, tuple[str, TensorSpec]] = {}
    odd: list[str] = []
    for entry in to.entries(new_facts):
        olds = theirs.get(entry.fused.name, ())
        if not olds and facts["tied"] and entry.fused.specs[0].name == to.head:
            olds = next(e.fused.specs for e in family.entries(facts) if e.is_embedding)
        if [old.shape for old in olds] != [spec.shape for spec in entry.fused.specs]:
            odd += [spec.name for spec in entry.fused.specs]
        names |= {spec.name: (old.name, spec) for old, spec in zip(olds, entry.fused.specs, strict=False)}
    used = {old for old, _ in names.values()}
    odd += [name for name in logical.specs if name not in used]
    if odd:
        raise Refused(
            f"{len(odd)} tensors of this {family.name} have no place in a {to.name}, nothing was written",
            where=group_names(odd),
            expected=f"what a {to.name} has, and the same shapes",
            do="without --mup2llama they are kept, and so are the scalars",
        )
    return names


def _told(
    family: Family,
    to: Family,
    declared: Mup,
    said: Mapping[str, object],
    factors: Mapping[str, float],
    carriers: Mapping[str, list[str]],
    *,
    untied: bool,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    kind = to.config.architecture if to is not family else f"{family.name} without scalars"
    notes = [f"muP folded into the weights: {family.config.architecture} becomes {kind}"]
    parts: dict[str, Any] = {}
    for part, value in factors.items():
        grouped = group_names(carriers[part]).split("\n")
        words = declared.factors[part].words
        parts[part] = {"formula": words, "factor": value, "tensors": grouped}
        notes.append(f"  {part:<10} x {value:<10.6g} = {words}")
    if untied:
        notes.append(f"  {to.head} is the embedding before scaling: the two are tied no more")
    record: dict[str, Any] = {
        "from": family.name,
        "to": to.name,
        "scalars": {key: said.get(key) for key in declared.keys},
        "factors": parts,
        "untied": untied,
    }
    return tuple(notes), record
