"""muP scalars of a model and their meaning: what ``--mup2llama`` would fold, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dconv.arch.family import Family
from dconv.arch.mup import KEYS, scalars
from dconv.checkpoint.fold import meaning_of
from dconv.errors import DconvError
from dconv.sharding.region import Index


def scalars_of(family: Family | None, config: Mapping[str, object], stored: Mapping[str, Index]) -> dict[str, Any]:
    """The scalars that config.json has, and by part of the model the factor that they make.

    Args:
        family: None where it is not known; scalars have no meaning then.
        stored: shapes of the stored tensors.
        config: config.json, as settled.

    Returns:
        Empty where there are none; else ``scalars``, ``factors`` (`dconv.checkpoint.fold.meaning_of`) and ``note``.
    """
    there = scalars(config)
    if family is None or family.mup is None:
        if not there:
            return {}
        note = "no family is known that computes with them" if family is None else f"{family.name} does not use them"
        return {"scalars": there, "factors": {}, "note": note}
    said = {key: config[key] for key in family.mup.keys if key in KEYS and key in config}
    try:
        return {"scalars": said or there, "factors": meaning_of(family, config, stored), "note": ""}
    except DconvError as error:
        return {"scalars": said or there, "factors": {}, "note": error.what}


def text(found: Mapping[str, Any]) -> str:
    """The same for a person; empty where there is nothing."""
    if not found:
        return ""
    lines = [", ".join(f"{key} {value}" for key, value in found["scalars"].items()) or "as the family's class has them"]
    for part, factor in found["factors"].items():
        lines.append(f"{part:<10} x {factor['factor']:<10.6g} = {factor['formula']}")
    lines.append(found["note"] or "--mup2llama folds them into the weights")
    return "\n".join(lines)
