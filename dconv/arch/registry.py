"""Which families there are, and which one a checkpoint is. Other packages add theirs by entry point ``dconv.archs``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Final

from dconv.arch import (
    bamba,
    bert,
    deepseek,
    gemma,
    glm,
    glm_moe,
    gpt2,
    granite,
    llama,
    llava,
    mamba,
    minicpm,
    minicpmv,
    moe,
    olmo,
    phi,
    t5,
)
from dconv.arch.config import detect_by_args
from dconv.arch.family import Family
from dconv.arch.generic_moe import GENERIC_MOE, has_experts
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.parsed import is_list

_MODULES: Final = (
    llama, phi, gemma, glm, olmo, granite, moe, deepseek, glm_moe, mamba, bamba, minicpm, gpt2, bert, t5, llava,
    minicpmv,
)  # fmt: skip
_BUILT_IN: Final = {family.name: family for module in _MODULES for family in module.FAMILIES}


@cache
def families() -> dict[str, Family]:
    """All families by name; an entry point gives a `Family` or a sequence of them."""
    from importlib.metadata import entry_points  # a rank that finds its family built in does not pay for it

    found = dict(_BUILT_IN)
    for point in entry_points(group="dconv.archs"):
        loaded = point.load()
        for family in (loaded,) if isinstance(loaded, Family) else loaded:
            found[family.name] = family
    return found


def by_name(name: str) -> Family:
    """The family that ``--model-type`` names.

    Raises:
        Refused: there is none; the nearest is named.
    """
    family = {**_BUILT_IN, GENERIC_MOE.name: GENERIC_MOE}.get(name) or families().get(name)
    if family is None:
        raise _unknown(name)
    return family


def detect(config: Mapping[str, object] | None, args: Mapping[str, object] | None, names: Iterable[str] = ()) -> Family:
    """The family of a checkpoint, from its HuggingFace config or else from Megatron's args.

    Args:
        config: config.json, if there is one.
        args: Megatron's, if there are some.
        names: of the stored tensors. They tell families of one architecture apart (`Family.marks`), and a decoder from
            an encoder, of which Megatron's args say nothing.

    Raises:
        Refused: no family, or nothing to tell it by.
        Damaged: a config that names it by what is no text.
    """
    names = tuple(names)
    found = _said(config, args, names)
    known = _BUILT_IN if found.name in _BUILT_IN else families()
    kin = [family for family in known.values() if family.config.architecture == found.config.architecture]
    if len(kin) == 1:
        return found
    marked = [family for family in kin if any(mark in name for mark in family.marks for name in names)]
    plain = [family for family in kin if not family.marks]
    return next(iter(marked or plain), found)


def _said(config: Mapping[str, object] | None, args: Mapping[str, object] | None, names: Sequence[str]) -> Family:
    if config is not None:
        architectures = config.get("architectures")
        named = architectures[0] if is_list(architectures) and architectures else ""
        model_type = config.get("model_type")
        if not isinstance(named, str) or not isinstance(model_type, str | None):
            raise Damaged(
                "config.json names no architecture",
                where="architectures, model_type",
                expected="texts",
                found=f"{architectures!r:.80}, {model_type!r:.80}",
            )
        for known in (_BUILT_IN, families):
            for family in (known() if callable(known) else known).values():
                if family.config.architecture == named if named else family.config.model_type == model_type:
                    return family
                if named in family.classes:
                    return _whole(family, str(named), names)
        if has_experts(config):
            return GENERIC_MOE
        raise _unknown(str(named or model_type))
    if args is not None:
        blocks = _blocks(names)
        fitting = [f for f in families().values() if not blocks or _blocks(row.megatron for row in f.rows) == blocks]
        wanted = detect_by_args(args, [family.config for family in fitting])
        return next(family for family in fitting if family.config is wanted)
    raise nothing_known()


def _whole(family: Family, named: str, names: Sequence[str]) -> Family:
    """The family, for the files of another of its classes that have all of its own.

    Raises:
        Refused: a part of them.
    """
    megatron = any(name.startswith("embedding.word_embeddings.") for name in names)
    if lacking := family.lacking(names) if names and not megatron else ():
        raise Refused(
            f"{named} with {len(lacking)} tensors less than Megatron's {family.name} has, nothing was written",
            expected=f"all that {family.config.architecture} has, as files that say {named} often do",
            found="without " + group_names(lacking),
            do=f"add what is missing ({family.config.architecture}.from_pretrained draws it at random), save it",
        )
    return family


def _blocks(names: Iterable[str]) -> set[str]:
    """Which of an encoder and a decoder these names have layers in."""
    return {block for name in names for block in ("encoder", "decoder") if name.startswith(f"{block}.layers.")}


def nothing_known(found: str = "") -> Refused:
    """The refusal of a checkpoint that says nothing about its model, or not enough (``found``)."""
    return Refused(
        "nothing says what model this is, nothing was written",
        expected="config.json, or Megatron's args inside the checkpoint",
        found=found,
        do="--hf-config DIR supplies a config.json",
    )


def _unknown(name: str) -> Refused:
    known = {f.config.architecture: f for f in families().values()} | families()
    import difflib

    close = difflib.get_close_matches(name, known, 1, 0.0)
    nearest = known[close[0]].name if close else "llama"
    return Refused(
        f"no family is called {name}, nothing was written",
        expected="one of " + ", ".join(sorted(families())),
        do=f"if it is the same function as {nearest}: --model-type {nearest}; else add dconv/arch/<name>.py",
    )
