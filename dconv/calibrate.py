"""From a request to a calibrated quantisation: which weights, which grid, which samples."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dconv.arch.family import Family
from dconv.arch.layouts import size
from dconv.checkpoint.source import beside
from dconv.coded.compressed_config import METHOD
from dconv.coded.encode import has_codes, linears
from dconv.coded.integers import integers_of
from dconv.coded.mixed_encode import Mixed, as_coded
from dconv.describe import Described
from dconv.errors import Refused, UsageError, group_names
from dconv.net import own
from dconv.quant.awq_maps import Folds, folds_of, is_known
from dconv.quant.held import to_choose
from dconv.quant.listing import lines_of
from dconv.quant.mixed import Resolved, resolve
from dconv.quant.parse import quantization_of
from dconv.quant.readers import limits
from dconv.quant.recipes import recipe_of
from dconv.quant.report import files_of
from dconv.quant.settings import Awq, Gptq, Method, Quantization
from dconv.quantise import Schemes, schemes_of
from dconv.request import CALIBRATED, Request, spelled
from dconv.sharding.derived import Array
from dconv.sharding.dtypes import TO_TORCH
from dconv.sharding.parsed import is_mapping

if TYPE_CHECKING:
    from dconv.quant.data import Samples
    from dconv.quant.gptq import Recipe
    from dconv.sharding.tensor import Logical


@dataclass(frozen=True)
class Calibrating:
    """A calibration that is planned.

    Attributes:
        source: the model whose layers are run: as it is, but for weights in floating codes, which are worth already
            what their codes are worth.
        recipes: of the weights to be quantised, by name.
        record: of settings and samples, for the receipt.
        folds: where AWQ's scales go.
        stored: torch's names of the dtypes of tensors that change without being quantised.
        peers: ranks that have a layer's experts between them.
        lines: of the report; they come while it runs.
    """

    source: Described
    settings: Gptq | Awq
    samples: Samples
    recipes: Mapping[str, Recipe]
    record: Mapping[str, Any]
    folds: Folds | None = None
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    peers: int = 1
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @property
    def changed(self) -> frozenset[str]:
        """The tensors that are other ones afterwards."""
        return frozenset(self.recipes) | (self.folds.plain if self.folds else frozenset[str]())

    def closing(self, files: Callable[[], Iterable[tuple[str, bytes]]]) -> Callable[[], Iterable[tuple[str, bytes]]]:
        """The small files of an output, with the report among them."""
        return lambda: (*files(), *files_of(self.lines, self.record))


def is_asked_for(request: Request, model: Described) -> bool:
    """Whether a request takes calibration, or is about whole numbers that the source has.

    Raises:
        UsageError: options of calibration beside a FORMAT that has none.
        Refused: the same beside a source that is in whole numbers already.
    """
    check_given(request)
    if request.format not in CALIBRATED:
        return False
    given = _given(request) + ["--ep"] * (request.parallel.ep > 1)
    whole = [name for name in model.logical.specs if _is_whole(name, model.logical)]
    if whole and given:
        raise Refused(
            "the source is in whole numbers already, which are packed as they are, nothing was written",
            where=group_names(whole),
            found=", ".join(given),
            do="without these options; or FORMAT hf first, and quantise that anew",
        )
    return not whole


def check_given(request: Request) -> None:
    """Refuse options of calibration beside a FORMAT that has none.

    Raises:
        UsageError: see above.
    """
    given = _given(request) + ["--strict"] * request.strict
    if given and request.format not in CALIBRATED:
        raise UsageError(
            f"{request.format} takes no calibration, nothing was written",
            where=", ".join(given),
            expected=f"FORMAT {' or '.join(CALIBRATED)}",
        )


def _given(request: Request) -> list[str]:
    return [spelled(name) for name in ("quantization_config", "calibration") if getattr(request, name)]


def _is_whole(name: str, logical: Logical) -> bool:
    spec = logical.specs[name]
    dense = Array(spec.shape, spec.dtype, logical.pieces[name], logical.replicas.get(name, ()))
    return integers_of(name, dense, logical) is not None


def is_calibrated(family: Family, format: str) -> bool | None:
    """Whether calibration chooses codes of a family's layers at all; None where transformers is not installed.

    Args:
        family: the model's.
        format: one of `dconv.request.CALIBRATED`.
    """
    inside = any(row.is_linear and row.stack == "layers" for row in family.rows)
    if not inside or not has_codes(family, stacked=False) or (format == "awq" and not is_known(family)):
        return False
    return own.is_computed(family) if importlib.util.find_spec("transformers") else None


@dataclass(frozen=True)
class Planned:
    """What a request for calibration comes to.

    Attributes:
        model: as it will be.
        calibrating: what makes it so; None where a table has no whole numbers, so that nothing is chosen.
        schemes: of its codes, where a table says them.
        notes: what to say of it.
    """

    model: Described
    calibrating: Calibrating | None
    schemes: Schemes | None
    notes: tuple[str, ...]


def plan(request: Request, model: Described) -> Planned:
    """Lay a request's table over a model; reads the samples, and no weight.

    Raises:
        DconvError: see `dconv.quant.parse.quantization_of`, `dconv.quant.mixed.resolve`, `dconv.quantise.schemes_of`
            and `dconv.quant.data.load`.
    """
    from dconv.quant.data import load  # a plain conversion does not pay for it

    experts, peers = size(model.facts, "experts"), request.parallel.ep
    if peers > max(experts, 1):
        raise Refused(
            f"{model.family.name} has no experts for so many ranks, nothing was written" if experts else
            f"{model.family.name} has no experts to divide, nothing was written",
            where="--ep",
            expected=f"{max(experts, 1)} at most",
            found=str(peers),
        )  # fmt: skip
    method: Method = "awq" if request.format == "awq" else "gptq"
    asked = quantization_of(request.quantization_config, method, request.calibration)
    shapes = {name: spec.shape for name, spec in model.logical.specs.items()}
    entries = list(model.family.entries(model.facts))
    apart = {spec.name for entry in entries if entry.row.stack != "layers" for spec in entry.fused.specs}
    inside = linears(model.family, model.facts, model.logical)
    table = resolve(asked, shapes, inside - apart, strict=request.strict)
    schemes = schemes_of(table.choices, request, symmetric=asked.symmetric) if method == "gptq" else None
    said = (*_said(table, schemes, asked, request.quant), *table.notices)
    predictor = "token predictors are left as they are: no pass of the model reaches them" if inside & apart else ""
    chosen = {name: choice for name, choice in table.coded.items() if choice.integer}
    if not chosen:
        none = "no type of the table is of whole numbers: nothing is calibrated, and no samples are read"
        return Planned(model, None, schemes, tuple(filter(None, (none, predictor, *said))))
    text = model.config.get("text_config")
    longest = (text if is_mapping(text) else model.config).get("max_position_embeddings")
    calibration, cut = asked.calibration.clipped(longest if isinstance(longest, int) else None)
    if importlib.util.find_spec("transformers"):  # without it nothing is run, and no plan needs it
        own.require(model.family, model.config, calibration.seqlen)
    named = any(name.startswith(("tokenizer", "vocab", "tekken")) for name in model.source.side)
    with beside(model.source.side) as folder:
        samples = load(calibration, folder if named else None, size(model.facts, "vocab"))
    v1 = request.quant != "gptq_v2" and bool(schemes and schemes.reader and schemes.reader.name == "gptq")
    dtypes = {name: request.dtype or spec.dtype for name, spec in model.logical.specs.items()}
    recipes = {name: recipe_of(choice, asked.settings, v1=v1, dtype=dtypes[name]) for name, choice in chosen.items()}
    described = {**asked.describe(), "weights": _grouped(table.describe())}
    identity = json.dumps([described, samples.record["sha256"]], sort_keys=True)
    folds = None if isinstance(asked.settings, Gptq) else folds_of(model.family, model.facts, model.logical, recipes)
    logical = to_choose(model.logical, recipes, identity, folds.plain if folds else ())
    seeing = "calibrated with words: what is outside of the language model stays as it is" if model.family.sees else ""
    notes = tuple(note for note in (cut, samples.warning, predictor, seeing, *said) if note)
    record = {"settings": described, "samples": samples.record}
    stored = {name: TO_TORCH[dtypes[name]] for name in (folds.plain if folds else ())}
    calibrating = Calibrating(_seen(model, schemes), asked.settings, samples, recipes, record, folds, stored, peers)
    return Planned(replace(model, logical=logical), calibrating, schemes, notes)


def _seen(model: Described, schemes: Schemes | None) -> Described:
    """The model whose layers are run: weights that no calibration chooses are what their codes will be worth."""
    if schemes is None or not schemes.worst or not isinstance(schemes.linears, Mixed):
        return model
    floating = frozenset(schemes.worst)
    kinds = [(scheme, names) for scheme, names in schemes.linears.kinds if names <= floating]
    of = model.family, model.facts, model.logical
    return replace(model, logical=as_coded(*of, Mixed(kinds).of(model.logical), set(floating)))


def _said(table: Resolved, schemes: Schemes | None, asked: Quantization, quant: str | None) -> list[str]:
    """What each module gets, where that is not the same for all, and who reads it.

    Raises:
        Refused: groups in the order of activations, for a reader that has none.
    """
    if schemes is None or schemes.reader is None:
        return []
    settings, reader = asked.settings, schemes.reader
    if reader.name == METHOD and isinstance(settings, Gptq) and settings.desc_act and not settings.static_groups:
        raise Refused(
            "groups of columns in the order of activations are not stored by compressed-tensors, nothing was written",
            where="desc_act in --quantization-config",
            expected='"static_groups": true beside it, which keeps the order and needs nothing stored',
        )
    kinds = {choice.words for choice in table.coded.values()}
    if len(kinds) == 1 and not schemes.worst and (quant or reader.name == "gptq"):
        return []
    lines = lines_of(table.choices)
    return [*lines, f"{reader.name} ({reader.format}), read by {reader.loads}", *limits(table.choices)]


def _grouped(words: Mapping[str, str]) -> dict[str, str]:
    """Names by what they get."""
    found: dict[str, list[str]] = {}
    for name, said in words.items():
        found.setdefault(said, []).append(name)
    return {said: group_names(names) for said, names in sorted(found.items())}
