"""Parallel sizes that a model permits beside those that are typed: the layout's own checks, asked number by number."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final

from dconv.arch.layouts import size
from dconv.assist.glance import Glance
from dconv.checkpoint import megatron, pt
from dconv.errors import DconvError
from dconv.launch.options import layout_of, parallel_of
from dconv.request import CALIBRATED, FORMATS
from dconv.targets import check_sizes

#: What ``--tp`` and its like are called.
SIZES: Final = ("tp", "pp", "vpp", "ep", "etp")
#: No size is larger: Megatron's jobs of thousands of ranks have the rest of them in data parallelism.
_LARGEST: Final = 512


def permitted(args: argparse.Namespace, name: str, known: Glance) -> list[int]:
    """Numbers that an option may have, the other options being as they are.

    Args:
        args: of the options that are typed; FORMAT may be missing, and is then Megatron.
        name: one of `SIZES`.
        known: the model.
    """
    check = _check(args, name, known)
    if check is None:
        return []
    most = min(_LARGEST, max(_most(name, known), 1))
    return [number for number in range(1, most + 1) if _passes(check, number)]


def _most(name: str, known: Glance) -> int:
    """A number that no size of this kind passes, so that few are tried."""
    facts = known.facts
    heads = max(size(facts, "heads"), size(facts, "mamba_heads"))
    experts = size(facts, "experts")
    # experts may be cut finer than attention is, up to their own width
    most = {"tp": heads, "ep": experts, "etp": max(heads, size(facts, "ffn") if experts else 0)}
    return most.get(name, size(facts, "layers") + 2)  # the embedding and the loss may count as layers


def _check(args: argparse.Namespace, name: str, known: Glance) -> Callable[[int], None] | None:
    """What raises where a number is none for the typed FORMAT; None where that has no such option."""
    family, facts = known.family, known.facts
    if family is None:
        return None
    format = args.format or "megatron"
    engine = FORMATS.get(format)
    if engine == "megatron":

        def layout(number: int) -> None:
            parallel = parallel_of(argparse.Namespace(**{**vars(args), name: number}))
            check_sizes(family, facts, parallel)
            said = layout_of(args)
            local = said["transformer_impl"] == "local"
            megatron.check_cuts(family, facts, parallel, said["make_vocab_size_divisible_by"], local_spec=local)

        return layout
    if engine == "pt" and name == "tp":

        def files(number: int) -> None:
            if number > 1:
                for entry in family.samples(facts):
                    for _ in pt.cut(entry, number):
                        pass

        return files
    if format in CALIBRATED and name == "ep" and size(facts, "experts"):
        return lambda number: check_sizes(
            family, facts, parallel_of(argparse.Namespace(**{**vars(args), name: number, "etp": 1}))
        )
    return None


def _passes(check: Callable[[int], None], number: int) -> bool:
    try:
        check(number)
    except DconvError:
        return False
    return True
