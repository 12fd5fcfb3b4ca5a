"""FORMAT neuron's codes (``--neuron-…``): how FP8 is written for AWS Neuron, and a described model in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, Final

from dconv.codec.neuron import FITTED, HALVED
from dconv.coded.decode import KEY
from dconv.coded.neuron import Coding, code
from dconv.describe import Described
from dconv.errors import UsageError
from dconv.request import FORMATS, NEURON_RESCALES, NEURON_SCALES, Request, spelled

#: ``--neuron-rescale`` -> the number; the first is the default.
RESCALES: Final[Mapping[str, Fraction]] = dict(zip(NEURON_RESCALES, (HALVED, FITTED), strict=True))
#: ``--quant``: every matrix in FP8 that Neuron has a scale a row for, those of a dense source included.
QUANT: Final = "fp8"


def coding_of(request: Request) -> Coding | None:
    """How a request for Neuron's tensors wants FP8 written; None for any other FORMAT.

    Raises:
        UsageError: another FORMAT with Neuron's options, or a value that there is not.
    """
    asked = {
        "neuron_rescale": (request.neuron_rescale, RESCALES),
        "neuron_scale": (request.neuron_scale, NEURON_SCALES),
    }
    if FORMATS.get(request.format) != "neuron":
        if given := [name for name, (said, _) in asked.items() if said is not None]:
            raise UsageError(
                f"{request.format} has no such option, nothing was written",
                where=", ".join(map(spelled, given)),
                expected="these options with FORMAT neuron only",
            )
        return None
    for name, (said, known) in asked.items():
        if said is not None and said not in known:
            raise UsageError(
                "there is no such way to write Neuron's scales, nothing was written",
                where=f"{spelled(name)} {said}",
                expected=" or ".join(known),
            )
    if request.quant not in (None, QUANT):
        raise UsageError(
            "neuron has no such variant, nothing was written",
            where=f"--quant {request.quant}",
            expected=f"{QUANT}, which encodes dense matrices, too; without it an FP8 source's stay in FP8",
        )
    every = request.quant == QUANT
    return Coding(RESCALES[request.neuron_rescale or "2"], request.neuron_scale == "reciprocal", every)


def as_neuron(model: Described, coding: Coding) -> tuple[Described, tuple[str, ...], Mapping[str, Any] | None]:
    """The model as Neuron's tensors are made of it, what to say of it, and what to record of its scales.

    Raises:
        Refused: see `dconv.arch.neuron.lay_out` and `dconv.coded.neuron.code`.
    """
    made = code(model.family, model.facts, model.logical, coding)
    scales = made.scales
    if not scales.read and not made.encoded:
        return replace(model, logical=made.logical), (), None
    by = next(name for name, number in RESCALES.items() if number == coding.by)
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(made.block) if made.block else None,
        **({"modules_to_not_convert": list(made.plain)} if made.plain else {}),
        **({"weight_scale_semantics": "inverse"} if coding.reciprocal else {}),
    }
    left_out = {name: why for name, why in made.logical.left_out.items() if name != f"{KEY} of config.json"}
    logical = replace(made.logical, left_out=left_out)
    new = replace(model, config={**model.config, KEY: config}, logical=logical, fixed=made.fixed)
    notes = [
        f"scales: {scales.kept:,} kept + {scales.requantised:,} requantised + {scales.dropped:,} dropped "
        f"= {scales.read:,} read;  codes of those kept by {by}, .scale is a {NEURON_SCALES[coding.reciprocal]}"
    ]
    if made.encoded:
        notes.append(f"encoded: {made.encoded:,} dense matrices, with absmax / 240 of each row for its scale")
    record = {
        **({"encoded": made.encoded} if made.encoded else {}),
        "read": scales.read,
        "kept": scales.kept,
        "requantised": scales.requantised,
        "dropped": scales.dropped,
        "rescale": by,
        "scale": NEURON_SCALES[coding.reciprocal],
    }
    return new, tuple(notes), record
