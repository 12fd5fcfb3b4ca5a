"""From a request to a calibrated quantisation: which weights, which grid, which samples; and one rank's run of it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from dconv.arch.layouts import size
from dconv.checkpoint.source import beside
from dconv.coded.encode import linears
from dconv.coded.integers import integers_of
from dconv.describe import Described
from dconv.errors import Preempted, Refused, UsageError, group_names
from dconv.quant.awq_maps import Folds, folds_of
from dconv.quant.held import Held, folded_file, numbers_of, tasks_of, to_choose
from dconv.quant.mixed import resolve
from dconv.quant.parse import quantization_of
from dconv.quant.recipes import recipe_of
from dconv.quant.report import files_of
from dconv.quant.settings import Awq, Gptq, Method
from dconv.request import CALIBRATED, Request
from dconv.sharding.allocation import return_freed_memory
from dconv.sharding.derived import Array, open_reader
from dconv.sharding.dtypes import TO_TORCH

if TYPE_CHECKING:
    from dconv.quant.data import Samples
    from dconv.quant.gptq import Recipe
    from dconv.sharding.commit import Rank
    from dconv.sharding.plan import Task
    from dconv.sharding.tensor import Logical

_FOLDER: Final = "calibration"


@dataclass(frozen=True)
class Calibrating:
    """A calibration that is planned.

    Attributes:
        source: the model as it is, whose layers are run.
        recipes: of the weights to be quantised, by name.
        record: of settings and samples, for the receipt.
        folds: where AWQ's scales go.
        stored: torch's names of the dtypes of tensors that change without being quantised.
        lines: of the report; they come while it runs.
    """

    source: Described
    settings: Gptq | Awq
    samples: Samples
    recipes: Mapping[str, Recipe]
    record: Mapping[str, Any]
    folds: Folds | None = None
    stored: Mapping[str, str] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def changed(self) -> frozenset[str]:
        """The tensors that are other ones afterwards."""
        return frozenset(self.recipes) | (self.folds.plain if self.folds else frozenset())

    def closing(self, files: Callable[[], Iterable[tuple[str, bytes]]]) -> Callable[[], Iterable[tuple[str, bytes]]]:
        """The small files of an output, with the report among them."""
        return lambda: (*files(), *files_of(self.lines, self.record))


def is_asked_for(request: Request, model: Described) -> bool:
    """Whether a request takes calibration, or is about whole numbers that the source has.

    Raises:
        UsageError: options of calibration beside a FORMAT that has none.
        Refused: the same beside a source that is in whole numbers already.
    """
    given = [f"--{name.replace('_', '-')}" for name in ("quantization_config", "calibration") if getattr(request, name)]
    if request.format not in CALIBRATED:
        if given:
            raise UsageError(
                f"{request.format} takes no calibration, nothing was written",
                where=", ".join(given),
                expected=f"FORMAT {' or '.join(CALIBRATED)}",
            )
        return False
    whole = [name for name in model.logical.specs if _is_whole(name, model.logical)]
    if whole and given:
        raise Refused(
            "the source is in whole numbers already, which are packed as they are, nothing was written",
            where=group_names(whole),
            found=", ".join(given),
            do="without these options; or FORMAT hf first, and quantise that anew",
        )
    return not whole


def _is_whole(name: str, logical: Logical) -> bool:
    spec = logical.specs[name]
    dense = Array(spec.shape, spec.dtype, logical.pieces[name], logical.replicas.get(name, ()))
    return integers_of(name, dense, logical) is not None


def plan(request: Request, model: Described) -> tuple[Described, Calibrating, tuple[str, ...]]:
    """The model as it will be, the calibration that makes it so, and what to say of it.

    Reads the samples, and no weight.

    Raises:
        DconvError: see `dconv.quant.parse.quantization_of`, `dconv.quant.mixed.resolve` and `dconv.quant.data.load`.
    """
    from dconv.quant.data import load  # a plain conversion does not pay for it

    method: Method = "awq" if request.format == "awq" else "gptq"
    asked = quantization_of(request.quantization_config, method, request.calibration)
    shapes = {name: spec.shape for name, spec in model.logical.specs.items()}
    entries = list(model.family.entries(model.facts))
    apart = {spec.name for entry in entries if entry.row.stack != "layers" for spec in entry.fused.specs}
    inside = linears(model.family, model.facts, model.logical)
    table = resolve(asked, shapes, inside - apart, strict=request.strict)
    others = {name: choice.words for name, choice in table.coded.items() if not choice.integer}
    if others:
        raise Refused(
            "a checkpoint of several kinds of codes is not written by this version, nothing was written",
            where=group_names(list(others)),
            found=", ".join(sorted(set(others.values()))),
            expected="whole numbers (int2 to int8) for all that is quantised",
        )
    longest = model.config.get("max_position_embeddings")
    calibration, cut = asked.calibration.clipped(longest if isinstance(longest, int) else None)
    named = any(name.startswith(("tokenizer", "vocab", "tekken")) for name in model.source.side)
    with beside(model.source.side) as folder:
        samples = load(calibration, folder if named else None, size(model.facts, "vocab"))
    v1 = request.quant in (None, "gptq")
    dtypes = {name: request.dtype or spec.dtype for name, spec in model.logical.specs.items()}
    recipes = {
        name: recipe_of(choice, asked.settings, v1=v1, dtype=dtypes[name]) for name, choice in table.coded.items()
    }
    described = {**asked.describe(), "weights": _grouped(table.describe())}
    identity = json.dumps([described, samples.record["sha256"]], sort_keys=True)
    folds = None if isinstance(asked.settings, Gptq) else folds_of(model.family, model.facts, model.logical, recipes)
    logical = to_choose(model.logical, recipes, identity, folds.plain if folds else ())
    predictor = "token predictors are left as they are: no pass of the model reaches them" if inside & apart else ""
    notes = tuple(note for note in (cut, samples.warning, predictor, *table.notices) if note)
    record = {"settings": described, "samples": samples.record}
    stored = {name: TO_TORCH[dtypes[name]] for name in (folds.plain if folds else ())}
    planned = Calibrating(model, asked.settings, samples, recipes, record, folds, stored)
    return replace(model, logical=logical), planned, notes


def _grouped(words: Mapping[str, str]) -> dict[str, str]:
    """Names by what they get."""
    found: dict[str, list[str]] = {}
    for name, said in words.items():
        found.setdefault(said, []).append(name)
    return {said: group_names(names) for said, names in sorted(found.items())}


def work(job: Calibrating, device: str) -> Callable[[Rank], None]:
    """What a rank does of a calibration: to be given to `dconv.sharding.commit.run_rank`."""

    def do(rank: Rank) -> None:
        _run(job, rank, device)

    return do


def _run(job: Calibrating, rank: Rank, device: str) -> None:
    from dconv.quant.awq import Search
    from dconv.quant.awq_loop import Layers
    from dconv.quant.blocks import Blocks
    from dconv.quant.loop import Calibration, Options
    from dconv.quant.network import Network
    from dconv.quant.ranks import Ranks

    settings, plan, held = rank.settings, rank.plan, Held()
    by_weight = tasks_of(plan)
    later = {index for found in by_weight.values() for index in found}
    parts = {name: _share([plan.tasks[i] for i in found], settings.rank, settings.world) for name, found in
             by_weight.items()}  # fmt: skip
    plain = [task for task in plan.share(settings.rank, settings.world) if task.index not in later]
    rank.share = sum(task.nbytes for task in (*plain, *(task for part in parts.values() for task in part)))
    rank.reader = lambda scratch: open_reader(plan.source, scratch, rank.kernel, settings.log, held.reader)

    def write(results: Mapping[str, Any]) -> None:
        held.arrays = {}
        for name, result in results.items():
            if name in job.recipes:
                held.arrays |= numbers_of(name, result.chosen, job.recipes[name])
            else:
                held.arrays[folded_file(name)] = result.cpu().numpy()
        rank.do([task for name in results for task in parts[name]])
        held.arrays = {}

    return_freed_memory()
    ranks = Ranks(settings.rank, settings.world, device, settings.stop or threading.Event())
    ranks.begin()
    try:
        source, asked = job.source, job.settings
        net = Network(source.config, source.logical, device, max(settings.max_memory, 1 << 26))
        if unreached := sorted(job.recipes.keys() - net.names()):
            raise Refused(
                "weights to be quantised are in no layer of the model that is run, nothing was written",
                where=group_names(unreached),
                expected="linear layers of transformers' decoder layers",
                do="leave them out: an override with skip in --quantization-config",
            )
        with ranks.leaving_together():
            rank.do(plain)
        folder, threads = rank.state / _FOLDER, _threads(settings.threads, settings.world)
        blocks, options = (
            Blocks(job.samples.tokens, folder / "hidden"),
            Options(room=settings.max_memory, threads=threads),
        )
        method = None
        if isinstance(asked, Gptq):
            options = replace(options, weigh_by_routing=asked.routing_weighted, sequential=asked.true_sequential)
        elif job.folds is not None:
            search = Search(asked.n_grid, asked.duo_scaling)
            layers = Layers(
                net, job.recipes, job.folds, blocks, ranks, search, job.stored, asked.clip, settings.max_memory, threads
            )
            method = layers.choose
        run = Calibration(
            net,
            job.recipes,
            blocks,
            ranks,
            folder,
            options,
            write,
            method=method,
        )
        try:
            job.lines[:] = run.run()
            if {line["weight"] for line in job.lines} != set(job.recipes):
                raise RuntimeError("a pass of the model did not come to all weights that were to be quantised")
        finally:
            net.close()
        ranks.wait()
    except Preempted as error:
        error.where = error.where or str(rank.partial)
        raise
    finally:
        ranks.end()


def _share(tasks: list[Task], rank: int, world: int) -> list[Task]:
    """Every weight's tasks begin with another rank, so that small weights have different writers."""
    return [task for task in tasks if task.index % world == rank]


def _threads(asked: int, world: int) -> int:
    """Threads of a rank: as asked, else what this machine has for each of its ranks."""
    if asked > 1:
        return asked
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or world)
    return max(1, (os.cpu_count() or 1) // here)
