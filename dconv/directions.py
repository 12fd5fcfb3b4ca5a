"""Which way the models of each family go: what they are read from, what is written of them, who is handed them.

What a cell says is asked of the tables by which conversions themselves refuse. A config can still have what a form does
not hold (a rotation that llama.cpp lacks, columns that are no whole groups): a plan says so, and no table of families
can. Nothing of a checkpoint is looked at here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from dconv import calibrate, matrix
from dconv.arch import about, registry
from dconv.arch import bmtrain as bmtrain_config
from dconv.arch.family import Family
from dconv.arch.gguf import ARCHS
from dconv.arch.meta import hf_config_from_meta
from dconv.arch.mlx import MODELS
from dconv.arch.mup import KEYS
from dconv.arch.neuron import TABLES
from dconv.checkpoint import bmtrain
from dconv.coded import encode
from dconv.errors import DconvError
from dconv.export.prompt import kind_of
from dconv.export.runtimes import is_traced
from dconv.hw import registry as compilers
from dconv.hw.target import Choosing, Takes
from dconv.quantise import VARIANTS
from dconv.request import CALIBRATED, QUANTISED
from dconv.targets import GRAPHS

#: ``exact``, ``coded``, ``calibrated``: see `dconv.matrix.Numbers`. ``folded``: one of these, of the plain model that
#: ``--mup2llama`` makes. ``handed``: a compiler is given what it takes. ``none``: there is no such form. ``unsaid``:
#: only a plan tells.
Way = Literal["exact", "coded", "calibrated", "folded", "handed", "none", "unsaid"]
#: As a table shows them: letters that every font has.
SIGNS: Final[Mapping[Way, str]] = {
    "exact": "=", "coded": "c", "calibrated": "q", "folded": "µ", "handed": "h", "none": "", "unsaid": "?",
}  # fmt: skip
MEANINGS: Final[Mapping[Way, str]] = {
    "exact": matrix.MEANINGS["exact"],
    "coded": "new codes, each within the bound that the plan states",
    "calibrated": matrix.MEANINGS["calibrated"],
    "folded": "with --mup2llama, which folds the scalars into the weights: of the plain model that computes the same",
    "handed": "handed to the vendor's compiler, whose version says whether it has the model; muP scalars are folded",
    "none": "there is no such form of this family: refused before anything is written",
    "unsaid": "a plan says it: of a package from outside, or what transformers computes where it is not installed",
}
#: Containers that `_tabled` knows.
_TABLED: Final = ("gguf", "mlx", "neuron")


@dataclass(frozen=True, slots=True)
class Column:
    """A direction.

    Attributes:
        name: a key of `dconv.matrix.INPUTS`, one of `dconv.matrix.outputs`, a compiler, or a FORMAT from outside.
        group: ``from``, ``to`` or ``compiler``.
        words: for a person.
    """

    name: str
    group: Literal["from", "to", "compiler"]
    words: str


@dataclass(frozen=True, slots=True)
class Line:
    """A family.

    Attributes:
        name, models, layouts, note, shown: see `dconv.arch.about.lines`.
        ways: by column.
    """

    name: str
    models: str
    layouts: str
    note: str
    shown: str
    ways: Mapping[Column, Way]


def columns(outside: Iterable[str] = ()) -> tuple[Column, ...]:
    """All directions: sources of plain weights, FORMATs, compilers.

    Args:
        outside: FORMATs of other packages.
    """
    plain = [(name, one.words) for name, one in matrix.INPUTS.items() if not one.coded and not one.graph]
    return (
        *(Column(name, "from", words) for name, words in plain),
        *(Column(name, "to", name) for name in (*matrix.outputs(), *outside)),
        *(Column(name, "compiler", one.title) for name, one in compilers.adapters().items()),
    )


def lines(families: Iterable[Family], columns: Iterable[Column]) -> list[Line]:
    """A line for each family, in the order given."""
    families, columns = list(families), list(columns)
    return [
        Line(*said, {column: way(family, column) for column in columns})
        for family, said in zip(families, about.lines(families), strict=True)
    ]


def way(family: Family, column: Column) -> Way:
    """What a cell says."""
    if column.group == "from":
        return "exact" if is_read(family, column.name) else "none"
    if column.group == "compiler":
        found = is_handed(family, column.name)
        return "unsaid" if found is None else "handed" if found else "none"
    if column.name not in matrix.outputs():
        return "unsaid"
    found = is_made(family, column.name)
    if found:
        numbers = matrix.numbers("huggingface", column.name)
        return "coded" if numbers == "coded" else "calibrated" if numbers == "calibrated" else "exact"
    if found is None:
        return "unsaid"
    return "folded" if family is not plain_of(family) and is_made(plain_of(family), column.name) else "none"


def is_read(family: Family, source: str) -> bool:
    """Whether a kind of source is read as this family.

    Args:
        family: the family.
        source: a key of `dconv.matrix.INPUTS`, of plain weights.
    """
    if source in _TABLED:
        return family.name in _tabled(source)
    if source in ("meta", "bmtrain"):
        return family.name in _translated(source)
    return True


def is_made(family: Family, format: str) -> bool | None:
    """Whether a FORMAT has a form for this family; None where only a plan tells.

    Args:
        family: the family.
        format: one of `dconv.matrix.outputs`.
    """
    if format in _TABLED:
        return family.name in _tabled(format)
    if format == "bmtrain":
        return _is_in_bmtrain(family)
    if format in GRAPHS:
        return is_traced(family)
    if format in CALIBRATED:
        return calibrate.is_calibrated(family, format)
    if format in QUANTISED:
        return encode.has_codes(family, stacked=any(one.stacked for one in VARIANTS[format].values()))
    return True


def is_for(family: Family, compiler: str) -> bool | None:
    """Whether a compiler is for models of this family at all, whatever has to be made of them first.

    Args:
        family: the family.
        compiler: a target of `dconv.hw.registry`.

    Returns:
        None where its adapter does not say so before it plans.
    """
    takes = _takes(family, compiler)
    return None if takes is None else bool(takes)


def is_handed(family: Family, compiler: str) -> bool | None:
    """The same, where what it is handed can be made, too; None where only a plan tells."""
    takes = _takes(family, compiler)
    if takes is None:
        return None
    plain = plain_of(family)
    found = [[is_made(plain, format) for format in one.formats] for one in takes]
    if any(all(made) for made in found):
        return True
    return None if any(False not in made for made in found) else False


def plain_of(family: Family) -> Family:
    """The family that computes the same without muP scalars; itself where it has none."""
    return registry.by_name(family.mup.to) if family.mup and family.mup.to else family


def _takes(family: Family, compiler: str) -> list[Takes] | None:
    """What of all that a compiler takes models of a family are, muP scalars folded; None where it does not say."""
    adapter, plain = compilers.adapter(compiler), plain_of(family)
    if not isinstance(adapter, Choosing):
        return None
    kind = kind_of(plain)
    return [one for one in adapter.takes if kind in one.kinds and (not one.families or plain.name in one.families)]


def _is_in_bmtrain(family: Family) -> bool:
    """Of the plainest model of the family: as its class is by default, looking at all tokens."""
    config: Mapping[str, object] = {"sliding_window": None}
    try:
        return bmtrain.has_form(family, family.facts(config), config)
    except DconvError:  # a config that has to say more
        return False


@cache
def _tabled(container: str) -> frozenset[str]:
    """Families that a container has a table of names for, by which it is both read and written."""
    if container == "gguf":
        return frozenset(name for arch in ARCHS.values() for name in arch.families)
    return frozenset(MODELS if container == "mlx" else TABLES)


@cache
def _translated(source: str) -> frozenset[str]:
    """Families that the configs of other trainers are translated to."""
    if source == "meta":
        configs = [hf_config_from_meta({"dim": 64, "n_layers": 1, "n_heads": 1}, vocab=64)]
    else:
        sizes = ("dim_model", "dim_ff", "num_layers", "num_heads", "dim_head", "vocab_size")
        said: dict[str, object] = {**dict.fromkeys(sizes, 1), "eps": 1e-5}
        scaled = {**said, **dict.fromkeys(KEYS[:3], 1.0)}
        configs = [bmtrain_config.to_hf(one, {}, tied=False, dtype="bfloat16") for one in (said, scaled)]
    return frozenset(registry.detect(config, None).name for config in configs)
